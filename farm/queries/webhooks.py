"""Webhooks: whom to tell, what was told, and what is due."""

from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, RowMapping, bindparam, text
from sqlalchemy.dialects.postgresql import JSONB

_WEBHOOK = "id, project_id, url, events, failed_share, created_at, disabled_at, disabled_reason, previous_until"

_MESSAGE = "id, webhook_id, event, body, attempts, next_at, last_status, last_error, created_at, delivered_at"

_INSERT = text(f"""
    INSERT INTO webhooks (id, project_id, url, events, failed_share, secret)
    VALUES (:id, :project, :url, :events, :failed_share, :secret) RETURNING {_WEBHOOK}
""")

_ROTATE = text(f"""
    UPDATE webhooks SET secret = :secret, previous_secret = secret, previous_until = clock_timestamp() + :overlap
    WHERE id = :id AND project_id = :project RETURNING {_WEBHOOK}
""")

_CHANGE = text(f"""
    UPDATE webhooks SET url = coalesce(:url, url), events = coalesce(CAST(:events AS text[]), events),
        failed_share = coalesce(:failed_share, failed_share),
        disabled_at = CASE CAST(:enabled AS bool) WHEN true THEN NULL
            WHEN false THEN coalesce(disabled_at, clock_timestamp()) ELSE disabled_at END,
        disabled_reason = CASE CAST(:enabled AS bool) WHEN true THEN NULL
            WHEN false THEN coalesce(disabled_reason, :reason) ELSE disabled_reason END
    WHERE id = :id AND (CAST(:project AS uuid) IS NULL OR project_id = :project) RETURNING {_WEBHOOK}
""")

# Whatever is still to be told to a webhook that is switched off.
_DROP = text("""
    UPDATE webhook_deliveries SET next_at = NULL, last_error = 'the webhook was disabled'
    WHERE webhook_id = :id AND next_at IS NOT NULL
""")

_TELL = text("""
    INSERT INTO webhook_deliveries (id, webhook_id, event, batch_id, body)
    VALUES (:id, :webhook, :event, :batch, :body)
    ON CONFLICT (webhook_id, batch_id) WHERE event = 'batch.failed_share' DO NOTHING
""").bindparams(bindparam("body", type_=JSONB))

_JOBS_TO_TELL = text("""
    SELECT w.id AS webhook, j.id, j.batch_id, j.number, j.attempt, j.error_code, j.error_message, r.labels
    FROM jobs j JOIN webhooks w ON w.project_id = j.project_id AND w.disabled_at IS NULL
        AND 'job.failed' = ANY(w.events)
    JOIN batches b ON b.id = j.batch_id AND b.deleted_at IS NULL JOIN recipes r ON r.job_id = j.id
    WHERE j.id = ANY(:ids) ORDER BY j.id
""")

_BATCHES_TO_TELL = text("""
    SELECT w.id AS webhook, w.events, w.failed_share, b.id, b.name, b.labels, b.total, b.stop_reason, c.*
    FROM batches b JOIN webhooks w ON w.project_id = b.project_id AND w.disabled_at IS NULL
        AND w.events && ARRAY['batch.finished', 'batch.failed_share', 'batch.stopped']
    CROSS JOIN LATERAL (
        SELECT sum(queued) AS queued, sum(running) AS running, sum(succeeded) AS succeeded, sum(failed) AS failed,
               sum(cancelled) AS cancelled FROM counters WHERE batch_id = b.id) c
    WHERE b.id = ANY(:ids) AND b.deleted_at IS NULL ORDER BY b.id
""")

# In random order: where there are more than one process may serve at once, none of them always comes last.
_DUE = text("""
    SELECT w.id, w.project_id FROM webhooks w
    WHERE w.disabled_at IS NULL AND w.id <> ALL(:busy) AND w.project_id <> ALL(:full) AND EXISTS (
        SELECT 1 FROM webhook_deliveries d WHERE d.webhook_id = w.id AND d.next_at <= clock_timestamp())
    ORDER BY random() LIMIT :limit
""")

_TAKE = text("""
    WITH due AS (
        SELECT id FROM webhook_deliveries WHERE webhook_id = :webhook AND next_at <= clock_timestamp()
        ORDER BY next_at LIMIT :limit FOR UPDATE SKIP LOCKED
    ), taken AS (
        UPDATE webhook_deliveries d SET attempts = d.attempts + 1, next_at = clock_timestamp() + :lease
        FROM due WHERE d.id = due.id RETURNING d.id, d.webhook_id, d.event, d.body, d.attempts
    )
    SELECT taken.*, w.url, w.secret,
           CASE WHEN w.previous_until > clock_timestamp() THEN w.previous_secret END AS previous
    FROM taken JOIN webhooks w ON w.id = taken.webhook_id AND w.disabled_at IS NULL
""")

_RECORD = text("""
    UPDATE webhook_deliveries SET last_status = :status, last_error = :error,
        next_at = clock_timestamp() + CAST(:pause AS interval),
        delivered_at = CASE WHEN :delivered THEN clock_timestamp() END
    WHERE id = :id AND attempts = :attempt AND next_at IS NOT NULL
""")


def count(conn: Connection, project: UUID) -> int:
    """Webhooks of a project, which is locked against further ones until the transaction ends."""
    conn.execute(text("SELECT id FROM projects WHERE id = :project FOR NO KEY UPDATE"), {"project": project})
    statement = text("SELECT count(*) FROM webhooks WHERE project_id = :project")
    found: int = conn.execute(statement, {"project": project}).scalar_one()
    return found


def insert(conn: Connection, **webhook: Any) -> RowMapping:
    """Store a webhook: id, project, url, events, failed_share, secret."""
    return conn.execute(_INSERT, webhook).mappings().one()


def get(conn: Connection, project: UUID, webhook: UUID) -> RowMapping | None:
    """One webhook of a project."""
    statement = text(f"SELECT {_WEBHOOK} FROM webhooks WHERE id = :id AND project_id = :project")
    return conn.execute(statement, {"id": webhook, "project": project}).mappings().one_or_none()


def every(conn: Connection, project: UUID) -> Sequence[RowMapping]:
    """All webhooks of a project."""
    statement = text(f"SELECT {_WEBHOOK} FROM webhooks WHERE project_id = :project ORDER BY id")
    return conn.execute(statement, {"project": project}).mappings().all()


def change(
    conn: Connection,
    webhook: UUID,
    *,
    project: UUID | None,
    url: str | None = None,
    events: Sequence[str] | None = None,
    failed_share: float | None = None,
    enabled: bool | None = None,
    reason: str = "switched off",
) -> RowMapping | None:
    """Change what is not None. Whoever is switched off hears nothing of what was still to be told."""
    parameters = {
        "id": webhook, "project": project, "url": url, "failed_share": failed_share, "enabled": enabled,
        "events": None if events is None else list(events), "reason": reason,
    }  # fmt: skip
    row = conn.execute(_CHANGE, parameters).mappings().one_or_none()
    if row is not None and enabled is False:
        conn.execute(_DROP, {"id": webhook})
    return row


def rotate(conn: Connection, project: UUID, webhook: UUID, secret: str, overlap: timedelta) -> RowMapping | None:
    """Sign with another secret, and with the one before until `overlap` has passed."""
    parameters = {"id": webhook, "project": project, "secret": secret, "overlap": overlap}
    return conn.execute(_ROTATE, parameters).mappings().one_or_none()


def delete(conn: Connection, project: UUID, webhook: UUID) -> bool:
    """Remove a webhook and all it was told; answers whether there was one."""
    statement = text("DELETE FROM webhooks WHERE id = :id AND project_id = :project")
    gone = conn.execute(statement, {"id": webhook, "project": project}).rowcount > 0
    if gone:
        conn.execute(text("DELETE FROM webhook_deliveries WHERE webhook_id = :id"), {"id": webhook})
    return gone


def deliveries(conn: Connection, webhook: UUID, *, before: UUID | None, limit: int) -> Sequence[RowMapping]:
    """Messages to a webhook, newest first."""
    statement = text(f"""
        SELECT {_MESSAGE} FROM webhook_deliveries
        WHERE webhook_id = :webhook AND (CAST(:before AS uuid) IS NULL OR id < :before) ORDER BY id DESC LIMIT :limit
    """)
    return conn.execute(statement, {"webhook": webhook, "before": before, "limit": limit}).mappings().all()


def delivery(conn: Connection, message: UUID) -> RowMapping:
    """One message that is there."""
    statement = text(f"SELECT {_MESSAGE} FROM webhook_deliveries WHERE id = :id")
    return conn.execute(statement, {"id": message}).mappings().one()


def tell(conn: Connection, messages: Sequence[dict[str, Any]]) -> None:
    """Write messages to be delivered: id, webhook, event, batch, body. A batch's failed share is told once."""
    if messages:
        conn.execute(_TELL, messages)


def jobs_to_tell(conn: Connection, ids: Collection[UUID]) -> Sequence[RowMapping]:
    """These jobs, once for each webhook that wants to know of failed jobs."""
    return conn.execute(_JOBS_TO_TELL, {"ids": list(ids)}).mappings().all()


def batches_to_tell(conn: Connection, ids: Collection[UUID]) -> Sequence[RowMapping]:
    """These batches with their folded counts, once for each webhook that wants to know of batches."""
    return conn.execute(_BATCHES_TO_TELL, {"ids": list(ids)}).mappings().all()


def due(conn: Connection, *, busy: Collection[UUID], full: Collection[UUID], limit: int) -> Sequence[RowMapping]:
    """Webhooks with something to tell now, but for those that are `busy` and those of projects that are `full`."""
    return conn.execute(_DUE, {"busy": list(busy), "full": list(full), "limit": limit}).mappings().all()


def take(conn: Connection, webhook: UUID, *, limit: int, lease: timedelta) -> Sequence[RowMapping]:
    """Begin a try at up to `limit` messages; whoever does not come back within `lease` is not waited for."""
    return conn.execute(_TAKE, {"webhook": webhook, "limit": limit, "lease": lease}).mappings().all()


def record(
    conn: Connection, message: UUID, attempt: int, *, status: int | None, error: str | None, pause: timedelta | None
) -> None:
    """How a try ended: delivered without an error, else to be tried again after a pause, or never without one."""
    parameters = {
        "id": message, "attempt": attempt, "status": status, "error": error, "pause": pause, "delivered": error is None,
    }  # fmt: skip
    conn.execute(_RECORD, parameters)


def prune(conn: Connection, kept: timedelta, now: datetime | None = None) -> None:
    """Forget messages that ended long ago, and those of webhooks that are gone."""
    statement = text("""
        DELETE FROM webhook_deliveries WHERE created_at < coalesce(:now, clock_timestamp()) - CAST(:kept AS interval)
    """)
    conn.execute(statement, {"kept": kept, "now": now})
