"""The tables of tenants: projects, their keys, and their webhooks. `farm.models` has all tables."""

import uuid
from datetime import date, datetime
from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Index, SmallInteger, text
from sqlalchemy.orm import Mapped, mapped_column

from farm.schema import NOW, Base


class Project(Base):
    """The tenant. `served` counts jobs claimed lately (it halves every two minutes); fair share reads it.

    `queued` and `running` are its open jobs as of the last fold. Limits are NULL where there is none;
    `spent_pixel_steps` is what was accepted on the day `spent_on` (UTC), counted while there is a limit of it.
    """

    __tablename__ = "projects"
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    served: Mapped[float] = mapped_column(server_default=text("0"))
    served_at: Mapped[datetime] = mapped_column(server_default=NOW)
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    queued: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    running: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    max_queued_jobs: Mapped[int | None] = mapped_column(BigInteger)
    max_running_jobs: Mapped[int | None] = mapped_column(BigInteger)
    max_pixel_steps_per_day: Mapped[int | None] = mapped_column(BigInteger)
    max_requests_per_second: Mapped[int | None] = mapped_column(BigInteger)
    max_upload_bytes: Mapped[int | None] = mapped_column(BigInteger)
    spent_on: Mapped[date | None]
    spent_pixel_steps: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    __table_args__ = (Index("ix_projects_running_limit", "id", postgresql_where=text("max_running_jobs IS NOT NULL")),)


class ApiKey(Base):
    """How a project proves who it is: sha256 of 256 random bits; `prefix` is the part that may be shown."""

    __tablename__ = "api_keys"
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    project_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("projects.id"))
    name: Mapped[str]
    prefix: Mapped[str] = mapped_column(index=True)
    digest: Mapped[bytes]
    scopes: Mapped[list[str]]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]


class Webhook(Base):
    """Whom a project wants told of what. Deliveries are signed with `secret`, and until `previous_until` with
    `previous_secret` as well. Nothing is told while `disabled_at` is set."""

    __tablename__ = "webhooks"
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    project_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("projects.id"), index=True)
    url: Mapped[str]
    events: Mapped[list[str]]
    failed_share: Mapped[float]
    secret: Mapped[str]
    previous_secret: Mapped[str | None]
    previous_until: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    disabled_at: Mapped[datetime | None]
    disabled_reason: Mapped[str | None]
    __table_args__ = (CheckConstraint("failed_share > 0 AND failed_share <= 1", name="failed_share"),)


class WebhookDelivery(Base):
    """One message to one webhook, written in the transaction of what it tells; its id is the message's.

    `next_at` is the next try, or while one is under way the moment it counts as lost; NULL once it ended.
    """

    __tablename__ = "webhook_deliveries"
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    webhook_id: Mapped[uuid.UUID]
    event: Mapped[str]
    batch_id: Mapped[uuid.UUID | None]
    body: Mapped[dict[str, Any]]
    attempts: Mapped[int] = mapped_column(SmallInteger, server_default=text("0"))
    next_at: Mapped[datetime | None] = mapped_column(server_default=NOW)
    last_status: Mapped[int | None] = mapped_column(SmallInteger)
    last_error: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    delivered_at: Mapped[datetime | None]
    __table_args__ = (
        CheckConstraint("next_at IS NULL OR delivered_at IS NULL", name="delivered_once"),
        Index(None, "webhook_id", "id"),
        Index("ix_webhook_deliveries_due", "webhook_id", "next_at", postgresql_where=text("next_at IS NOT NULL")),
        Index(
            "uq_webhook_deliveries_failed_share",
            "webhook_id",
            "batch_id",
            unique=True,
            postgresql_where=text("event = 'batch.failed_share'"),
        ),
    )
