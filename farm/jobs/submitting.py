"""Accepting work: once the caller commits, nothing of it is ever lost."""

from dataclasses import dataclass
from typing import Any
from uuid import UUID

from psycopg.errors import ForeignKeyViolation
from sqlalchemy import Connection

from farm import limits
from farm.errors import Conflict, IdempotencyMismatch, InFlight
from farm.jobs.reading import get_batch
from farm.queries import submitting as rows
from farm.queries.uploads import COPY
from farm.settings import Settings
from farm.submission import PROJECT, Prepared
from farm.views import BatchView


@dataclass(frozen=True, slots=True)
class Answer:
    """A stored answer: HTTP status and decoded JSON body."""

    status: int
    body: dict[str, Any]


def submit(conn: Connection, prepared: Prepared, *, project_id: UUID, pool: str) -> BatchView:
    """Store a checked submission as one batch. All or nothing: it exists once the caller's transaction commits.

    Raises LimitReached when the project may not queue so much now, TooLarge when it never may, Conflict when an upload
    that it names was deleted since it was checked.
    """
    rows.insert_batch(
        conn,
        id=prepared.batch_id,
        project_id=project_id,
        name=prepared.name,
        labels=prepared.labels,
        warnings=prepared.warning_texts()[:100],
        total=prepared.jobs,
        priority=prepared.priority,
        stop_at_failed_share=prepared.stop_at_failed_share,
    )
    rows.insert_segments(
        conn, batch=prepared.batch_id, project=project_id, pool=pool, segments=list(prepared.segments.values())
    )
    rows.copy(conn, rows.JOBS, prepared.job_rows, replacing=(PROJECT, str(project_id).encode()))
    rows.copy(conn, rows.RECIPES, prepared.recipe_rows)
    try:
        rows.copy(conn, COPY, prepared.upload_rows, replacing=(PROJECT, str(project_id).encode()))
    except ForeignKeyViolation as error:
        raise Conflict("an upload that this submission names was deleted meanwhile; send it again") from error
    limits.hold(conn, project_id, pixel_steps=prepared.pixel_steps, asked=prepared.jobs)
    return get_batch(conn, project_id, prepared.batch_id)


def idempotent(conn: Connection, project_id: UUID, key: str, request_hash: bytes, settings: Settings) -> Answer | None:
    """The answer given before under this Idempotency-Key, or None: then the key is held until the transaction ends.

    Raises InFlight when a twin holds the key, IdempotencyMismatch when the key stands for another request.
    """
    if not rows.try_lock(conn, project_id, key):
        raise InFlight
    row = rows.answer(conn, project_id, key, settings.idempotency_ttl)
    if row is None:
        return None
    if bytes(row["request_hash"]) != request_hash:
        raise IdempotencyMismatch
    return Answer(row["status"], row["body"])


def remember(
    conn: Connection, project_id: UUID, key: str, request_hash: bytes, status: int, body: dict[str, Any]
) -> None:
    """Keep the answer under its Idempotency-Key, in the transaction that stored the batch."""
    rows.store_answer(conn, project_id, key, request_hash, status, body)
