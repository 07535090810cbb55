"""Rendering a job again, to see whether the same recipe still gives the same picture."""

from uuid import UUID

from sqlalchemy import Connection

from farm import limits
from farm.errors import Conflict, NotFound
from farm.ids import new_id
from farm.jobs.reading import get_job
from farm.queries import changing, claiming, replaying
from farm.states import JobState
from farm.views import JobView


def replay_job(conn: Connection, project_id: UUID, job_id: UUID) -> JobView:
    """Queue the very recipe of a job that succeeded as a job of its own, beside it; answers the new job.

    It is claimed, retried and rescued as every job. Its worker compares the two pictures, and the finish that
    publishes its picture stores the difference: `replay` of the new job. The original stays untouched, and none of its
    labels go along, so no export takes the replay for another picture of it. Raises NotFound, Conflict for a job that
    has no picture, LimitReached.
    """
    found = changing.lock_job(conn, project_id, job_id)
    if found is None:
        raise NotFound(f"there is no job {job_id}")
    if found["state"] != JobState.SUCCEEDED:
        raise Conflict(f"job {job_id} is {found['state']}; only a job with a picture can be replayed")
    batch, segment, job = new_id(), new_id(), new_id()
    now = claiming.database_now(conn)
    pixel_steps = replaying.insert_replay(conn, job_id, batch=batch, segment=segment, job=job, now=now)
    limits.hold(conn, project_id, pixel_steps=pixel_steps, asked=1)
    return get_job(conn, project_id, job)
