"""API keys, for admins."""

from uuid import UUID

from fastapi import APIRouter

from api.bodies import JsonBytes, read
from api.deps import AdminDep, ConnDep, NoticesDep
from api.examples import KEY
from api.openapi import body as documented
from api.schemas import KeyBody
from farm import keys
from farm.views import KeyView, Page

router = APIRouter(prefix="/keys", tags=["keys"])


@router.post("", status_code=201, openapi_extra=documented(KeyBody, {"a producer": KEY}))
def create_key(caller: AdminDep, body: JsonBytes, conn: ConnDep) -> KeyView:
    """Make a key, and its project if there is none of this name. The secret is in this answer and nowhere else."""
    wanted = read(body, KeyBody)
    return keys.create_key(
        conn,
        project=wanted.project or caller.project,
        name=wanted.name,
        scopes=wanted.scopes,
        expires_at=wanted.expires_at,
    )


@router.get("")
def list_keys(_: AdminDep, conn: ConnDep) -> Page[KeyView]:
    """Every key of every project, without secrets."""
    return Page(items=keys.list_keys(conn))


@router.delete("/{key_id}", status_code=204)
def revoke_key(key_id: UUID, _: AdminDep, notices: NoticesDep, conn: ConnDep) -> None:
    """End a key: at once here, within seconds in other API processes. Twice changes nothing."""
    notices.revoked = True
    keys.revoke_key(conn, key_id)
