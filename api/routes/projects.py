"""Projects: their limits and what they use of them. All of them for admins, the caller's own for whoever may read."""

from uuid import UUID

from fastapi import APIRouter

from api.bodies import JsonBytes, read
from api.deps import AdminDep, ConnDep, NoticesDep, ReaderDep
from api.examples import LIMITS
from api.openapi import body as documented
from api.schemas import LimitsBody
from farm import limits
from farm.views import Page
from farm.views_tenants import ProjectView

router = APIRouter(tags=["projects"])


@router.get("/project")
def get_own_project(caller: ReaderDep, conn: ConnDep) -> ProjectView:
    """The project of the key that asks: its limits and how much of each is used."""
    return limits.get(conn, caller.project_id)


@router.get("/projects")
def list_projects(_: AdminDep, conn: ConnDep) -> Page[ProjectView]:
    """Every project with its limits and use, by name."""
    return Page(items=limits.every(conn))


@router.patch("/projects/{project_id}", openapi_extra=documented(LimitsBody, {"some limits": LIMITS}))
def change_limits(project_id: UUID, _: AdminDep, body: JsonBytes, notices: NoticesDep, conn: ConnDep) -> ProjectView:
    """Set limits of a project; null takes one away, what is absent stays. What is accepted already stays too."""
    wanted = read(body, LimitsBody)
    # The limit of requests is remembered with the key.
    notices.revoked = True
    return limits.change(conn, project_id, wanted.model_dump(exclude_unset=True))
