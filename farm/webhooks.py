"""Webhooks of a project: who is told of what, and the signature that proves it was us.

By the Standard Webhooks specification (standardwebhooks.com): every message has a stable id, a timestamp and one
signature for each valid secret.
"""

import base64
import hashlib
import hmac
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, RowMapping

from farm import addresses
from farm.cursors import decode, next_cursor
from farm.errors import Conflict, InvalidRequest, NotFound, Problem
from farm.ids import new_id
from farm.queries import webhooks as rows
from farm.settings import Settings
from farm.views import Page
from farm.views_tenants import DeliveryView, WebhookView

EVENTS = ("batch.finished", "batch.failed_share", "batch.stopped", "job.failed")
PING = "webhook.ping"
MOST = 20
"""Webhooks of one project."""
FAILED_SHARE = 0.1
OVERLAP = timedelta(hours=24)
LONGEST_OVERLAP = timedelta(days=30)
SECRET_BYTES = 32
SECRET_PREFIX = "whsec_"  # noqa: S105  # what every secret begins with


def create(
    conn: Connection,
    project_id: UUID,
    *,
    url: str,
    events: Sequence[str] = EVENTS,
    failed_share: float = FAILED_SHARE,
    settings: Settings,
) -> WebhookView:
    """Add a webhook. The answer is the only place that shows its secret.

    `failed_share` (above 0, at most 1) is the share of a batch's jobs that tells `batch.failed_share` once that many
    failed. Raises InvalidRequest for a URL that leads inside, an unknown event; Conflict when there are too many.
    """
    _check(url, events, failed_share, settings)
    if rows.count(conn, project_id) >= MOST:
        raise Conflict(f"a project has at most {MOST} webhooks; delete one first")
    secret = new_secret()
    row = rows.insert(
        conn,
        id=new_id(),
        project=project_id,
        url=url,
        events=sorted(set(events)),
        failed_share=failed_share,
        secret=secret,
    )
    return _view(row, secret)


def every(conn: Connection, project_id: UUID) -> list[WebhookView]:
    """The project's webhooks, oldest first, without secrets."""
    return [_view(row) for row in rows.every(conn, project_id)]


def get(conn: Connection, project_id: UUID, webhook: UUID) -> WebhookView:
    """One webhook. Raises NotFound, also for another project's."""
    return _view(_found(rows.get(conn, project_id, webhook), webhook))


def change(
    conn: Connection,
    project_id: UUID,
    webhook: UUID,
    *,
    url: str | None = None,
    events: Sequence[str] | None = None,
    failed_share: float | None = None,
    enabled: bool | None = None,
    settings: Settings,
) -> WebhookView:
    """Change what is not None. Whatever was still to be told to a webhook that is switched off is dropped.

    Raises NotFound, InvalidRequest.
    """
    _check(url, events, failed_share, settings)
    chosen = None if events is None else sorted(set(events))
    row = rows.change(
        conn, webhook, project=project_id, url=url, events=chosen, failed_share=failed_share, enabled=enabled
    )
    return _view(_found(row, webhook))


def rotate(conn: Connection, project_id: UUID, webhook: UUID, overlap: timedelta = OVERLAP) -> WebhookView:
    """Sign with a new secret, shown in this answer only, and with the old one as well until `overlap` has passed.

    Raises NotFound, InvalidRequest for an overlap that is negative or over 30 days.
    """
    if not timedelta(0) <= overlap <= LONGEST_OVERLAP:
        problem = f"must lie within 0..{LONGEST_OVERLAP.total_seconds():.0f} seconds"
        raise InvalidRequest("the overlap is not valid", [{"field": "overlap_seconds", "problem": problem}])
    secret = new_secret()
    return _view(_found(rows.rotate(conn, project_id, webhook, secret, overlap), webhook), secret)


def delete(conn: Connection, project_id: UUID, webhook: UUID) -> None:
    """Remove a webhook with its deliveries. Raises NotFound."""
    if not rows.delete(conn, project_id, webhook):
        raise NotFound(f"there is no webhook {webhook}")


def ping(conn: Connection, project_id: UUID, webhook: UUID) -> DeliveryView:
    """Send a `webhook.ping`, whatever events are wanted. Raises NotFound, and Conflict while it is switched off."""
    found = get(conn, project_id, webhook)
    if not found.enabled:
        raise Conflict(f"webhook {webhook} is switched off; switch it on first")
    written = message(webhook, PING, {"webhook": str(webhook)})
    rows.tell(conn, [written])
    return _delivery(rows.delivery(conn, written["id"]))


def deliveries(
    conn: Connection, project_id: UUID, webhook: UUID, *, cursor: str | None = None, limit: int = 50
) -> Page[DeliveryView]:
    """What a webhook was told or will be, newest first. Raises NotFound; InvalidRequest for a strange cursor."""
    get(conn, project_id, webhook)
    found = rows.deliveries(conn, webhook, before=decode(cursor), limit=limit + 1)
    return Page(items=[_delivery(row) for row in found[:limit]], next_cursor=next_cursor(found, limit))


def message(webhook: UUID, event: str, data: dict[str, Any], batch: UUID | None = None) -> dict[str, Any]:
    """A message to be written: its body says `type`, `timestamp` and `data`, as the specification proposes."""
    body = {"type": event, "timestamp": datetime.now(UTC).isoformat(), "data": data}
    return {"id": new_id(), "webhook": webhook, "event": event, "batch": batch, "body": body}


def message_id(delivery: UUID) -> str:
    """The `webhook-id` of a delivery: the same at every try, so that a receiver can tell repetitions."""
    return f"msg_{delivery.hex}"


def new_secret() -> str:
    """256 random bits, as `whsec_` and base64."""
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()


def signature(secret: str, sent_as: str, timestamp: int, body: bytes) -> str:
    """`v1,` and the base64 of HMAC-SHA256 over `id.timestamp.body`; `timestamp` counts seconds since 1970."""
    key = base64.b64decode(secret.removeprefix(SECRET_PREFIX))
    content = f"{sent_as}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.new(key, content, hashlib.sha256).digest()).decode()


def _check(url: str | None, events: Sequence[str] | None, failed_share: float | None, settings: Settings) -> None:
    problems: list[Problem] = []
    if url is not None:
        try:
            addresses.check_url(url, addresses.networks_of(settings.webhook_networks))
        except ValueError as error:
            problems.append({"field": "url", "problem": str(error)})
    if events is not None and (not events or not set(events) <= set(EVENTS)):
        problems.append({"field": "events", "problem": f"must be some of {', '.join(EVENTS)}"})
    if failed_share is not None and not 0 < failed_share <= 1:
        problems.append({"field": "failed_share", "problem": "must be above 0 and at most 1"})
    if problems:
        raise InvalidRequest("the webhook is not valid", problems)


def _found(row: RowMapping | None, webhook: UUID) -> RowMapping:
    if row is None:
        raise NotFound(f"there is no webhook {webhook}")
    return row


def _view(row: RowMapping, secret: str | None = None) -> WebhookView:
    return WebhookView(**{**row, "enabled": row["disabled_at"] is None}, secret=secret)


def _delivery(row: RowMapping) -> DeliveryView:
    state = "delivered" if row["delivered_at"] else ("failed" if row["next_at"] is None else "waiting")
    return DeliveryView(**{**row, "state": state, "message_id": message_id(row["id"])})
