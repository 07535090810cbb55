"""Batches: submit many jobs at once, look, pause, cancel, retry, reprioritise, delete."""

import hashlib
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from api.bodies import JSON, JsonBytes, json_bytes, lines, read, refuse_encoding, spooled
from api.deps import ConnDep, Farm, FarmDep, ManagerDep, Notices, NoticesDep, ReaderDep, SubmitterDep
from api.examples import BATCH
from api.middleware import NDJSON, media_type
from api.openapi import body as documented
from api.openapi import upload as documented_upload
from api.parameters import BatchParameters
from api.schemas import BatchBody, BatchListing, JobListing, PriorityBody
from api.submitting import IdempotencyKey, Moment, Once, Submission, answer, store
from farm import jobs, limits
from farm.errors import InvalidRequest, Problem, UnsupportedMedia
from farm.keys import Caller
from farm.views import BatchView, DryRun, JobView, Page

router = APIRouter(prefix="/batches", tags=["batches"])


@router.post(
    "",
    status_code=201,
    response_model=BatchView,
    responses={200: {"model": DryRun, "description": "`dry_run=true`: what it would do; nothing was stored"}},
    openapi_extra=documented_upload(BatchBody, {"two jobs": BATCH}),
)
async def create_batch(request: Request, caller: SubmitterDep, farm: FarmDep, key: IdempotencyKey = None) -> Response:
    """Submit many jobs, all or nothing: as JSON, or as NDJSON (one job a line) with the defaults in query parameters.

    NDJSON is spooled, checked in constant memory and stored in one short transaction. On bad input nothing is accepted
    and `problems` holds the first hundred of line, field and problem.
    """
    kind = media_type(request.headers)
    parameters = BatchParameters.of(request.query_params)
    if kind in NDJSON:
        refuse_encoding(request)
        async with spooled(request, farm.settings.spool_dir, of_lines=True) as (file, body_hash, size):
            submission = Submission(
                lines(file),
                parameters.name,
                parameters.labels,
                parameters.defaults,
                parameters.stop_at_failed_share,
            )
            once = Once.of(request, caller.project_id, key, body_hash)
            return await farm.checking(
                lambda: _accept(farm, caller, once, submission, dry_run=parameters.dry_run), size
            )
    if kind != JSON:
        raise UnsupportedMedia(f"send {JSON} or application/x-ndjson, not {kind or 'a body without a content type'}")
    parameters.refuse_defaults()
    body = await json_bytes(request)
    once = Once.of(request, caller.project_id, key, hashlib.sha256(body).digest())

    def accept() -> Response:
        batch = read(body, BatchBody)
        share = batch.stop_at_failed_share
        submission = Submission(batch.jobs, batch.name, batch.batch_labels, batch.defaults, share)
        try:
            return _accept(farm, caller, once, submission, dry_run=parameters.dry_run)
        except InvalidRequest as error:
            raise InvalidRequest(error.message, problems=[_in_array(problem) for problem in error.problems]) from None

    return await farm.checking(accept, len(body))


def _accept(farm: Farm, caller: Caller, once: Once, submission: Submission, *, dry_run: bool) -> Response:
    """Two short transactions with the long check between them, so that no connection is held while it runs."""
    with farm.database.transaction() as conn:
        if not dry_run and (before := once.answered(conn, farm)) is not None:
            return before
        if not dry_run:
            limits.refuse_full(conn, caller.project_id)
        moment = Moment.of(conn, farm, caller.project_id, lasting=True)
    with moment.check(submission, farm) as prepared:
        if dry_run:
            return answer(prepared.dry_run())
        with farm.database.transaction() as conn:
            # Asked again: a twin may have been stored while this one was checked.
            if (before := once.answered(conn, farm)) is not None:
                return before
            response = once.created(conn, store(conn, prepared, farm, caller.project_id))
    farm.tell(Notices(work=True))
    return response


def _in_array(problem: Problem) -> Problem:
    """A JSON body has no lines worth naming: the place of a job in its array goes into the field."""
    if "line" not in problem:
        return problem
    field = f"jobs.{problem['line'] - 1}.{problem['field']}".rstrip(".")
    return {"field": field, "problem": problem["problem"]}


@router.get("")
def list_batches(caller: ReaderDep, conn: ConnDep, wanted: Annotated[BatchListing, Query()]) -> Page[BatchView]:
    """The project's batches, newest first."""
    return jobs.list_batches(
        conn, caller.project_id, state=wanted.state, labels=wanted.labels, cursor=wanted.cursor, limit=wanted.limit
    )


@router.get("/{batch_id}")
def get_batch(batch_id: UUID, caller: ReaderDep, conn: ConnDep) -> BatchView:
    """One batch with its counts, rate and estimate."""
    return jobs.get_batch(conn, caller.project_id, batch_id)


@router.get("/{batch_id}/jobs")
def list_batch_jobs(
    batch_id: UUID, caller: ReaderDep, conn: ConnDep, wanted: Annotated[JobListing, Query()]
) -> Page[JobView]:
    """The jobs of a batch in the order they were submitted in."""
    return jobs.list_jobs(
        conn,
        caller.project_id,
        states=wanted.state,
        labels=wanted.labels,
        batch=batch_id,
        cursor=wanted.cursor,
        limit=wanted.limit,
    )


@router.delete("/{batch_id}", status_code=204)
def delete_batch(batch_id: UUID, caller: ManagerDep, notices: NoticesDep, conn: ConnDep) -> None:
    """Cancel a batch and remove it with its jobs and images."""
    notices.cancel = True
    jobs.delete_batch(conn, caller.project_id, batch_id)


@router.post("/{batch_id}/cancel")
def cancel_batch(batch_id: UUID, caller: ManagerDep, notices: NoticesDep, conn: ConnDep) -> BatchView:
    """Cancel whatever of a batch has not finished; running jobs stop at their next denoising step."""
    notices.cancel = True
    return jobs.cancel_batch(conn, caller.project_id, batch_id)


@router.post("/{batch_id}/pause")
def pause_batch(batch_id: UUID, caller: ManagerDep, conn: ConnDep) -> BatchView:
    """Start nothing more of a batch; what runs goes on."""
    return jobs.pause_batch(conn, caller.project_id, batch_id)


@router.post("/{batch_id}/resume")
def resume_batch(batch_id: UUID, caller: ManagerDep, notices: NoticesDep, conn: ConnDep) -> BatchView:
    """Undo a pause."""
    notices.work = True
    return jobs.resume_batch(conn, caller.project_id, batch_id)


@router.post("/{batch_id}/retry")
def retry_batch(batch_id: UUID, caller: ManagerDep, notices: NoticesDep, conn: ConnDep) -> BatchView:
    """Put the failed and cancelled jobs of a batch back in the queue."""
    notices.work = True
    return jobs.retry_batch(conn, caller.project_id, batch_id)


@router.post("/{batch_id}/priority", openapi_extra=documented(PriorityBody, {"before others": {"priority": 10}}))
def set_batch_priority(
    batch_id: UUID, caller: ManagerDep, body: JsonBytes, notices: NoticesDep, conn: ConnDep
) -> BatchView:
    """Give a batch another priority; higher goes first."""
    notices.work = True
    return jobs.set_priority(conn, caller.project_id, batch_id, read(body, PriorityBody).priority)
