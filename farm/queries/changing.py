"""What people change: one UPDATE over segments for a whole batch, rows turned over in pieces behind it."""

from collections.abc import Collection, Sequence
from datetime import timedelta
from uuid import UUID

from sqlalchemy import Connection, RowMapping, text

_LOCK = text("""
    SELECT j.id, j.state, j.segment_id, j.batch_id, j.project_id, j.run_at, s.cancelling
    FROM jobs j JOIN segments s ON s.id = j.segment_id JOIN batches b ON b.id = j.batch_id AND b.deleted_at IS NULL
    WHERE j.id = :id AND j.project_id = :project FOR UPDATE OF j
""")

_CANCEL_QUEUED = text("""
    WITH moved AS (
        UPDATE jobs SET state = 'cancelled', finished_at = clock_timestamp(), finished_xid = pg_current_xact_id(),
            error_code = CASE WHEN s.stopping THEN 'batch-stopped' ELSE error_code END,
            error_message = CASE WHEN s.stopping THEN b.stop_reason ELSE error_message END
        FROM segments s JOIN batches b ON b.id = s.batch_id
        WHERE jobs.id = ANY(:ids) AND s.id = jobs.segment_id AND CASE state WHEN 'queued' THEN true END
        RETURNING jobs.segment_id, jobs.batch_id, jobs.project_id
    ), counted AS (
        INSERT INTO counter_deltas (segment_id, batch_id, project_id, queued, cancelled)
        SELECT segment_id, batch_id, project_id, -count(*), count(*) FROM moved GROUP BY 1, 2, 3
    )
    SELECT count(*) FROM moved
""")

_RETRY = """
    WITH moved AS (
        UPDATE jobs SET state = 'queued', finished_at = NULL, finished_xid = NULL, failures = 0, crashes = 0,
            alone = false, error_code = NULL, error_message = NULL, cancel_requested_at = NULL,
            run_at = clock_timestamp()
        FROM (SELECT id AS old_id, state AS old_state FROM jobs WHERE {which} AND state IN ('failed', 'cancelled')
              ORDER BY id FOR UPDATE) old
        WHERE jobs.id = old.old_id
        RETURNING jobs.id, segment_id, batch_id, project_id, run_at, old_state
    ), counted AS (
        INSERT INTO counter_deltas (segment_id, batch_id, project_id, queued, failed, cancelled)
        SELECT segment_id, batch_id, project_id, count(*), -count(*) FILTER (WHERE old_state = 'failed'),
            -count(*) FILTER (WHERE old_state = 'cancelled') FROM moved GROUP BY 1, 2, 3
    )
    SELECT segment_id, min(run_at) AS run_at, count(*) AS jobs FROM moved GROUP BY 1
"""
_RETRY_JOBS = text(_RETRY.format(which="id = ANY(:ids)"))
_RETRY_SEGMENT = text(_RETRY.format(which="batch_id = :batch AND segment_id = :segment"))

_QUEUED_OF = text("""
    SELECT id FROM jobs WHERE segment_id = :segment AND state = 'queued'
    ORDER BY run_at, id LIMIT :limit FOR UPDATE SKIP LOCKED
""")

# Cancelling ends when nothing is left to turn: no queued job (locked ones count) and none running.
_CANCELLING_DONE = text("""
    UPDATE segments s SET cancelling = false, stopping = false, head_run_at = NULL, head_id = NULL
    WHERE s.id = :segment AND s.cancelling
      AND NOT EXISTS (SELECT 1 FROM jobs WHERE segment_id = s.id AND state = 'queued')
      AND NOT EXISTS (SELECT 1 FROM jobs WHERE segment_id = s.id AND state = 'running')
""")

_OPEN_TO_RETRY = text("""
    SELECT x.segment_id, sum(x.failed + x.cancelled) AS jobs FROM (
        SELECT segment_id, failed, cancelled FROM counters WHERE batch_id = :batch
        UNION ALL SELECT segment_id, failed, cancelled FROM counter_deltas WHERE batch_id = :batch) x
    GROUP BY 1 HAVING sum(x.failed + x.cancelled) > 0
""")

_DELETE_JOBS = text("""
    WITH doomed AS (
        DELETE FROM images WHERE job_id = ANY(:ids) RETURNING key, thumbnail_key
    ), remembered AS (
        INSERT INTO doomed_objects (key, delete_after)
        SELECT k, clock_timestamp() + CAST(:keep AS interval) FROM doomed, unnest(ARRAY[key, thumbnail_key]) AS k
        ON CONFLICT DO NOTHING
    ), recipes_gone AS (DELETE FROM recipes WHERE job_id = ANY(:ids)
    ), replays_gone AS (DELETE FROM replays WHERE job_id = ANY(:ids)
    ), uploads_let_go AS (DELETE FROM job_uploads WHERE job_id = ANY(:ids)
    ), attempts_gone AS (DELETE FROM attempts WHERE job_id = ANY(:ids)
    ), gone AS (DELETE FROM jobs WHERE id = ANY(:ids) RETURNING segment_id, batch_id, project_id, state)
    INSERT INTO counter_deltas (segment_id, batch_id, project_id, queued, succeeded, failed, cancelled)
    SELECT segment_id, batch_id, project_id, -count(*) FILTER (WHERE state = 'queued'),
        -count(*) FILTER (WHERE state = 'succeeded'), -count(*) FILTER (WHERE state = 'failed'),
        -count(*) FILTER (WHERE state = 'cancelled') FROM gone GROUP BY 1, 2, 3
""")

# They cancel out for the segments that go, but not for the project, which may have been told of only some of them.
_DROP_DELTAS = text("""
    WITH gone AS (DELETE FROM counter_deltas WHERE batch_id = :batch RETURNING project_id, queued, running)
    UPDATE projects p SET queued = p.queued + g.queued, running = p.running + g.running
    FROM (SELECT project_id, sum(queued) AS queued, sum(running) AS running FROM gone GROUP BY 1) g
    WHERE p.id = g.project_id
""")


def lock_job(conn: Connection, project: UUID, job: UUID) -> RowMapping | None:
    """One job, locked."""
    return conn.execute(_LOCK, {"id": job, "project": project}).mappings().one_or_none()


def cancel_queued(conn: Connection, ids: Collection[UUID]) -> int:
    """Queued jobs to cancelled; answers how many."""
    count: int = conn.execute(_CANCEL_QUEUED, {"ids": list(ids)}).scalar_one()
    return count


def request_cancel(conn: Connection, job: UUID) -> None:
    """Ask the worker of a running job to stop."""
    conn.execute(text("UPDATE jobs SET cancel_requested_at = clock_timestamp() WHERE id = :id"), {"id": job})


def retry_jobs(conn: Connection, ids: Collection[UUID]) -> Sequence[RowMapping]:
    """Failed and cancelled jobs back to queued; answers segments with their earliest run_at."""
    return conn.execute(_RETRY_JOBS, {"ids": list(ids)}).mappings().all()


def retry_segment(conn: Connection, batch: UUID, segment: UUID) -> Sequence[RowMapping]:
    """All failed and cancelled jobs of a segment back to queued."""
    return conn.execute(_RETRY_SEGMENT, {"batch": batch, "segment": segment}).mappings().all()


def queued_of(conn: Connection, segment: UUID, limit: int) -> list[UUID]:
    """Some queued jobs of a segment, locked."""
    return list(conn.execute(_QUEUED_OF, {"segment": segment, "limit": limit}).scalars())


def flag_cancelling(conn: Connection, batch: UUID) -> list[UUID]:
    """Cancel a batch: from now on none of its queued jobs is claimable. Answers its segments with queued jobs."""
    statement = text("""
        UPDATE segments SET cancelling = true, stopping = false, retrying = false WHERE batch_id = :batch RETURNING id
    """)
    return list(conn.execute(statement, {"batch": batch}).scalars())


def cancelling_done(conn: Connection, segment: UUID) -> None:
    """End a segment's cancelling if nothing is left to turn."""
    conn.execute(_CANCELLING_DONE, {"segment": segment})


def is_cancelling(conn: Connection, batch: UUID) -> bool:
    """Whether the sweeper still turns jobs of this batch to cancelled."""
    statement = text("SELECT EXISTS (SELECT 1 FROM segments WHERE batch_id = :batch AND cancelling)")
    found: bool = conn.execute(statement, {"batch": batch}).scalar_one()
    return found


def to_retry(conn: Connection, batch: UUID) -> Sequence[RowMapping]:
    """Segments of a batch with failed or cancelled jobs, and how many."""
    return conn.execute(_OPEN_TO_RETRY, {"batch": batch}).mappings().all()


def flag_retrying(conn: Connection, segments: Collection[UUID], retrying: bool) -> None:
    """Leave a retry to the sweeper, or end that."""
    statement = text("UPDATE segments SET retrying = :retrying WHERE id = ANY(:ids)")
    conn.execute(statement, {"ids": list(segments), "retrying": retrying})


def turning(conn: Connection, limit: int) -> Sequence[RowMapping]:
    """Segments whose rows the sweeper has to turn over."""
    statement = text("""
        SELECT id, batch_id, cancelling, retrying FROM segments WHERE cancelling OR retrying ORDER BY id LIMIT :limit
    """)
    return conn.execute(statement, {"limit": limit}).mappings().all()


def set_paused(conn: Connection, batch: UUID, paused: bool) -> None:
    """Pause or resume all segments of a batch."""
    conn.execute(
        text("UPDATE segments SET paused = :paused WHERE batch_id = :batch AND paused <> :paused"),
        {"batch": batch, "paused": paused},
    )


def set_priority(conn: Connection, batch: UUID, priority: int) -> None:
    """One priority for a batch and all its segments."""
    parameters = {"batch": batch, "priority": priority}
    # Segments before batches, as everybody does.
    conn.execute(text("UPDATE segments SET priority = :priority WHERE batch_id = :batch"), parameters)
    conn.execute(text("UPDATE batches SET priority = :priority WHERE id = :batch"), parameters)


def delete_jobs(conn: Connection, ids: Collection[UUID], keep: timedelta) -> None:
    """Remove jobs with everything beside them; their objects are deleted after `keep`."""
    conn.execute(_DELETE_JOBS, {"ids": list(ids), "keep": keep})


def shrink_batch(conn: Connection, batch: UUID, by: int) -> None:
    """A batch counts fewer jobs."""
    conn.execute(text("UPDATE batches SET total = total - :by WHERE id = :batch"), {"batch": batch, "by": by})


def hide_batch(conn: Connection, batch: UUID) -> None:
    """A batch is deleted: nobody sees it any more, the sweeper removes its rows."""
    conn.execute(text("UPDATE batches SET deleted_at = clock_timestamp() WHERE id = :batch"), {"batch": batch})


def deleted_batches(conn: Connection, limit: int) -> list[UUID]:
    """Deleted batches without running jobs: their rows may go."""
    statement = text("""
        SELECT b.id FROM batches b WHERE b.deleted_at IS NOT NULL
        AND NOT EXISTS (SELECT 1 FROM segments s JOIN jobs j ON j.segment_id = s.id AND j.state = 'running'
                        WHERE s.batch_id = b.id)
        ORDER BY b.id LIMIT :limit
    """)
    return list(conn.execute(statement, {"limit": limit}).scalars())


def some_jobs(conn: Connection, batch: UUID, limit: int) -> list[UUID]:
    """Some jobs of a batch, locked."""
    statement = text("SELECT id FROM jobs WHERE batch_id = :batch ORDER BY id LIMIT :limit FOR UPDATE")
    return list(conn.execute(statement, {"batch": batch, "limit": limit}).scalars())


def delete_batch_rows(conn: Connection, batch: UUID) -> None:
    """Remove what is left of a batch that has no jobs any more."""
    conn.execute(_DROP_DELTAS, {"batch": batch})
    for table in ("counters", "rates", "segments"):
        conn.execute(text(f"DELETE FROM {table} WHERE batch_id = :batch"), {"batch": batch})
    conn.execute(text("DELETE FROM batches WHERE id = :batch"), {"batch": batch})
