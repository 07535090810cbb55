"""Workers and what they keep warm."""

from fastapi import APIRouter

from api.deps import ConnDep, ReaderDep
from farm import jobs
from farm.views import Page, WorkerView

router = APIRouter(prefix="/workers", tags=["monitoring"])


@router.get("")
def list_workers(caller: ReaderDep, conn: ConnDep) -> Page[WorkerView]:
    """Every worker that has not left, with device, state and warm pipelines. Models of others are told by hash."""
    return Page(items=jobs.workers(conn, caller.sees))
