"""What people and programs look at. Counts are the folded counters plus the deltas not folded yet, in one snapshot."""

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, RowMapping, bindparam, text
from sqlalchemy.dialects.postgresql import JSONB

from farm.queries.models import SEEN

_STATE = "CASE WHEN j.state = 'queued' AND s.cancelling THEN 'cancelled' ELSE j.state END"

_JOB = f"""
    SELECT j.id, j.batch_id, j.number, {_STATE} AS state, j.attempt, s.priority, j.created_at, j.run_at, j.started_at,
           j.finished_at, CAST(j.finished_xid AS text) AS xid, j.error_code, j.error_message,
           r.body, r.names, r.labels, r.warnings,
           i.key, i.thumbnail_key, i.sha256, i.bytes, i.thumbnail_bytes, i.width, i.height,
           p.original_id, p.levels, p.mean_levels, p.differing
    FROM jobs j JOIN segments s ON s.id = j.segment_id JOIN batches b ON b.id = j.batch_id AND b.deleted_at IS NULL
    JOIN recipes r ON r.job_id = j.id LEFT JOIN images i ON i.job_id = j.id LEFT JOIN replays p ON p.job_id = j.id
"""

_SUMS = """
    sum(x.running) AS running, sum(x.succeeded) AS succeeded, sum(x.failed) AS failed,
    sum(CASE WHEN s.cancelling THEN 0 ELSE x.queued END) AS queued,
    sum(x.cancelled + CASE WHEN s.cancelling THEN x.queued ELSE 0 END) AS cancelled
"""

_COUNTS = f"""
    SELECT {_SUMS} FROM (
        SELECT segment_id, queued, running, succeeded, failed, cancelled FROM counters WHERE batch_id = b.id
        UNION ALL
        SELECT segment_id, queued, running, succeeded, failed, cancelled FROM counter_deltas WHERE batch_id = b.id
    ) x JOIN segments s ON s.id = x.segment_id
"""

_BATCH = f"""
    SELECT b.id, b.name, b.total, b.priority, b.labels, b.warnings, b.stop_at_failed_share, b.stop_reason,
           b.created_at, c.*,
           EXISTS (SELECT 1 FROM segments s WHERE s.batch_id = b.id AND s.paused) AS paused,
           coalesce((SELECT sum(r.succeeded) FROM rates r WHERE r.batch_id = b.id
                     AND r.slot > clock_timestamp() - interval '70 seconds'), 0)
               / greatest(5, least(60, extract(epoch FROM clock_timestamp() - b.created_at))) AS rate
    FROM batches b CROSS JOIN LATERAL ({_COUNTS}) c
"""

_QUEUE = text(f"""
    WITH open AS (
        SELECT segment_id, sum(queued) AS queued, sum(running) AS running FROM (
            SELECT segment_id, queued, running FROM counters WHERE queued > 0 OR running > 0
            UNION ALL SELECT segment_id, queued, running FROM counter_deltas) x GROUP BY 1
    )
    SELECT s.lane, s.pool, coalesce(min(m.name), s.checkpoint) AS checkpoint,
           coalesce(sum(o.queued) FILTER (WHERE NOT s.cancelling), 0) AS depth, sum(o.running) AS running,
           extract(epoch FROM clock_timestamp() - min(s.head_run_at) FILTER (
               WHERE o.queued > 0 AND NOT s.cancelling AND s.head_run_at <= clock_timestamp())) AS age,
           coalesce(sum((SELECT sum(r.succeeded) FROM rates r WHERE r.segment_id = s.id
                         AND r.slot > clock_timestamp() - interval '70 seconds')), 0) / 60.0 AS rate
    FROM open o JOIN segments s ON s.id = o.segment_id
    LEFT JOIN LATERAL (
        SELECT m.name FROM models m WHERE m.hash = s.checkpoint AND {SEEN} ORDER BY m.name LIMIT 1) m ON true
    WHERE o.queued > 0 OR o.running > 0
    GROUP BY s.lane, s.pool, s.checkpoint ORDER BY depth DESC, s.lane LIMIT 1000
""")

# Only transactions that every later snapshot also sees are shown, so a reader's cursor never skips a late commit.
_FINISHED = text(f"""
    {_JOB}
    WHERE j.batch_id = :batch AND j.project_id = :project AND j.finished_xid IS NOT NULL
      AND j.finished_xid < pg_snapshot_xmin(pg_current_snapshot())
      AND (j.finished_xid, j.id) > (CAST(:xid AS xid8), CAST(:job AS uuid))
    ORDER BY j.finished_xid, j.id LIMIT :limit
""")


def job(conn: Connection, project: UUID, job_id: UUID) -> RowMapping | None:
    """One job of a project with its recipe and image."""
    statement = text(f"{_JOB} WHERE j.id = :id AND j.project_id = :project")
    return conn.execute(statement, {"id": job_id, "project": project}).mappings().one_or_none()


def jobs(
    conn: Connection,
    project: UUID,
    *,
    states: Sequence[str],
    labels: Mapping[str, str],
    batch: UUID | None,
    after: UUID | None,
    limit: int,
) -> Sequence[RowMapping]:
    """Jobs of a batch in order, or of the project newest first."""
    where = ["j.project_id = :project"]
    parameters: dict[str, Any] = {"project": project, "limit": limit}
    forward = batch is not None
    if batch is not None:
        where.append("j.batch_id = :batch")
        parameters["batch"] = batch
    if states:
        # The raw state lets its partial index serve; the shown state is the one that counts.
        raw = {*states, "queued"} if "cancelled" in states else set(states)
        where.append(f"j.state = ANY(:raw) AND {_STATE} = ANY(:states)")
        parameters |= {"raw": sorted(raw), "states": list(states)}
    if labels:
        where.append("r.labels @> :labels AND r.labels <> '{}'::jsonb")
        parameters["labels"] = dict(labels)
    if after is not None:
        where.append("j.id > :after" if forward else "j.id < :after")
        parameters["after"] = after
    order = "ASC" if forward else "DESC"
    statement = text(f"{_JOB} WHERE {' AND '.join(where)} ORDER BY j.id {order} LIMIT :limit")
    if labels:
        statement = statement.bindparams(bindparam("labels", type_=JSONB))
    return conn.execute(statement, parameters).mappings().all()


def batch(conn: Connection, project: UUID, batch_id: UUID) -> RowMapping | None:
    """One batch with its counts and rate."""
    statement = text(f"{_BATCH} WHERE b.id = :id AND b.project_id = :project AND b.deleted_at IS NULL")
    return conn.execute(statement, {"id": batch_id, "project": project}).mappings().one_or_none()


def batches(
    conn: Connection,
    project: UUID,
    *,
    state: str | None,
    labels: Mapping[str, str],
    after: UUID | None,
    limit: int,
) -> Sequence[RowMapping]:
    """Batches of a project, newest first. `state`: active, done or paused."""
    conditions = {
        "active": "q.queued + q.running > 0",
        "done": "q.queued + q.running = 0",
        "paused": "q.paused",
        None: "true",
    }
    inner = ["b.project_id = :project", "b.deleted_at IS NULL"]
    parameters: dict[str, Any] = {"project": project, "limit": limit}
    if after is not None:
        inner.append("b.id < :after")
        parameters["after"] = after
    if labels:
        inner.append("b.labels @> :labels")
        parameters["labels"] = dict(labels)
    candidates = f"{_BATCH} WHERE {' AND '.join(inner)} ORDER BY b.id DESC"
    statement = text(f"SELECT * FROM ({candidates}) q WHERE {conditions[state]} LIMIT :limit")
    if labels:
        statement = statement.bindparams(bindparam("labels", type_=JSONB))
    return conn.execute(statement, parameters).mappings().all()


def queue(conn: Connection, seen_by: UUID | None = None) -> Sequence[RowMapping]:
    """Depth, running, oldest age and rate of each lane with open jobs, deepest first; its checkpoint by a name that the
    project may see, else by hash."""
    return conn.execute(_QUEUE, {"seen_by": seen_by}).mappings().all()


def finished(
    conn: Connection, project: UUID, batch_id: UUID, *, xid: str, job_id: UUID, limit: int
) -> Sequence[RowMapping]:
    """Terminal jobs of a batch after (xid, job), in commit order."""
    parameters = {"batch": batch_id, "project": project, "xid": xid, "job": job_id, "limit": limit}
    return conn.execute(_FINISHED, parameters).mappings().all()


def unseen(conn: Connection, batch_id: UUID, *, xid: str, job_id: UUID) -> bool:
    """Whether a batch has terminal jobs after (xid, job), among them those that `finished` still holds back."""
    statement = text("""
        SELECT EXISTS (SELECT 1 FROM jobs WHERE batch_id = :batch AND finished_xid IS NOT NULL
                       AND (finished_xid, id) > (CAST(:xid AS xid8), CAST(:job AS uuid)))
    """)
    return bool(conn.execute(statement, {"batch": batch_id, "xid": xid, "job": job_id}).scalar_one())
