"""The verbs of a running job: claim, renew, finish, rescue."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from random import Random
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import Connection, RowMapping

from farm import limits, scheduling, telling
from farm.backoff import backoff
from farm.errors import Unavailable
from farm.jobs.taking import Place, take_any, take_one_set
from farm.objects import attempt_prefix
from farm.queries import claiming, finishing, suspects, workers
from farm.recipe import Recipe
from farm.scheduling import Candidate, Policy, Warm
from farm.settings import Settings
from farm.states import JobState, Outcome

RESCUED_AT_ONCE = 1000
"""Attempts one rescue transaction ends."""

_jitter = Random()  # noqa: S311  # spreads retries, guards nothing
_choices = Random()  # noqa: S311  # spreads workers over segments, guards nothing


@dataclass(frozen=True, slots=True)
class ClaimedJob:
    """What a worker needs to render and publish one job.

    `alone`: its last attempt ended in a crash, so nothing else may be in work in the same process, or a crash would
    not tell whose fault it was. `original`: the key of the picture that a replay is compared with.
    """

    id: UUID
    attempt: int
    batch_id: UUID
    project_id: UUID
    number: int
    recipe: Recipe
    labels: dict[str, str]
    names: dict[str, Any]
    metadata: bool
    alone: bool = False
    original: str | None = None


@dataclass(frozen=True, slots=True)
class Claimed:
    """A micro-batch: jobs of one lane, and of one adapter set unless the worker mixes them.

    `more` tells whether that lane has further work now.
    """

    claim_id: UUID
    lane: str
    jobs: tuple[ClaimedJob, ...]
    more: bool


@dataclass(frozen=True, slots=True)
class Renewal:
    """What a heartbeat learns: claims that are not ours any more, and running jobs that somebody cancelled."""

    lost: frozenset[UUID]
    cancelled: frozenset[UUID]


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An uploaded picture: object keys, sha256 (hex) of the picture, sizes in bytes and pixels."""

    key: str
    thumbnail_key: str
    sha256: str
    bytes: int
    width: int
    height: int
    thumbnail_bytes: int


@dataclass(frozen=True, slots=True)
class Difference:
    """How far two pictures are apart: at most and on average, in levels of 255, and the share of pixels (0..1) that
    differ at all."""

    levels: int
    mean_levels: float
    differing: float


@dataclass(frozen=True, slots=True)
class Result:
    """How one attempt ended. `image` is set exactly for a success, `difference` for the success of a replay."""

    job_id: UUID
    attempt: int
    outcome: Outcome
    image: StoredImage | None = None
    error_code: str = ""
    error_message: str = ""
    difference: Difference | None = None

    def __post_init__(self) -> None:
        if (self.image is not None) != (self.outcome is Outcome.SUCCEEDED):
            raise ValueError(f"an image belongs to a success and nothing else, not to {self.outcome}")


def claim(
    conn: Connection,
    *,
    claim_id: UUID,
    worker: UUID,
    pool: str,
    warm: Warm,
    limit: int,
    settings: Settings,
    now: datetime | None = None,
    random: Random = _choices,
) -> Claimed | None:
    """Take up to `limit` images of one lane, or answer None when nothing is claimable. An animation is as many images
    as it has frames, and one at least is taken.

    They share one adapter set, unless the worker says that it mixes them (`warm.mixes`).
    Asked again with a known `claim_id` (the answer of the first COMMIT was lost), it answers the same jobs.
    `random` draws which segments are looked at beside the oldest, and whether age decides this time.
    """
    if claiming.claim_exists(conn, claim_id):
        return _claimed(claim_id, claiming.claimed_before(conn, claim_id), more=True)
    now = now or claiming.database_now(conn)
    room = limits.room(conn)
    full = [project for project, left in room.items() if left <= 0]
    left = (
        workers.left_to_others(conn, worker=worker, pool=pool, hashes=warm.resting, lease=settings.lease)
        if warm.resting
        else ()
    )
    rows = claiming.candidates(conn, pool=pool, worker=worker, warm=warm, full=full, left=left, random=random, now=now)
    by_segment = {row["segment"]: row for row in rows}
    policy = Policy(settings.affinity_bound, limit, workers=max(1, rows[0]["workers"]) if rows else 1)
    ranked = scheduling.rank(
        [_candidate(row) for row in rows], warm, policy, now, worker=worker, chance=random.random()
    )
    for choice in scheduling.few(ranked, warm):
        place = Place(pool, choice.lane, limit, now, suspects.asked(worker, settings), full)
        if warm.mixes_in(choice.lane):
            taken, short = take_any(conn, by_segment[choice.segment], place)
        else:
            overdue = now - choice.ready_since > settings.affinity_bound
            prefer = None if overdue or choice.adapter_set is not None else warm.lanes.get(choice.lane)
            taken, short = take_one_set(conn, by_segment[choice.segment], place, prefer)
        if room:
            taken = limits.startable(conn, taken)
        if taken:
            started = claiming.start(
                conn, claim=claim_id, worker=worker, ids=taken, limit=limit, lease=settings.lease, now=now
            )
        if short:
            claiming.settle_heads(conn, short)
        if taken:
            more = len(rows) > len(short) or len(taken) >= limit or len(started) < len(taken)
            return _claimed(claim_id, started, more=more)
    return None


def renew(
    conn: Connection, *, worker: UUID, claims: Collection[UUID], settings: Settings, now: datetime | None = None
) -> Renewal:
    """Prolong the leases of a worker's claims by one lease."""
    now = now or claiming.database_now(conn)
    held = claiming.renew(conn, worker=worker, claims=claims, lease=settings.lease, now=now)
    return Renewal(
        lost=frozenset(claims) - frozenset(held),
        cancelled=frozenset(claiming.cancelled_of(conn, held)) if held else frozenset(),
    )


def finish(
    conn: Connection,
    *,
    claim_id: UUID,
    results: Sequence[Result],
    settings: Settings,
    now: datetime | None = None,
) -> dict[UUID, Literal["done", "lost"]]:
    """End attempts and publish their images, each fenced by job, state and attempt.

    "lost" means that the attempt was no longer the job's own: nothing was changed, and its objects will be deleted.
    Repeating a finish whose answer was lost answers "done" again.
    """
    if not results:
        return {}
    now = now or claiming.database_now(conn)
    rows = finishing.lock_jobs(conn, [result.job_id for result in results])
    held = [result for result in results if _is_current(rows.get(result.job_id), result.attempt)]
    moves = [_move(rows[result.job_id], result, settings, now) for result in held]
    done = finishing.move(conn, moves, now) if moves else set()
    _requeue(conn, rows, moves, done)
    telling.jobs_moved(conn, moves, done)
    finishing.close_claim(conn, claim_id, now)
    late = [result for result in results if result.job_id not in done]
    if late:
        done |= finishing.published(conn, claim_id, [(r.job_id, r.attempt, r.outcome.value) for r in late])
        lost = [r for r in late if r.job_id not in done and r.image is not None]
        keys = [key for r in lost if r.image is not None for key in (r.image.key, r.image.thumbnail_key)]
        finishing.doom(conn, [r.job_id for r in lost], keys, settings.keep_deleted, now)
    return {result.job_id: "done" if result.job_id in done else "lost" for result in results}


def rescue(conn: Connection, *, settings: Settings, now: datetime | None = None, worker: UUID | None = None) -> int:
    """Take back the jobs of claims whose lease ran out; answers how many.

    With `worker`, the claims of that worker are taken back at once: its supervisor saw it die.
    """
    now = now or claiming.database_now(conn)
    found = finishing.expired(conn, worker=worker, lease=settings.lease, limit=RESCUED_AT_ONCE, now=now)
    if not found:
        return 0
    # Never waits for a lock: a worker that froze inside a transaction would keep everybody else's jobs from returning.
    rows = finishing.lock_jobs(conn, {row["job_id"] for row in found}, wait=False)
    locked = {row["id"] for row in found if row["job_id"] not in rows}
    ended = finishing.end_claims(conn, {row["id"] for row in found} - locked, worker=worker, now=now)
    moves = []
    for row in found:
        job = rows.get(row["job_id"])
        if row["id"] in ended and job is not None and _is_current(job, row["number"]):
            moves.append(_crashed(job, settings=settings))
    done = finishing.move(conn, moves, now) if moves else set()
    _requeue(conn, rows, moves, done)
    telling.jobs_moved(conn, moves, done)
    # What a crashed attempt had uploaded already, nobody knows: the sweeper looks below the attempt's own prefix.
    prefixes = [attempt_prefix(rows[m["id"]]["project_id"], m["id"], m["attempt"]) for m in moves if m["id"] in done]
    finishing.doom(conn, [], prefixes, settings.keep_deleted, now)
    return len(done)


def _candidate(row: RowMapping) -> Candidate:
    return Candidate(
        segment=row["segment"],
        lane=row["lane"],
        checkpoint=row["checkpoint"],
        adapter_set=row["adapter_set"],
        project=row["project_id"],
        priority=row["priority"],
        ready_since=row["head_run_at"],
        served=float(row["served"]),
        queued=int(row["queued"]),
        running=int(row["running"]),
        elsewhere=row["elsewhere"],
    )


def _claimed(claim_id: UUID, rows: Sequence[RowMapping], *, more: bool) -> Claimed | None:
    jobs = tuple(
        ClaimedJob(
            id=row["id"],
            attempt=row["attempt"],
            batch_id=row["batch_id"],
            project_id=row["project_id"],
            number=row["number"],
            recipe=Recipe.parse(row["body"]),
            labels=row["labels"],
            names=row["names"],
            metadata=row["metadata_wanted"],
            alone=row["alone"],
            original=row["original"],
        )
        for row in rows
    )
    return Claimed(claim_id, jobs[0].recipe.lane, jobs, more) if jobs else None


def _is_current(row: RowMapping | None, attempt: int) -> bool:
    return row is not None and row["state"] == JobState.RUNNING and row["attempt"] == attempt


def _move(row: RowMapping, result: Result, settings: Settings, now: datetime) -> dict[str, Any]:
    """What a reported result does to its job: the policy of failure, as one value."""
    state, run_at, failures = JobState.QUEUED, row["run_at"], row["failures"]
    match result.outcome:
        case Outcome.SUCCEEDED:
            state = JobState.SUCCEEDED
        case Outcome.FAILED:
            state = JobState.FAILED
        case Outcome.CANCELLED:
            state = JobState.CANCELLED
        case Outcome.RETRY if result.error_code == Unavailable.code:
            # A server's absence is no fault of the job, however often it is met.
            run_at = now + backoff(row["attempt"], settings.retry_backoff, settings.retry_backoff_max, _jitter)
        case Outcome.RETRY:
            failures += 1
            if failures >= settings.max_failures:
                state = JobState.FAILED
            else:
                run_at = now + backoff(failures, settings.retry_backoff, settings.retry_backoff_max, _jitter)
        case Outcome.GIVEN_BACK:
            pass
        case Outcome.CRASHED:
            raise ValueError("a crash is found by the sweeper, not reported by the worker")
    if state is JobState.QUEUED and row["cancelled"]:
        state = JobState.CANCELLED
    return {
        "id": row["id"],
        "attempt": row["attempt"],
        "state": state.value,
        "outcome": result.outcome.value,
        "run_at": run_at,
        "failures": failures,
        "crashes": row["crashes"],
        "alone": row["alone"] and state is JobState.QUEUED,
        "code": result.error_code or None,
        "message": result.error_message[:2000] or None,
        "image": result.image,
        "difference": result.difference,
    }


def _crashed(row: RowMapping, *, settings: Settings) -> dict[str, Any]:
    """What a crash does to a job. Only a crash alone counts: neighbours of a poison job are innocent.

    A job that merely was the only one of its claim had a neighbour too, if the same process was storing another claim;
    so what counts is that it was claimed to be alone.
    """
    crashes = row["crashes"] + row["alone"]
    state = JobState.QUEUED
    code, message = "worker-crashed", "the worker vanished while rendering this job"
    if row["cancelled"]:
        state = JobState.CANCELLED
    elif crashes >= settings.max_crashes:
        state = JobState.FAILED
        code, message = "quarantined", f"its worker crashed {crashes} times while rendering this job alone"
    return {
        "id": row["id"],
        "attempt": row["attempt"],
        "state": state.value,
        "outcome": Outcome.CRASHED.value,
        "run_at": row["run_at"],
        "failures": row["failures"],
        "crashes": crashes,
        "alone": state is JobState.QUEUED,
        "code": code,
        "message": message,
        "image": None,
        "difference": None,
    }


def _requeue(
    conn: Connection, rows: dict[UUID, RowMapping], moves: Sequence[dict[str, Any]], done: Collection[UUID]
) -> None:
    """Tell segments of the jobs that went back to queued."""
    places = [
        (rows[move["id"]]["segment_id"], move["run_at"], move["id"])
        for move in moves
        if move["state"] == JobState.QUEUED and move["id"] in done
    ]
    claiming.lower_heads(conn, places)
