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
def list_motions(caller: ReaderDep, conn: ConnDep) -> Page[MotionView]:
    """Motion adapters that jobs of your project may name, the family each is made for and how many frames it knows. An
    admin sees all."""
    return Page(items=catalogue.list_motions(conn, caller.sees))


@router.post("", status_code=ACCEPTED, openapi_extra=documented(MotionBody, {"AnimateLCM": MOTION}))
def add_motion(
    _: AdminDep, body: JsonBytes, settings: SettingsDep, response: Response, conn: ConnDep
) -> RegistrationView:
    """Register a motion adapter: a worker fetches, checks, stores and tests it. Poll the registration in `Location`."""
    return accepted(conn, response, settings, read(body, MotionBody), "motion")
