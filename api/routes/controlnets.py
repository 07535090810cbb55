"""ControlNets that jobs may follow a picture with, and asking for more."""

from fastapi import APIRouter, Response

from api.bodies import JsonBytes, read
from api.deps import AdminDep, ConnDep, ReaderDep, SettingsDep
from api.examples import CONTROLNET
from api.openapi import body as documented
from api.registering import ACCEPTED, accepted
from api.schemas import ControlNetBody
from farm import catalogue
from farm.views import ControlNetView, Page, RegistrationView

router = APIRouter(prefix="/controlnets", tags=["models"])


@router.get("")
def list_controlnets(_: ReaderDep, conn: ConnDep) -> Page[ControlNetView]:
    """Every ControlNet, and the family it is made for."""
    return Page(items=catalogue.list_controlnets(conn))


@router.post("", status_code=ACCEPTED, openapi_extra=documented(ControlNetBody, {"edges": CONTROLNET}))
def add_controlnet(
    _: AdminDep, body: JsonBytes, settings: SettingsDep, response: Response, conn: ConnDep
) -> RegistrationView:
    """Register a ControlNet: a worker fetches, checks, stores and tests it. Poll the registration in `Location`."""
    return accepted(conn, response, settings, read(body, ControlNetBody), "controlnet")
