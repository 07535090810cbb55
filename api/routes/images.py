"""Pictures: a short-lived address in S3, so that no picture passes through the API."""

from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query
from starlette.responses import RedirectResponse, Response

from api.deps import ConnDep, Farm, FarmDep, ReaderDep
from api.schemas import Link
from api.submitting import answer
from farm import jobs
from farm.views import ImageLink

router = APIRouter(prefix="/jobs", tags=["images"])

REDIRECTED: dict[int | str, dict[str, Any]] = {
    307: {"description": "The picture lies at `Location`; fetch it there without a key."}
}


@router.get("/{job_id}/image", response_model=ImageLink, responses=REDIRECTED)
def get_image(
    job_id: UUID, caller: ReaderDep, farm: FarmDep, conn: ConnDep, wanted: Annotated[Link, Query()]
) -> Response:
    """The picture, as its job asked for it, by redirect to where it can be fetched for a while without a key."""
    image = jobs.image_of(conn, caller.project_id, job_id)
    return _link(farm, image.key, job_id, wanted)


@router.get("/{job_id}/thumbnail", response_model=ImageLink, responses=REDIRECTED)
def get_thumbnail(
    job_id: UUID, caller: ReaderDep, farm: FarmDep, conn: ConnDep, wanted: Annotated[Link, Query()]
) -> Response:
    """A small copy of the picture (WebP), by redirect to where it can be fetched for a while without a key. A picture
    that is no larger than a thumbnail is its own."""
    image = jobs.image_of(conn, caller.project_id, job_id)
    return _link(farm, image.thumbnail_key, job_id, wanted)


def _link(farm: Farm, key: str, job_id: UUID, wanted: Link) -> Response:
    filename = f"{job_id}.{key.rpartition('.')[2]}"
    lasting = farm.settings.presign_expiry
    until = datetime.now(UTC) + lasting
    url = farm.store.presign(key, filename, lasting)
    if wanted.redirect:
        # A cache that kept the redirect past the address's end would serve an error.
        return RedirectResponse(url, 307, {"Cache-Control": "no-store"})
    return answer(ImageLink(url=url, expires_at=until, sha256=_sha256(key)))


def _sha256(key: str) -> str:
    """Every object's key ends in its own hash: `.../attempt-sha256.ext`."""
    return key.rpartition("-")[2].partition(".")[0]
