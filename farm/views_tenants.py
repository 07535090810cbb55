"""What the farm answers about projects and their webhooks; `farm.views` has all other shapes."""

from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from pydantic import Field

from farm.views import View


class LimitsView(View):
    """What a project may have at most; null where there is no limit. Pixel steps are width x height x steps, summed
    over the jobs accepted on one day (UTC); each frame of an animation counts."""

    queued_jobs: int | None = None
    running_jobs: int | None = None
    pixel_steps_per_day: int | None = None
    requests_per_second: int | None = None
    upload_bytes: int | None = None


class UseView(View):
    """What a project has now. Pixel steps are counted while there is a limit of them."""

    queued_jobs: int
    running_jobs: int
    pixel_steps_today: int
    upload_bytes: int = 0


class ProjectView(View):
    """A tenant with its limits and its use of them."""

    id: UUID
    name: str
    limits: LimitsView
    use: UseView
    created_at: datetime


class WebhookView(View):
    """Whom a project wants told of what. `secret` is set in the answers that make it or a new one; until
    `previous_until` messages are signed with the secret before as well."""

    id: UUID
    url: str
    events: list[str]
    failed_share: float
    enabled: bool
    disabled_reason: str | None = None
    created_at: datetime
    previous_until: datetime | None = None
    secret: str | None = Field(default=None, description="Shown once, when it is made.")


class DeliveryView(View):
    """One message to a webhook. `message_id` is its `webhook-id`, the same at every try; `last_status` the HTTP status
    of the last answer, `last_error` why that try did not count; `next_at` when the next is due."""

    id: UUID
    message_id: str
    webhook_id: UUID
    event: str
    state: Literal["waiting", "delivered", "failed"]
    attempts: int
    next_at: datetime | None = None
    last_status: int | None = None
    last_error: str | None = None
    created_at: datetime
    delivered_at: datetime | None = None
    body: dict[str, Any]
