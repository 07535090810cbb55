"""The sweeper's statements."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from sqlalchemy import Connection, RowMapping, text

from farm.scheduling import FAIR_SHARE_HALF_LIFE

_HALF_LIFE = FAIR_SHARE_HALF_LIFE.total_seconds()

_FOLD = text(f"""
    WITH gone AS (
        DELETE FROM counter_deltas WHERE id IN (
            SELECT id FROM counter_deltas ORDER BY id LIMIT :limit FOR UPDATE SKIP LOCKED)
        RETURNING segment_id, batch_id, project_id, queued, running, succeeded, failed, cancelled
    ), sums AS (
        SELECT segment_id, batch_id, sum(queued) AS queued, sum(running) AS running, sum(succeeded) AS succeeded,
               sum(failed) AS failed, sum(cancelled) AS cancelled FROM gone GROUP BY 1, 2
    ), folded AS (
        INSERT INTO counters AS c (segment_id, batch_id, queued, running, succeeded, failed, cancelled)
        SELECT segment_id, batch_id, queued, running, succeeded, failed, cancelled FROM sums
        ON CONFLICT (segment_id) DO UPDATE SET queued = c.queued + excluded.queued,
            running = c.running + excluded.running, succeeded = c.succeeded + excluded.succeeded,
            failed = c.failed + excluded.failed, cancelled = c.cancelled + excluded.cancelled
    ), rated AS (
        INSERT INTO rates AS r (slot, segment_id, batch_id, succeeded)
        SELECT date_bin('10 seconds', clock_timestamp(), 'epoch'), segment_id, batch_id, succeeded
        FROM sums WHERE succeeded > 0
        ON CONFLICT (slot, segment_id) DO UPDATE SET succeeded = r.succeeded + excluded.succeeded
    ), served AS (
        SELECT project_id, coalesce(sum(running) FILTER (WHERE running > 0), 0) AS claimed,
               sum(queued) AS queued, sum(running) AS running FROM gone GROUP BY 1
    ), shares AS (
        UPDATE projects p SET queued = p.queued + served.queued, running = p.running + served.running,
            served_at = clock_timestamp(), served = served.claimed
            + p.served * exp(-extract(epoch FROM clock_timestamp() - p.served_at) * ln(2) / {_HALF_LIFE})
        FROM served WHERE p.id = served.project_id
    )
    SELECT count(*) AS deltas, coalesce(array_agg(DISTINCT batch_id)
        FILTER (WHERE succeeded > 0 OR failed > 0 OR cancelled > 0), '{{}}') AS ended FROM gone
""")

_BACKLOG = text("""
    SELECT s.pool, sum(x.queued) AS queued, coalesce(max(w.slots), 0) AS slots FROM (
        SELECT segment_id, queued FROM counters WHERE queued > 0 OR running > 0
        UNION ALL SELECT segment_id, queued FROM counter_deltas) x
    JOIN segments s ON s.id = x.segment_id
    LEFT JOIN LATERAL (
        SELECT 2 * count(*) AS slots FROM workers
        WHERE pool = s.pool AND left_at IS NULL AND heartbeat_at > clock_timestamp() - interval '30 seconds') w ON true
    WHERE NOT s.paused AND NOT s.cancelling AND s.head_run_at <= clock_timestamp()
    GROUP BY s.pool HAVING sum(x.queued) > 0
""")

_DUE = text("DELETE FROM doomed_objects WHERE key = ANY(:keys)")


def try_duty(conn: Connection, duty: int) -> bool:
    """Hold a duty until the transaction ends; False when another sweeper does it right now."""
    held: bool = conn.execute(
        text("SELECT pg_try_advisory_xact_lock(:space, :duty)"), {"space": 7261, "duty": duty}
    ).scalar_one()
    return held


@dataclass(frozen=True, slots=True)
class Folded:
    """How many deltas were folded, and the batches of which jobs became terminal by them."""

    deltas: int
    ended: list[UUID]


def fold(conn: Connection, limit: int) -> Folded:
    """Add up to `limit` deltas to the counters, rates and fair shares."""
    return Folded(**conn.execute(_FOLD, {"limit": limit}).mappings().one())


def backlog(conn: Connection) -> Sequence[RowMapping]:
    """Claimable jobs and worker slots of each pool with work."""
    return conn.execute(_BACKLOG).mappings().all()


def segments_to_settle(conn: Connection, after: UUID, limit: int) -> list[UUID]:
    """Segments with a head, a page at a time."""
    statement = text("""
        SELECT id FROM segments WHERE head_run_at <= clock_timestamp() AND id > :after AND NOT cancelling
        ORDER BY id LIMIT :limit
    """)
    return list(conn.execute(statement, {"after": after, "limit": limit}).scalars())


def due_objects(conn: Connection, limit: int) -> list[str]:
    """Keys that may be deleted now, held until the transaction ends: whoever wants to keep one waits for that."""
    statement = text("""
        SELECT key FROM doomed_objects WHERE delete_after < clock_timestamp() ORDER BY delete_after LIMIT :limit
        FOR UPDATE
    """)
    return list(conn.execute(statement, {"limit": limit}).scalars())


def needed_objects(conn: Connection, keys: Collection[str]) -> set[str]:
    """Those of these keys that a model or an upload refers to: it came back while its objects were to be deleted."""
    statement = text("""
        SELECT key FROM model_files WHERE key = ANY(:keys) UNION SELECT key FROM uploads WHERE key = ANY(:keys)
    """)
    return set(conn.execute(statement, {"keys": list(keys)}).scalars())


def forget_objects(conn: Connection, keys: Collection[str]) -> None:
    """These objects are gone."""
    conn.execute(_DUE, {"keys": list(keys)})


def prune(conn: Connection, idempotency_ttl: timedelta) -> None:
    """Forget old answers, old rates and closed claims without attempts to show."""
    conn.execute(
        text("DELETE FROM idempotency WHERE created_at < clock_timestamp() - CAST(:ttl AS interval)"),
        {"ttl": idempotency_ttl},
    )
    conn.execute(text("DELETE FROM rates WHERE slot < clock_timestamp() - interval '10 minutes'"))
    conn.execute(text("DELETE FROM claims WHERE closed_at < clock_timestamp() - interval '1 day'"))
