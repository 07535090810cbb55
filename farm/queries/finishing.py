"""Ending attempts: fenced, by the worker that made them or by the sweeper."""

from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, RowMapping, text

_LOCK = """
    SELECT j.id, j.state, j.attempt, j.segment_id, j.batch_id, j.project_id, j.run_at, j.failures, j.crashes, j.alone,
           j.cancel_requested_at IS NOT NULL OR s.cancelling AS cancelled
    FROM jobs j JOIN segments s ON s.id = j.segment_id WHERE j.id = ANY(:ids) ORDER BY j.id FOR UPDATE OF j {wait}
"""
_LOCK_ALL = text(_LOCK.format(wait=""))
_LOCK_FREE = text(_LOCK.format(wait="SKIP LOCKED"))

# The fence is one expression on purpose: a plain `state = 'running'` invites the planner to walk ix_jobs_running, which
# holds a dead entry for every job rendered since the last vacuum.
_MOVE = text("""
    WITH given AS (
        SELECT * FROM unnest(
            CAST(:ids AS uuid[]), CAST(:attempts AS int[]), CAST(:states AS text[]), CAST(:outcomes AS text[]),
            CAST(:run_ats AS timestamptz[]), CAST(:failures AS int[]), CAST(:crashes AS int[]),
            CAST(:alone AS bool[]), CAST(:codes AS text[]), CAST(:messages AS text[]))
            AS g(id, attempt, state, outcome, run_at, failures, crashes, alone, code, message)
    ), moved AS (
        UPDATE jobs j SET state = g.state, run_at = g.run_at, failures = g.failures, crashes = g.crashes,
            alone = g.alone, error_code = g.code, error_message = g.message, cancel_requested_at = NULL,
            finished_at = CASE WHEN g.state <> 'queued' THEN CAST(:now AS timestamptz) END,
            finished_xid = CASE WHEN g.state <> 'queued' THEN pg_current_xact_id() END
        FROM given g WHERE j.id = g.id AND CASE j.state WHEN 'running' THEN j.attempt END = g.attempt
        RETURNING j.id, j.segment_id, j.batch_id, j.project_id, j.state, j.attempt
    ), tried AS (
        UPDATE attempts a SET outcome = g.outcome, error_code = g.code, error_message = g.message, finished_at = :now
        FROM given g JOIN moved m ON m.id = g.id
        WHERE a.job_id = g.id AND a.number = g.attempt AND a.outcome IS NULL
    ), stored AS (
        INSERT INTO images (job_id, key, thumbnail_key, sha256, bytes, thumbnail_bytes, width, height)
        SELECT i.* FROM unnest(
            CAST(:image_ids AS uuid[]), CAST(:keys AS text[]), CAST(:thumbnail_keys AS text[]),
            CAST(:sha256s AS text[]), CAST(:bytes AS bigint[]), CAST(:thumbnail_bytes AS bigint[]),
            CAST(:widths AS int[]), CAST(:heights AS int[]))
            AS i(job_id, key, thumbnail_key, sha256, bytes, thumbnail_bytes, width, height)
        JOIN moved ON moved.id = i.job_id AND moved.state = 'succeeded'
    ), compared AS (
        UPDATE replays p SET levels = c.levels, mean_levels = c.mean_levels, differing = c.differing
        FROM unnest(CAST(:compared_ids AS uuid[]), CAST(:levels AS smallint[]), CAST(:mean_levels AS float8[]),
                    CAST(:differing AS float8[])) AS c(job_id, levels, mean_levels, differing)
        JOIN moved ON moved.id = c.job_id AND moved.state = 'succeeded' WHERE p.job_id = c.job_id
    ), counted AS (
        INSERT INTO counter_deltas (segment_id, batch_id, project_id, running, queued, succeeded, failed, cancelled)
        SELECT segment_id, batch_id, project_id, -count(*), count(*) FILTER (WHERE state = 'queued'),
            count(*) FILTER (WHERE state = 'succeeded'), count(*) FILTER (WHERE state = 'failed'),
            count(*) FILTER (WHERE state = 'cancelled')
        FROM moved GROUP BY 1, 2, 3
    )
    SELECT id FROM moved
""")

_CLOSE = text("""
    UPDATE claims SET closed_at = :now WHERE id = :claim AND closed_at IS NULL
    AND NOT EXISTS (SELECT 1 FROM attempts WHERE claim_id = :claim AND outcome IS NULL)
""")

_DOOM = text("""
    INSERT INTO doomed_objects (key, delete_after)
    SELECT k.key, :now + CAST(:keep AS interval) FROM unnest(CAST(:keys AS text[])) AS k(key)
    WHERE NOT EXISTS (SELECT 1 FROM images i WHERE i.job_id = ANY(:ids) AND k.key IN (i.key, i.thumbnail_key))
    ON CONFLICT DO NOTHING
""")

_PUBLISHED = text("""
    SELECT a.job_id FROM unnest(CAST(:ids AS uuid[]), CAST(:attempts AS int[]), CAST(:outcomes AS text[]))
        AS g(id, attempt, outcome)
    JOIN attempts a ON a.job_id = g.id AND a.number = g.attempt
    WHERE a.claim_id = :claim AND a.outcome = g.outcome
""")

# Leases of a database that was away mean nothing: nobody could renew them. Wait one lease after its start.
_EXPIRED = text("""
    SELECT c.id, a.job_id, a.number
    FROM claims c JOIN attempts a ON a.claim_id = c.id
    WHERE c.closed_at IS NULL AND a.outcome IS NULL
      AND ((CAST(:worker AS uuid) IS NOT NULL AND c.worker_id = :worker)
           OR (CAST(:worker AS uuid) IS NULL AND c.lease_until < :now
               AND pg_postmaster_start_time() + CAST(:lease AS interval) < clock_timestamp()))
    ORDER BY a.job_id LIMIT :limit
""")

_END_CLAIMS = text("""
    UPDATE claims SET closed_at = :now WHERE id IN (
        SELECT id FROM claims
        WHERE id = ANY(:ids) AND closed_at IS NULL AND (CAST(:worker AS uuid) IS NOT NULL OR lease_until < :now)
        ORDER BY id FOR UPDATE SKIP LOCKED)
    RETURNING id
""")


def lock_jobs(conn: Connection, ids: Collection[UUID], *, wait: bool = True) -> dict[UUID, RowMapping]:
    """Lock jobs in the one order (by id); `cancelled` tells whether somebody cancelled the job or its batch.

    Without `wait`, jobs that somebody else has locked are left out.
    """
    statement = _LOCK_ALL if wait else _LOCK_FREE
    return {row["id"]: row for row in conn.execute(statement, {"ids": sorted(ids)}).mappings()}


def move(conn: Connection, moves: Sequence[dict[str, Any]], now: datetime) -> set[UUID]:
    """Apply the ends of attempts in one fenced statement; answers the jobs it changed.

    Each move: id, attempt, state, outcome, run_at, failures, crashes, alone, code, message, image (or None),
    difference (or None).
    """
    compared = [(move["id"], move["difference"]) for move in moves if move["difference"] is not None]
    images = [(move["id"], move["image"]) for move in moves if move["image"] is not None]
    parameters = {
        "now": now,
        "ids": [move["id"] for move in moves],
        "attempts": [move["attempt"] for move in moves],
        "states": [move["state"] for move in moves],
        "outcomes": [move["outcome"] for move in moves],
        "run_ats": [move["run_at"] for move in moves],
        "failures": [move["failures"] for move in moves],
        "crashes": [move["crashes"] for move in moves],
        "alone": [move["alone"] for move in moves],
        "codes": [move["code"] for move in moves],
        "messages": [move["message"] for move in moves],
        "compared_ids": [job for job, _ in compared],
        "levels": [difference.levels for _, difference in compared],
        "mean_levels": [difference.mean_levels for _, difference in compared],
        "differing": [difference.differing for _, difference in compared],
        "image_ids": [job for job, _ in images],
        "keys": [image.key for _, image in images],
        "thumbnail_keys": [image.thumbnail_key for _, image in images],
        "sha256s": [image.sha256 for _, image in images],
        "bytes": [image.bytes for _, image in images],
        "thumbnail_bytes": [image.thumbnail_bytes for _, image in images],
        "widths": [image.width for _, image in images],
        "heights": [image.height for _, image in images],
    }
    return set(conn.execute(_MOVE, parameters).scalars())


def close_claim(conn: Connection, claim: UUID, now: datetime) -> None:
    """Close a claim once all its attempts have ended."""
    conn.execute(_CLOSE, {"claim": claim, "now": now})


def published(conn: Connection, claim: UUID, ends: Sequence[tuple[UUID, int, str]]) -> set[UUID]:
    """Of these (job, attempt, outcome): which were committed exactly so before, when the answer was lost."""
    ids, attempts, outcomes = zip(*ends, strict=True)
    parameters = {"claim": claim, "ids": list(ids), "attempts": list(attempts), "outcomes": list(outcomes)}
    return set(conn.execute(_PUBLISHED, parameters).scalars())


def doom(conn: Connection, ids: Collection[UUID], keys: Collection[str], keep: timedelta, now: datetime) -> None:
    """Mark objects of attempts that lost for deletion, unless they are the jobs' published images."""
    if keys:
        conn.execute(_DOOM, {"ids": list(ids), "keys": list(keys), "keep": keep, "now": now})


def expired(
    conn: Connection, *, worker: UUID | None, lease: timedelta, limit: int, now: datetime
) -> Sequence[RowMapping]:
    """Running attempts of claims whose lease ran out (or of one dead worker), by job."""
    parameters = {"worker": worker, "lease": lease, "limit": limit, "now": now}
    return conn.execute(_EXPIRED, parameters).mappings().all()


def end_claims(conn: Connection, ids: Collection[UUID], *, worker: UUID | None, now: datetime) -> set[UUID]:
    """Close claims that are still expired now that their jobs are locked; a claim renewed meanwhile stays, and so does
    one that somebody has locked, who may be renewing or finishing it."""
    return set(conn.execute(_END_CLAIMS, {"ids": list(ids), "worker": worker, "now": now}).scalars())
