"""The tables, as the design's words say. `migrations/` holds how they came to be; a test compares the two.

Hot and narrow: `jobs` holds what the queue decides by, `recipes` beside it what a job renders. Nothing that a heartbeat
changes is indexed.
"""

import uuid
from datetime import datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    ForeignKey,
    Identity,
    Index,
    SmallInteger,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from farm import upload_models  # noqa: F401  # its tables belong to the metadata
from farm.models_catalogue import CatalogueStamp, Model, ModelFile, Registration
from farm.models_tenants import ApiKey, Project, Webhook, WebhookDelivery
from farm.schema import BY_PRIORITY, EMPTY_ARRAY, EMPTY_OBJECT, NOW, QUEUED, READY, RUNNING, Base, Xid8

SCHEMA_VERSION = "0014"
"""The Alembic revision this code was written for; a process refuses any other."""

TENANTS = (Project, ApiKey, Webhook, WebhookDelivery)
"""Tables of a file of their own: who uses the farm, and whom it tells."""

CATALOGUE = (Model, CatalogueStamp, Registration, ModelFile)
"""Likewise: which models there are, and which are on their way."""


class Batch(Base):
    """Jobs submitted together. `stop_reason` is set when the batch stopped itself, as so many had failed as
    `stop_at_failed_share` says, until somebody retries it."""

    __tablename__ = "batches"
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    project_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("projects.id"))
    name: Mapped[str]
    labels: Mapped[dict[str, Any]] = mapped_column(server_default=EMPTY_OBJECT)
    warnings: Mapped[list[str]] = mapped_column(server_default=EMPTY_ARRAY)
    total: Mapped[int] = mapped_column(BigInteger)
    priority: Mapped[int]
    stop_at_failed_share: Mapped[float | None]
    stop_reason: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    deleted_at: Mapped[datetime | None]
    __table_args__ = (
        CheckConstraint("stop_at_failed_share > 0 AND stop_at_failed_share <= 1", name="stop_at_failed_share"),
        Index(None, "project_id", "id", postgresql_where=text("deleted_at IS NULL")),
        Index("ix_batches_deleted", "id", postgresql_where=text("deleted_at IS NOT NULL")),
    )


class Segment(Base):
    """The jobs of one batch in one lane and, while these are few, with one adapter set: what scheduling, pausing,
    cancelling and reprioritising act on.

    `head_run_at, head_id` is a lower bound of its queued jobs' places: claims start looking there, so they never step
    over the dead entries of jobs already rendered. NULL means that nothing is queued. Requeueing lowers it, the sweeper
    raises it, both under the row's lock.

    `adapter_set` is NULL where the jobs differ in it. `cancelling` and `retrying` ask the sweeper to turn the remaining
    rows over in pieces. `stopping` beside `cancelling` lets those that run finish: the batch stopped itself.
    """

    __tablename__ = "segments"
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    batch_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("batches.id"), index=True)
    project_id: Mapped[uuid.UUID]
    pool: Mapped[str]
    lane: Mapped[str]
    checkpoint: Mapped[str]
    adapter_set: Mapped[str | None]
    priority: Mapped[int]
    paused: Mapped[bool] = mapped_column(server_default=text("false"))
    cancelling: Mapped[bool] = mapped_column(server_default=text("false"))
    stopping: Mapped[bool] = mapped_column(server_default=text("false"))
    retrying: Mapped[bool] = mapped_column(server_default=text("false"))
    head_run_at: Mapped[datetime | None]
    head_id: Mapped[uuid.UUID | None]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    __table_args__ = (
        Index("ix_segments_ready", "pool", BY_PRIORITY, "head_run_at", "id", postgresql_where=READY),
        Index("ix_segments_lane", "pool", "lane", BY_PRIORITY, "head_run_at", postgresql_where=READY),
        Index("ix_segments_set", "pool", "lane", "adapter_set", BY_PRIORITY, "head_run_at", postgresql_where=READY),
        Index("ix_segments_project", "pool", "priority", "project_id", "head_run_at", "id", postgresql_where=READY),
        Index("ix_segments_turning", "id", postgresql_where=text("cancelling OR retrying")),
    )


class Job(Base):
    """One request for one image: the unit of state, claim and retry.

    `attempt` rises at every claim and is never used again. `alone` asks for a claim without neighbours, after a crash.
    `finished_xid` orders terminal jobs by commit for the event stream.
    """

    __tablename__ = "jobs"
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    segment_id: Mapped[uuid.UUID]
    batch_id: Mapped[uuid.UUID]
    project_id: Mapped[uuid.UUID]
    number: Mapped[int]
    state: Mapped[str]
    adapter_set: Mapped[str]
    run_at: Mapped[datetime]
    created_at: Mapped[datetime]
    attempt: Mapped[int] = mapped_column(server_default=text("0"))
    failures: Mapped[int] = mapped_column(SmallInteger, server_default=text("0"))
    crashes: Mapped[int] = mapped_column(SmallInteger, server_default=text("0"))
    alone: Mapped[bool] = mapped_column(server_default=text("false"))
    cancel_requested_at: Mapped[datetime | None]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    finished_xid: Mapped[str | None] = mapped_column(Xid8())
    error_code: Mapped[str | None]
    error_message: Mapped[str | None]
    __table_args__ = (
        CheckConstraint("state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')", name="state"),
        CheckConstraint(
            "(finished_at IS NOT NULL) = (state IN ('succeeded', 'failed', 'cancelled'))", name="finished_iff_terminal"
        ),
        CheckConstraint("(finished_at IS NULL) = (finished_xid IS NULL)", name="finished_in_a_transaction"),
        Index("ix_jobs_queue", "segment_id", "run_at", "id", postgresql_where=QUEUED),
        Index("ix_jobs_queue_set", "segment_id", "adapter_set", "run_at", "id", postgresql_where=QUEUED),
        Index("ix_jobs_running", "segment_id", "id", postgresql_where=RUNNING),
        Index("ix_jobs_failed", "project_id", "id", postgresql_where=text("state = 'failed'")),
        Index("ix_jobs_finished", "batch_id", "finished_xid", "id", postgresql_where=text("finished_xid IS NOT NULL")),
        Index(None, "batch_id", "id"),
        Index(None, "project_id", "id"),
    )


class RecipeRow(Base):
    """What a job renders, beside the job so that the queue stays narrow. `names` are the names it was asked by."""

    __tablename__ = "recipes"
    job_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    hash: Mapped[bytes]
    body: Mapped[dict[str, Any]]
    names: Mapped[dict[str, Any]]
    labels: Mapped[dict[str, Any]]
    warnings: Mapped[list[str]] = mapped_column(server_default=EMPTY_ARRAY)
    metadata_wanted: Mapped[bool] = mapped_column(server_default=text("true"))
    __table_args__ = (
        Index(
            "ix_recipes_labels",
            "labels",
            postgresql_using="gin",
            postgresql_ops={"labels": "jsonb_path_ops"},
            postgresql_where=text("labels <> '{}'::jsonb"),
        ),
    )


class Claim(Base):
    """One micro-batch taken by one worker. The id is made by the worker, so a claim whose answer was lost is known."""

    __tablename__ = "claims"
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    worker_id: Mapped[uuid.UUID]
    lease_until: Mapped[datetime]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    closed_at: Mapped[datetime | None]
    __table_args__ = (
        Index("ix_claims_open", "worker_id", "id", postgresql_where=text("closed_at IS NULL")),
        {"postgresql_with": {"fillfactor": "70"}},
    )


class Attempt(Base):
    """One numbered try at a job inside a claim. A lost attempt that uploaded keeps its keys here for the sweeper."""

    __tablename__ = "attempts"
    job_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    claim_id: Mapped[uuid.UUID] = mapped_column(index=True)
    outcome: Mapped[str | None]
    error_code: Mapped[str | None]
    error_message: Mapped[str | None]
    started_at: Mapped[datetime] = mapped_column(server_default=NOW)
    finished_at: Mapped[datetime | None]
    __table_args__ = (CheckConstraint("(outcome IS NULL) = (finished_at IS NULL)", name="finished_with_outcome"),)


class Image(Base):
    """The stored picture of a job: exactly one row for each job that succeeded."""

    __tablename__ = "images"
    job_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    key: Mapped[str]
    thumbnail_key: Mapped[str]
    sha256: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)
    thumbnail_bytes: Mapped[int] = mapped_column(BigInteger)
    width: Mapped[int]
    height: Mapped[int]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)


class Replay(Base):
    """A job that renders another one's recipe again: the original, the key of its picture, and how far the two are
    apart, once compared: `levels` of 255 at most and on average, and the share of pixels that differ at all."""

    __tablename__ = "replays"
    job_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    original_id: Mapped[uuid.UUID]
    key: Mapped[str]
    levels: Mapped[int | None] = mapped_column(SmallInteger)
    mean_levels: Mapped[float | None]
    differing: Mapped[float | None]
    __table_args__ = (CheckConstraint("num_nulls(levels, mean_levels, differing) IN (0, 3)", name="compared_or_not"),)


class Worker(Base):
    """A worker process, what it keeps warm, how well its cache serves (`cache`), and which pipelines it leaves to
    others for a while (`resting`). `name` stays the same after a restart; NULL where host and device tell enough."""

    __tablename__ = "workers"
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    pool: Mapped[str]
    name: Mapped[str | None]
    host: Mapped[str]
    pid: Mapped[int]
    device: Mapped[str]
    version: Mapped[str]
    state: Mapped[str]
    warm: Mapped[list[dict[str, Any]]] = mapped_column(JSONB, server_default=text("'[]'::jsonb"))
    cache: Mapped[dict[str, Any]] = mapped_column(server_default=EMPTY_OBJECT)
    resting: Mapped[list[dict[str, Any]]] = mapped_column(JSONB, server_default=text("'[]'::jsonb"))
    started_at: Mapped[datetime] = mapped_column(server_default=NOW)
    heartbeat_at: Mapped[datetime] = mapped_column(server_default=NOW)
    left_at: Mapped[datetime | None]
    __table_args__ = ({"postgresql_with": {"fillfactor": "70"}},)


class Counter(Base):
    """Jobs of a segment by state, as of the last fold; the deltas not folded yet stand in `counter_deltas`."""

    __tablename__ = "counters"
    segment_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    batch_id: Mapped[uuid.UUID] = mapped_column(index=True)
    queued: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    running: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    succeeded: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    failed: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    cancelled: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    __table_args__ = (
        Index("ix_counters_open", "segment_id", postgresql_where=text("queued > 0 OR running > 0")),
        {"postgresql_with": {"fillfactor": "50"}},
    )


class CounterDelta(Base):
    """One change of a segment's counts: appended by whoever moved jobs, folded by the sweeper. Never updated."""

    __tablename__ = "counter_deltas"
    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    segment_id: Mapped[uuid.UUID] = mapped_column(index=True)
    batch_id: Mapped[uuid.UUID] = mapped_column(index=True)
    project_id: Mapped[uuid.UUID]
    queued: Mapped[int] = mapped_column(server_default=text("0"))
    running: Mapped[int] = mapped_column(server_default=text("0"))
    succeeded: Mapped[int] = mapped_column(server_default=text("0"))
    failed: Mapped[int] = mapped_column(server_default=text("0"))
    cancelled: Mapped[int] = mapped_column(server_default=text("0"))


class Rate(Base):
    """Images of a segment finished within one ten-second slot: what images per second are read from."""

    __tablename__ = "rates"
    slot: Mapped[datetime] = mapped_column(primary_key=True)
    segment_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    batch_id: Mapped[uuid.UUID]
    succeeded: Mapped[int] = mapped_column(BigInteger)


class DoomedObject(Base):
    """An object in S3 that nothing refers to any more: its key, and when it may be deleted.

    A key that ends in `-` stands for whatever a crashed attempt left below that prefix.
    """

    __tablename__ = "doomed_objects"
    key: Mapped[str] = mapped_column(primary_key=True)
    delete_after: Mapped[datetime] = mapped_column(index=True)


class IdempotentAnswer(Base):
    """The answer to a request that carried an Idempotency-Key, written in the transaction that stored the batch."""

    __tablename__ = "idempotency"
    project_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    request_hash: Mapped[bytes]
    status: Mapped[int] = mapped_column(SmallInteger)
    body: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW, index=True)
