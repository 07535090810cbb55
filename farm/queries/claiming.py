"""Finding work and taking it."""

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from random import Random
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, RowMapping, text

from farm.queries.suspects import LEFT_TO_OTHERS
from farm.scheduling import FAIR_SHARE_HALF_LIFE, Warm

LEVEL_WIDTH = 8
"""Segments looked at for each priority level: the oldest ones."""

FURTHER_WIDTH = 4
"""And as many from a random place among the `FURTHER` oldest, so that a thousand workers do not meet on one row."""

FURTHER = 64

PROJECTS_SEEN = 32
"""Projects whose oldest segment is looked at for each priority level, however many segments of others lie in front;
where more have work, those that follow a random place."""

WARM_WIDTH = 2
"""Segments looked at for each warm lane: the oldest of the adapter set merged there, and of any."""

DELTAS_SEEN = 256
"""Counts not folded yet that are added for each candidate; there are more only while no sweeper runs."""

_HALF_LIFE = FAIR_SHARE_HALF_LIFE.total_seconds()

_READY = "head_run_at IS NOT NULL AND NOT paused AND NOT cancelling AND project_id <> ALL(:full)"
"""`full` are projects that may start nothing now: their segments must not stand in front of others."""

_WANTED = f"{_READY} AND lane <> ALL(:left) AND checkpoint <> ALL(:left)"
"""`left` are lanes and checkpoints that are left to other workers: likewise."""

# LIMIT 1 where a key is unique keeps the planner from reading a whole table for a join.
# A few index probes for each level, project and warm lane, whatever is queued: all by the partial indexes
# ix_segments_ready, ix_segments_project, ix_segments_set and ix_segments_lane.
# Which projects have work is asked one by one along ix_segments_project, from a random place and around.
# What other workers hold matters only where this one would have to load.
_CANDIDATES = text(f"""
    WITH RECURSIVE levels(priority) AS (
        (SELECT priority FROM segments WHERE pool = :pool AND {_WANTED} ORDER BY priority DESC LIMIT 1)
        UNION ALL
        SELECT (SELECT s.priority FROM segments s WHERE s.pool = :pool AND {_WANTED} AND s.priority < levels.priority
                ORDER BY s.priority DESC LIMIT 1)
        FROM levels WHERE levels.priority IS NOT NULL
    ), tenants(priority, project_id, id, upto, n) AS (
        SELECT l.priority, r.after, CAST(NULL AS uuid), r.upto, 0
        FROM levels l, (VALUES (CAST(:start AS uuid), CAST('ffffffff-ffff-ffff-ffff-ffffffffffff' AS uuid)),
                               ('00000000-0000-0000-0000-000000000000', :start)) r(after, upto)
        WHERE l.priority IS NOT NULL
        UNION ALL
        SELECT t.priority, s.project_id, s.id, t.upto, t.n + 1
        FROM tenants t CROSS JOIN LATERAL (
            SELECT project_id, id FROM segments WHERE pool = :pool AND {_WANTED} AND priority = t.priority
            AND project_id > t.project_id AND project_id <= t.upto
            ORDER BY project_id, head_run_at, id LIMIT 1) s
        WHERE t.n < :projects
    ), seen AS (
        SELECT id FROM tenants WHERE n > 0 ORDER BY upto DESC, n LIMIT :projects
    ), found AS (
        SELECT s.* FROM levels CROSS JOIN LATERAL (
            SELECT * FROM segments WHERE pool = :pool AND {_WANTED} AND priority = levels.priority
            AND head_run_at <= :now ORDER BY head_run_at, id LIMIT :width) s
        UNION
        SELECT s.* FROM levels CROSS JOIN LATERAL (
            SELECT * FROM segments WHERE pool = :pool AND {_WANTED} AND priority = levels.priority
            AND head_run_at <= :now ORDER BY head_run_at, id LIMIT :further_width OFFSET :further) s
        UNION
        SELECT s.* FROM seen CROSS JOIN LATERAL (
            SELECT * FROM segments WHERE id = seen.id AND head_run_at <= :now LIMIT 1) s
        UNION
        SELECT s.* FROM unnest(CAST(:lanes AS text[]), CAST(:sets AS text[])) warm(lane, adapter_set)
        CROSS JOIN LATERAL (
            SELECT * FROM segments WHERE pool = :pool AND {_WANTED} AND segments.lane = warm.lane
            AND segments.adapter_set = warm.adapter_set AND head_run_at <= :now
            ORDER BY priority DESC, head_run_at LIMIT :warm_width) s
        UNION
        SELECT s.* FROM unnest(CAST(:lanes AS text[])) warm(lane) CROSS JOIN LATERAL (
            SELECT * FROM segments WHERE pool = :pool AND {_WANTED} AND segments.lane = warm.lane
            AND head_run_at <= :now ORDER BY priority DESC, head_run_at LIMIT :warm_width) s
    ), peers AS (
        SELECT id, warm FROM workers
        WHERE pool = :pool AND left_at IS NULL AND heartbeat_at > clock_timestamp() - interval '30 seconds'
    ), cold AS (
        SELECT checkpoint, EXISTS (
            SELECT 1 FROM peers WHERE id <> :worker
            AND warm @> jsonb_build_array(jsonb_build_object('checkpoint', checkpoint))) AS elsewhere
        FROM (SELECT DISTINCT checkpoint FROM found WHERE checkpoint <> ALL(:checkpoints)) c
    )
    SELECT f.id AS segment, f.lane, f.checkpoint, f.adapter_set, f.priority, f.head_run_at, f.head_id, f.project_id,
           p.served * exp(-extract(epoch FROM :now - p.served_at) * ln(2) / {_HALF_LIFE}) AS served,
           c.queued + d.queued AS queued, c.running + d.running AS running,
           coalesce(cold.elsewhere, false) AS elsewhere, (SELECT count(*) FROM peers) AS workers
    FROM found f JOIN projects p ON p.id = f.project_id LEFT JOIN cold ON cold.checkpoint = f.checkpoint
    CROSS JOIN LATERAL (SELECT queued, running FROM counters WHERE segment_id = f.id LIMIT 1) c
    CROSS JOIN LATERAL (
        SELECT coalesce(sum(queued), 0) AS queued, coalesce(sum(running), 0) AS running
        FROM (SELECT queued, running FROM counter_deltas WHERE segment_id = f.id LIMIT :deltas) recent) d
""")

# Walks ix_segments_lane.
_LANE = text(f"""
    SELECT id AS segment, head_run_at, head_id FROM segments
    WHERE pool = :pool AND lane = :lane AND {_READY} AND head_run_at <= :now AND id <> ALL(:not_these)
    ORDER BY priority DESC, head_run_at LIMIT :limit
""")

# Two walks of ix_segments_set, so that neither the other sets of the lane nor their order cost anything.
_LANE_SET = text(f"""
    SELECT segment, head_run_at, head_id FROM (
        (SELECT id AS segment, head_run_at, head_id, priority FROM segments
         WHERE pool = :pool AND lane = :lane AND adapter_set = :adapter_set AND {_READY} AND head_run_at <= :now
         AND id <> ALL(:not_these) ORDER BY priority DESC, head_run_at LIMIT :limit)
        UNION ALL
        (SELECT id AS segment, head_run_at, head_id, priority FROM segments
         WHERE pool = :pool AND lane = :lane AND adapter_set IS NULL AND {_READY} AND head_run_at <= :now
         AND id <> ALL(:not_these) ORDER BY priority DESC, head_run_at LIMIT :limit)) s
    ORDER BY priority DESC, head_run_at LIMIT :limit
""")

# Walks ix_jobs_queue from the segment's head; measured in benchmarks/queue_cost.py.
_TAKE = text(f"""
    SELECT id, adapter_set, alone FROM jobs
    WHERE segment_id = :segment AND state = 'queued' AND run_at <= :now AND (run_at, id) >= (:head_run_at, :head_id)
      AND (NOT alone OR crashes = 0 OR NOT {LEFT_TO_OTHERS})
    ORDER BY run_at, id LIMIT :limit FOR UPDATE SKIP LOCKED
""")

# Walks ix_jobs_queue_set.
_TAKE_SET = text("""
    SELECT id, adapter_set, alone FROM jobs
    WHERE segment_id = :segment AND adapter_set = :adapter_set AND state = 'queued' AND run_at <= :now
      AND (run_at, id) >= (:head_run_at, :head_id) AND NOT alone
    ORDER BY run_at, id LIMIT :limit FOR UPDATE SKIP LOCKED
""")

_START = text("""
    WITH claim AS (
        INSERT INTO claims (id, worker_id, lease_until, created_at) VALUES (:claim, :worker, :now + :lease, :now)
    ), moved AS (
        UPDATE jobs SET state = 'running', attempt = attempt + 1, started_at = :now
        -- An animation counts as its frames, and all jobs of a lane have as many.
        WHERE id = ANY((CAST(:ids AS uuid[]))[1 : GREATEST(1, :limit / COALESCE((
            SELECT CAST(body ->> 'frames' AS int) FROM recipes WHERE job_id = (CAST(:ids AS uuid[]))[1]), 1))])
        RETURNING id, segment_id, batch_id, project_id, number, attempt, alone
    ), tried AS (
        INSERT INTO attempts (job_id, number, claim_id, started_at) SELECT id, attempt, :claim, :now FROM moved
    ), counted AS (
        INSERT INTO counter_deltas (segment_id, batch_id, project_id, queued, running)
        SELECT segment_id, batch_id, project_id, -count(*), count(*) FROM moved GROUP BY 1, 2, 3
    )
    SELECT moved.*, r.body, r.names, r.labels, r.metadata_wanted, p.key AS original
    FROM moved JOIN recipes r ON r.job_id = moved.id LEFT JOIN replays p ON p.job_id = moved.id
    ORDER BY moved.id
""")

_CLAIMED_BEFORE = text("""
    SELECT j.id, j.batch_id, j.project_id, j.number, j.alone, a.number AS attempt,
           r.body, r.names, r.labels, r.metadata_wanted, p.key AS original
    FROM attempts a JOIN jobs j ON j.id = a.job_id JOIN recipes r ON r.job_id = a.job_id
    LEFT JOIN replays p ON p.job_id = a.job_id
    WHERE a.claim_id = :claim AND a.outcome IS NULL ORDER BY j.id
""")

_LOCK_SEGMENTS = text("SELECT id FROM segments WHERE id = ANY(:ids) ORDER BY id FOR UPDATE")
_LOCK_FREE_SEGMENTS = text("SELECT id FROM segments WHERE id = ANY(:ids) ORDER BY id FOR UPDATE SKIP LOCKED")

_SETTLE_HEADS = text("""
    UPDATE segments s SET (head_run_at, head_id) = (
        SELECT run_at, id FROM jobs j
        WHERE j.segment_id = s.id AND j.state = 'queued' AND (j.run_at, j.id) >= (s.head_run_at, s.head_id)
        ORDER BY run_at, id LIMIT 1)
    WHERE s.id = ANY(:ids) AND s.head_run_at IS NOT NULL
""")

_LOWER_HEADS = text("""
    UPDATE segments s SET head_run_at = q.run_at, head_id = q.id
    FROM (SELECT DISTINCT ON (segment_id) segment_id, run_at, id
          FROM unnest(CAST(:segments AS uuid[]), CAST(:run_ats AS timestamptz[]), CAST(:ids AS uuid[]))
               AS back(segment_id, run_at, id) ORDER BY segment_id, run_at, id) q
    WHERE s.id = q.segment_id AND (s.head_run_at IS NULL OR (q.run_at, q.id) < (s.head_run_at, s.head_id))
""")

_RENEW = text("""
    WITH mine AS (
        UPDATE claims SET lease_until = :now + :lease
        WHERE id = ANY(:claims) AND worker_id = :worker AND closed_at IS NULL RETURNING id)
    SELECT id FROM mine
""")

_CANCELLED = text("""
    SELECT j.id FROM attempts a JOIN jobs j ON j.id = a.job_id AND j.attempt = a.number
    JOIN segments s ON s.id = j.segment_id
    WHERE a.claim_id = ANY(:claims) AND a.outcome IS NULL
      AND (j.cancel_requested_at IS NOT NULL OR s.cancelling AND NOT s.stopping)
""")


def database_now(conn: Connection) -> datetime:
    """The database's clock, the only one that leases and queues believe."""
    now: datetime = conn.execute(text("SELECT clock_timestamp()")).scalar_one()
    return now


def candidates(
    conn: Connection,
    *,
    pool: str,
    worker: UUID,
    warm: Warm,
    full: Collection[UUID],
    random: Random,
    now: datetime,
    left: Collection[str] = (),
) -> Sequence[RowMapping]:
    """Segments worth a look: the oldest of each priority level, some further on, one of each project, and those of
    the worker's warm lanes; none of the projects `full` and of the lanes and checkpoints `left` to others. `random`
    says where to look further."""
    parameters = {
        "pool": pool,
        "worker": worker,
        "lanes": list(warm.lanes),
        "sets": list(warm.lanes.values()),
        "checkpoints": list(warm.checkpoints),
        "full": list(full),
        "left": list(left),
        "now": now,
        "start": UUID(int=random.getrandbits(128)),
        "further": random.randrange(FURTHER),
        "width": LEVEL_WIDTH,
        "further_width": FURTHER_WIDTH,
        "projects": PROJECTS_SEEN,
        "warm_width": WARM_WIDTH,
        "deltas": DELTAS_SEEN,
    }
    return conn.execute(_CANDIDATES, parameters).mappings().all()


def lane_segments(
    conn: Connection,
    *,
    pool: str,
    lane: str,
    adapter_set: str | None,
    not_these: Collection[UUID],
    full: Collection[UUID],
    limit: int,
    now: datetime,
) -> Sequence[RowMapping]:
    """More segments of a lane, to fill a micro-batch: those that may hold jobs of this adapter set, or all."""
    parameters = {
        "pool": pool, "lane": lane, "not_these": list(not_these), "full": list(full), "limit": limit, "now": now,
    }  # fmt: skip
    if adapter_set is None:
        return conn.execute(_LANE, parameters).mappings().all()
    return conn.execute(_LANE_SET, {**parameters, "adapter_set": adapter_set}).mappings().all()


def take(
    conn: Connection, segment: Any, *, adapter_set: str | None, limit: int, now: datetime, asked: Mapping[str, Any]
) -> Sequence[RowMapping]:
    """Lock up to `limit` queued jobs of a segment in order, of one adapter set or of any; skips locked ones, and those
    that are left to other workers than the one of `asked` (see `suspects.asked`)."""
    parameters = {
        "segment": segment["segment"],
        "head_run_at": segment["head_run_at"],
        "head_id": segment["head_id"],
        "limit": limit,
        "now": now,
    }
    if adapter_set is None:
        return conn.execute(_TAKE, {**parameters, **asked}).mappings().all()
    return conn.execute(_TAKE_SET, {**parameters, "adapter_set": adapter_set}).mappings().all()


def start(
    conn: Connection, *, claim: UUID, worker: UUID, ids: Sequence[UUID], limit: int, lease: timedelta, now: datetime
) -> Sequence[RowMapping]:
    """Turn locked jobs of one lane to running inside a new claim, with their next attempts; answers what to render.

    Of animations only the first so many as have `limit` frames together, but one at least.
    """
    parameters = {"claim": claim, "worker": worker, "ids": list(ids), "limit": limit, "lease": lease, "now": now}
    return conn.execute(_START, parameters).mappings().all()


def claim_exists(conn: Connection, claim: UUID) -> bool:
    """Whether a claim with this id was committed."""
    return conn.execute(text("SELECT 1 FROM claims WHERE id = :claim"), {"claim": claim}).first() is not None


def claimed_before(conn: Connection, claim: UUID) -> Sequence[RowMapping]:
    """The jobs still running under a claim whose answer was lost."""
    return conn.execute(_CLAIMED_BEFORE, {"claim": claim}).mappings().all()


def settle_heads(conn: Connection, segments: Collection[UUID], *, wait: bool = False) -> None:
    """Raise the heads of segments to their first queued job, or to NULL where none is left.

    The row lock comes first and the look at the jobs second, in a statement of its own: its snapshot then sees every
    requeue that committed before the lock was granted.
    """
    statement = _LOCK_SEGMENTS if wait else _LOCK_FREE_SEGMENTS
    locked = conn.execute(statement, {"ids": sorted(segments)}).scalars().all()
    if locked:
        conn.execute(_SETTLE_HEADS, {"ids": list(locked)})


def lower_heads(conn: Connection, places: Collection[tuple[UUID, datetime, UUID]]) -> None:
    """Let segments know of jobs queued again: (segment, run_at, job id) each."""
    if not places:
        return
    conn.execute(_LOCK_SEGMENTS, {"ids": sorted({segment for segment, _, _ in places})})
    segments, run_ats, ids = zip(*places, strict=True)
    conn.execute(_LOWER_HEADS, {"segments": list(segments), "run_ats": list(run_ats), "ids": list(ids)})


def renew(conn: Connection, *, worker: UUID, claims: Collection[UUID], lease: timedelta, now: datetime) -> set[UUID]:
    """Prolong a worker's claims; answers those that are still its own."""
    parameters = {"worker": worker, "claims": list(claims), "lease": lease, "now": now}
    return set(conn.execute(_RENEW, parameters).scalars())


def cancelled_of(conn: Connection, claims: Collection[UUID]) -> set[UUID]:
    """Running jobs of these claims that somebody cancelled."""
    return set(conn.execute(_CANCELLED, {"claims": list(claims)}).scalars())
