"""Pictures for jobs to start from: sent once, named by the sha256 of their bytes."""

from typing import Annotated

from fastapi import APIRouter, Path, Query, Request
from starlette.responses import Response

from api.bodies import refuse_encoding, spooled
from api.deps import ConnDep, FarmDep, ManagerDep, ReaderDep, SettingsDep, SubmitterDep
from api.middleware import API, media_type
from api.openapi import picture
from api.schemas import UploadListing
from farm import uploads
from farm.errors import UnsupportedMedia
from farm.fields import UploadHash
from farm.views import Page, UploadView

router = APIRouter(prefix="/uploads", tags=["uploads"])

TYPES = ("image/png", "image/jpeg", "image/webp")

Hash = Annotated[UploadHash, Path(description="sha256 of the picture's bytes, 64 hex digits.")]


@router.post(
    "",
    status_code=201,
    response_model=UploadView,
    responses={200: {"model": UploadView, "description": "It was there already"}},
    openapi_extra=picture(TYPES),
)
async def create_upload(request: Request, caller: SubmitterDep, farm: FarmDep) -> Response:
    """Send a picture as the body, with its `Content-Type`. Jobs name it by the `hash` answered here.

    It is looked at before it is decoded: one still picture and nothing else, within the limits. Sending it again
    changes nothing. It stays as long as a job names it, and a while after it was last used.
    """
    kind = media_type(request.headers)
    if kind not in TYPES:
        raise UnsupportedMedia(f"send {', '.join(TYPES)}, not {kind or 'a body without a content type'}")
    refuse_encoding(request)
    async with spooled(request, farm.settings.spool_dir) as (file, _, _):
        stored, new = await farm.looking(
            lambda: uploads.add(farm.database, farm.store, farm.settings, caller.project_id, file.read(), kind)
        )
    where = {"Location": f"{API}/uploads/{stored.hash}"} if new else {}
    return Response(stored.model_dump_json(), 201 if new else 200, where, "application/json")


@router.get("")
def list_uploads(caller: ReaderDep, conn: ConnDep, wanted: Annotated[UploadListing, Query()]) -> Page[UploadView]:
    """The project's uploads, in order of their hashes."""
    return uploads.page(conn, caller.project_id, cursor=wanted.cursor, limit=wanted.limit)


@router.get("/{upload_hash}")
def get_upload(upload_hash: Hash, caller: ReaderDep, conn: ConnDep) -> UploadView:
    """One upload: its type, size and when it was last used."""
    return uploads.get(conn, caller.project_id, upload_hash)


@router.delete("/{upload_hash}", status_code=204)
def delete_upload(upload_hash: Hash, caller: ManagerDep, conn: ConnDep, settings: SettingsDep) -> None:
    """Remove an upload. One that a job names is refused: delete the job first."""
    uploads.delete(conn, caller.project_id, upload_hash, settings)
