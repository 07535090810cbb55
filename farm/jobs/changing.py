"""What people do to jobs and batches. Each verb answers the new view."""

from collections.abc import Sequence
from datetime import timedelta
from uuid import UUID

from sqlalchemy import Connection, RowMapping

from farm import limits
from farm.errors import Conflict, InvalidRequest, NotFound
from farm.jobs.reading import get_batch, get_job
from farm.queries import changing as rows
from farm.queries import claiming, stopping
from farm.states import JobState
from farm.views import BatchView, JobView

TURNED_AT_ONCE = 5_000
"""Rows that a cancel or retry turns over before it answers; the sweeper does the rest."""
INLINE_SEGMENTS = 20
LOWEST_ID = UUID(int=0)


def cancel_job(conn: Connection, project_id: UUID, job_id: UUID) -> JobView:
    """Cancel a job: at once while it is queued, at its next denoising step while it runs.

    Cancelling twice changes nothing. Raises NotFound, and Conflict for a job that succeeded or failed.
    """
    job = _locked(conn, project_id, job_id)
    match JobState(job["state"]):
        case JobState.QUEUED:
            rows.cancel_queued(conn, [job_id])
        case JobState.RUNNING:
            rows.request_cancel(conn, job_id)
        case JobState.CANCELLED:
            pass
        case state:
            raise Conflict(f"job {job_id} has {state} and cannot be cancelled")
    return get_job(conn, project_id, job_id)


def retry_job(conn: Connection, project_id: UUID, job_id: UUID) -> JobView:
    """Put a failed or cancelled job back in the queue. Raises NotFound, Conflict in any other state, LimitReached."""
    job = _locked(conn, project_id, job_id)
    if job["cancelling"]:
        raise Conflict("its batch is being cancelled; try again when that is done, or retry the batch")
    if job["state"] not in (JobState.FAILED, JobState.CANCELLED):
        raise Conflict(f"job {job_id} is {job['state']}; only failed and cancelled jobs can be retried")
    _lower(conn, rows.retry_jobs(conn, [job_id]))
    limits.hold(conn, project_id, asked=1)
    return get_job(conn, project_id, job_id)


def delete_job(conn: Connection, project_id: UUID, job_id: UUID, *, keep: timedelta = timedelta(minutes=10)) -> None:
    """Remove a job and its image. Raises NotFound, and Conflict while it runs."""
    job = _locked(conn, project_id, job_id)
    if job["state"] == JobState.RUNNING:
        raise Conflict(f"job {job_id} is running; cancel it first")
    rows.delete_jobs(conn, [job_id], keep)
    rows.shrink_batch(conn, job["batch_id"], 1)


def cancel_batch(conn: Connection, project_id: UUID, batch_id: UUID) -> BatchView:
    """Cancel whatever of a batch has not finished: one statement over its segments, whatever its size."""
    get_batch(conn, project_id, batch_id)
    left = TURNED_AT_ONCE
    for segment in rows.flag_cancelling(conn, batch_id)[:INLINE_SEGMENTS]:
        left -= turn_cancelled(conn, segment, left)
        if left <= 0:
            break
    return get_batch(conn, project_id, batch_id)


def turn_cancelled(conn: Connection, segment: UUID, limit: int) -> int:
    """Turn up to `limit` queued jobs of a cancelling segment to cancelled, and end the cancelling when all are."""
    ids = rows.queued_of(conn, segment, limit)
    turned = rows.cancel_queued(conn, ids) if ids else 0
    if len(ids) < limit:
        rows.cancelling_done(conn, segment)
    return turned


def pause_batch(conn: Connection, project_id: UUID, batch_id: UUID) -> BatchView:
    """Claim nothing more of a batch; what runs goes on."""
    get_batch(conn, project_id, batch_id)
    rows.set_paused(conn, batch_id, paused=True)
    return get_batch(conn, project_id, batch_id)


def resume_batch(conn: Connection, project_id: UUID, batch_id: UUID) -> BatchView:
    """Undo a pause."""
    get_batch(conn, project_id, batch_id)
    rows.set_paused(conn, batch_id, paused=False)
    return get_batch(conn, project_id, batch_id)


def retry_batch(conn: Connection, project_id: UUID, batch_id: UUID) -> BatchView:
    """Put the failed and cancelled jobs of a batch back in the queue; large segments follow in the background.

    Raises NotFound, Conflict while the batch is still being cancelled, LimitReached where so many may not be queued.
    """
    get_batch(conn, project_id, batch_id)
    # Whoever would stop it meanwhile judges it by the failures from before.
    stopping.hold(conn, batch_id)
    if rows.is_cancelling(conn, batch_id):
        raise Conflict("the batch is still being cancelled; try again in a moment")
    left = TURNED_AT_ONCE
    later = []
    coming = asked = 0
    for found in rows.to_retry(conn, batch_id):
        asked += int(found["jobs"])
        if found["jobs"] <= left:
            left -= int(found["jobs"])
            turn_retried(conn, batch_id, found["segment_id"])
        else:
            later.append(found["segment_id"])
            coming += int(found["jobs"])
    if later:
        rows.flag_retrying(conn, later, retrying=True)
    limits.hold(conn, project_id, coming=coming, asked=asked)
    stopping.forget(conn, batch_id)
    return get_batch(conn, project_id, batch_id)


def turn_retried(conn: Connection, batch: UUID, segment: UUID) -> int:
    """Put all failed and cancelled jobs of a segment back in the queue."""
    found = rows.retry_segment(conn, batch, segment)
    _lower(conn, found)
    return sum(row["jobs"] for row in found)


def set_priority(conn: Connection, project_id: UUID, batch_id: UUID, priority: int) -> BatchView:
    """Give a batch another priority, -100..100; higher goes first. Raises InvalidRequest, NotFound."""
    if not -100 <= priority <= 100:
        raise InvalidRequest("priority is -100..100", [{"field": "priority", "problem": f"{priority} is out of range"}])
    get_batch(conn, project_id, batch_id)
    rows.set_priority(conn, batch_id, priority)
    return get_batch(conn, project_id, batch_id)


def delete_batch(conn: Connection, project_id: UUID, batch_id: UUID) -> None:
    """Cancel a batch and remove it: it is gone at once for everybody, rows and objects follow in the background."""
    get_batch(conn, project_id, batch_id)
    rows.flag_cancelling(conn, batch_id)
    rows.hide_batch(conn, batch_id)


def _locked(conn: Connection, project_id: UUID, job_id: UUID) -> RowMapping:
    job = rows.lock_job(conn, project_id, job_id)
    if job is None:
        raise NotFound(f"there is no job {job_id}")
    return job


def _lower(conn: Connection, found: Sequence[RowMapping]) -> None:
    places = [(row["segment_id"], row["run_at"], LOWEST_ID) for row in found]
    claiming.lower_heads(conn, places)
