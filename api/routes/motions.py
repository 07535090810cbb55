"""Motion adapters that jobs may be animated with, and asking for more."""

from fastapi import APIRouter, Response

from api.bodies import JsonBytes, read
from api.deps import AdminDep, ConnDep, ReaderDep, SettingsDep
from api.examples import MOTION
from api.openapi import body as documented
from api.registering import ACCEPTED, accepted
from api.schemas import MotionBody
from farm import catalogue
from farm.views import MotionView, Page, RegistrationView

router = APIRouter(prefix="/motions", tags=["models"])


@router.get("")
def list_motions(_: ReaderDep, conn: ConnDep) -> Page[MotionView]:
    """Every motion adapter, the family it is made for and how many frames it knows."""
    return Page(items=catalogue.list_motions(conn))


@router.post("", status_code=ACCEPTED, openapi_extra=documented(MotionBody, {"AnimateLCM": MOTION}))
def add_motion(
    _: AdminDep, body: JsonBytes, settings: SettingsDep, response: Response, conn: ConnDep
) -> RegistrationView:
    """Register a motion adapter: a worker fetches, checks, stores and tests it. Poll the registration in `Location`."""
    return accepted(conn, response, settings, read(body, MotionBody), "motion")
