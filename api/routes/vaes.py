"""VAEs a job may name instead of its checkpoint's own, and asking for more."""

from fastapi import APIRouter, Response

from api.bodies import JsonBytes, read
from api.deps import AdminDep, ConnDep, ReaderDep, SettingsDep
from api.examples import VAE
from api.openapi import body as documented
from api.registering import ACCEPTED, accepted
from api.schemas import VaeBody
from farm import catalogue
from farm.views import Page, RegistrationView, VaeView

router = APIRouter(prefix="/vaes", tags=["models"])


@router.get("")
def list_vaes(caller: ReaderDep, conn: ConnDep) -> Page[VaeView]:
    """VAEs that jobs of your project may name, and the family whose latents each decodes. An admin sees all."""
    return Page(items=catalogue.list_vaes(conn, caller.sees))


@router.post("", status_code=ACCEPTED, openapi_extra=documented(VaeBody, {"SDXL in half precision": VAE}))
def add_vae(_: AdminDep, body: JsonBytes, settings: SettingsDep, response: Response, conn: ConnDep) -> RegistrationView:
    """Register a VAE: a worker fetches, checks, stores and tests it. Poll the registration in `Location`."""
    return accepted(conn, response, settings, read(body, VaeBody), "vae")
