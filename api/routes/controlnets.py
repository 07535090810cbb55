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
def list_controlnets(caller: ReaderDep, conn: ConnDep) -> Page[ControlNetView]:
    """ControlNets that jobs of your project may name, and the family each is made for. An admin sees all."""
    return Page(items=catalogue.list_controlnets(conn, caller.sees))


@router.post("", status_code=ACCEPTED, openapi_extra=documented(ControlNetBody, {"edges": CONTROLNET}))
def add_controlnet(
    _: AdminDep, body: JsonBytes, settings: SettingsDep, response: Response, conn: ConnDep
) -> RegistrationView:
    """Register a ControlNet: a worker fetches, checks, stores and tests it. Poll the registration in `Location`."""
    return accepted(conn, response, settings, read(body, ControlNetBody), "controlnet")
