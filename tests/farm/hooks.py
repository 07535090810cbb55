"""What tests of webhooks start from: a webhook, jobs that end, the fold, and the courier's turns."""

import uuid
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import text

from farm import webhooks
from farm.courier import Courier
from farm.maintenance import Sweeper
from farm.settings import Settings
from farm.states import Outcome
from farm.views_tenants import DeliveryView, WebhookView
from tests.farm.conftest import Queue

LOOPBACK = {"webhook_networks": "127.0.0.0/8", "webhook_timeout": timedelta(seconds=5)}


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update=LOOPBACK)


def add(queue: Queue, url: str, *events: str, **more: Any) -> WebhookView:
    chosen = events or webhooks.EVENTS
    return queue.do(webhooks.create, queue.project, url=url, events=chosen, settings=queue.settings, **more)


def told(queue: Queue, webhook: WebhookView) -> list[DeliveryView]:
    """Oldest first."""
    return queue.do(webhooks.deliveries, queue.project, webhook.id, limit=500).items[::-1]


def carry(carrier: Courier) -> None:
    carrier.turn()
    assert carrier.wait(20)


def fold(queue: Queue) -> None:
    while Sweeper(queue.settings, queue.database).fold():
        pass


def render(queue: Queue, outcome: Outcome = Outcome.SUCCEEDED, limit: int = 8) -> None:
    claimed = queue.claim(limit=limit)
    assert claimed is not None
    queue.finish(claimed, outcome, "" if outcome is Outcome.SUCCEEDED else "render-failed")


def due_now(queue: Queue) -> None:
    queue.do(lambda conn: conn.execute(text("UPDATE webhook_deliveries SET next_at = now() WHERE next_at > now()")))


def neighbour(queue: Queue) -> uuid.UUID:
    statement = text("INSERT INTO projects (id, name) VALUES (gen_random_uuid(), 'other') RETURNING id")
    return queue.do(lambda conn: conn.execute(statement).scalar_one())
