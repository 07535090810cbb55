"""One job: submit, look, cancel, retry, delete."""

import hashlib
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from api.bodies import JsonBytes, parse
from api.deps import ConnDep, FarmDep, ManagerDep, NoticesDep, ReaderDep, SubmitterDep
from api.examples import FULL_JOB, JOB, JOBS_WITH_COUNT
from api.openapi import body as documented
from api.schemas import JobListing, Rehearsal
from api.submitting import IdempotencyKey, Moment, Once, Submission, answer, only_job, store
from farm import jobs, limits
from farm.errors import InvalidRequest, Problem
from farm.jobspec import JobSpec
from farm.views import BatchView, DryRun, JobView, Page

router = APIRouter(prefix="/jobs", tags=["jobs"])

EXAMPLES = {"shortest": JOB, "everything": FULL_JOB, "four seeds": JOBS_WITH_COUNT}


@router.post(
    "",
    status_code=201,
    response_model=JobView | BatchView,
    responses={200: {"model": DryRun, "description": "`dry_run=true`: what it would do; nothing was stored"}},
    openapi_extra=documented(JobSpec, EXAMPLES),
)
def create_job(
    request: Request,
    caller: SubmitterDep,
    body: JsonBytes,
    farm: FarmDep,
    notices: NoticesDep,
    conn: ConnDep,
    wanted: Annotated[Rehearsal, Query()],
    key: IdempotencyKey = None,
) -> Response:
    """Submit one job. With `count` over 1 it becomes that many jobs with rising seeds, and the answer is their batch.

    201 means that it is stored: whatever happens to servers after that, it ends succeeded, failed or cancelled.
    """
    once = Once.of(request, caller.project_id, key, hashlib.sha256(body).digest())
    if not wanted.dry_run and (before := once.answered(conn, farm)) is not None:
        return before
    if not wanted.dry_run:
        limits.refuse_full(conn, caller.project_id)
    spec = parse(body)
    labels = spec.get("labels")
    try:
        checked = Moment.of(conn, farm, caller.project_id, lasting=False).check(
            Submission([spec], labels=labels if isinstance(labels, dict) else {}), farm
        )
    except InvalidRequest as error:
        problems = [Problem(field=found["field"], problem=found["problem"]) for found in error.problems]
        raise InvalidRequest("the job is not valid", problems=problems) from None
    with checked as prepared:
        if wanted.dry_run:
            return answer(prepared.dry_run())
        batch = store(conn, prepared, farm, caller.project_id)
        single = prepared.jobs == 1
    notices.work = True
    return once.created(conn, only_job(conn, batch, caller.project_id) if single else batch)


@router.get("")
def list_jobs(caller: ReaderDep, conn: ConnDep, wanted: Annotated[JobListing, Query()]) -> Page[JobView]:
    """The project's jobs, newest first."""
    return jobs.list_jobs(
        conn,
        caller.project_id,
        states=wanted.state,
        labels=wanted.labels,
        cursor=wanted.cursor,
        limit=wanted.limit,
    )


@router.get("/{job_id}")
def get_job(job_id: UUID, caller: ReaderDep, conn: ConnDep) -> JobView:
    """One job."""
    return jobs.get_job(conn, caller.project_id, job_id)


@router.delete("/{job_id}", status_code=204)
def delete_job(job_id: UUID, caller: ManagerDep, farm: FarmDep, conn: ConnDep) -> None:
    """Remove a job and its image. A running job is refused: cancel it first."""
    jobs.delete_job(conn, caller.project_id, job_id, keep=farm.settings.keep_deleted)


@router.post("/{job_id}/cancel")
def cancel_job(job_id: UUID, caller: ManagerDep, notices: NoticesDep, conn: ConnDep) -> JobView:
    """Cancel a job: a queued one at once, a running one at its next denoising step. Twice changes nothing."""
    notices.cancel = True
    return jobs.cancel_job(conn, caller.project_id, job_id)


@router.post("/{job_id}/replay", status_code=201, response_model=JobView)
def replay_job(
    request: Request,
    job_id: UUID,
    caller: SubmitterDep,
    farm: FarmDep,
    notices: NoticesDep,
    conn: ConnDep,
    key: IdempotencyKey = None,
) -> Response:
    """Render a job's recipe again, as a job of its own beside it, and compare the two pictures.

    Once the new job has succeeded, its `replay` tells how far they are apart. Only a job with a picture can be
    replayed.
    """
    once = Once.of(request, caller.project_id, key, b"")
    if (before := once.answered(conn, farm)) is not None:
        return before
    notices.work = True
    return once.created(conn, jobs.replay_job(conn, caller.project_id, job_id))


@router.post("/{job_id}/retry")
def retry_job(job_id: UUID, caller: ManagerDep, notices: NoticesDep, conn: ConnDep) -> JobView:
    """Put a failed or cancelled job back in the queue."""
    notices.work = True
    return jobs.retry_job(conn, caller.project_id, job_id)
