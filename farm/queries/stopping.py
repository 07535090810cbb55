"""Batches that stop themselves: what to judge them by, and stopping them."""

from collections.abc import Collection, Sequence
from uuid import UUID

from sqlalchemy import Connection, RowMapping, text

_NAME = "hashtextextended('stop/' || CAST(:batch AS text), 0)"

# With what is not folded yet: a retry that was committed before counts, however long the fold takes to come to it.
# While a retry goes on in the background, old failures still count beside its new jobs: that is no time to judge.
_JUDGED = text("""
    SELECT b.id, b.total, b.stop_at_failed_share, c.* FROM batches b CROSS JOIN LATERAL (
        SELECT coalesce(sum(queued + running), 0) AS open, coalesce(sum(succeeded), 0) AS succeeded,
               coalesce(sum(failed), 0) AS failed
        FROM (SELECT queued, running, succeeded, failed FROM counters WHERE batch_id = b.id
              UNION ALL
              SELECT queued, running, succeeded, failed FROM counter_deltas WHERE batch_id = b.id) x) c
    WHERE b.id = ANY(:ids) AND b.stop_at_failed_share IS NOT NULL AND b.stop_reason IS NULL AND b.deleted_at IS NULL
      AND NOT EXISTS (SELECT 1 FROM segments s WHERE s.batch_id = b.id AND (s.cancelling OR s.retrying))
    ORDER BY b.id
""")

_STOP_SEGMENTS = text("""
    UPDATE segments SET cancelling = true, stopping = true, retrying = false WHERE id IN (
        SELECT id FROM segments WHERE batch_id = :batch ORDER BY id FOR UPDATE)
""")


def hold(conn: Connection, batch: UUID) -> None:
    """Let nobody stop this batch until the transaction ends; waits for whoever does so now."""
    conn.execute(text(f"SELECT pg_advisory_xact_lock({_NAME})"), {"batch": batch})


def try_hold(conn: Connection, batch: UUID) -> bool:
    """As `hold`; False where somebody else holds it."""
    held: bool = conn.execute(text(f"SELECT pg_try_advisory_xact_lock({_NAME})"), {"batch": batch}).scalar_one()
    return held


def judged(conn: Connection, batches: Collection[UUID]) -> Sequence[RowMapping]:
    """Those of these batches that may stop themselves and have not: share, total, open, succeeded and failed jobs."""
    return conn.execute(_JUDGED, {"ids": list(batches)}).mappings().all()


def stop(conn: Connection, batch: UUID, reason: str) -> None:
    """From now on none of its queued jobs is claimable; those that run finish."""
    conn.execute(_STOP_SEGMENTS, {"batch": batch})
    conn.execute(text("UPDATE batches SET stop_reason = :reason WHERE id = :batch"), {"batch": batch, "reason": reason})


def forget(conn: Connection, batch: UUID) -> None:
    """A batch that was retried may stop itself again."""
    statement = text("UPDATE batches SET stop_reason = NULL WHERE id = :batch AND stop_reason IS NOT NULL")
    conn.execute(statement, {"batch": batch})
