"""The queue as Postgres has it: exact, never the length of a list in Redis."""

from fastapi import APIRouter

from api.deps import ConnDep, ReaderDep
from farm import jobs
from farm.views import LaneView, Page

router = APIRouter(prefix="/queue", tags=["monitoring"])


@router.get("")
def list_lanes(caller: ReaderDep, conn: ConnDep) -> Page[LaneView]:
    """Depth, oldest age (seconds), running jobs and images per second of each lane with open jobs, deepest first.

    The checkpoint of a lane is told by hash where it is another project's."""
    return Page(items=jobs.queue(conn, caller.sees))
