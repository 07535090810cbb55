"""Adapters a job may name, and asking for more."""

from fastapi import APIRouter, Response

from api.bodies import JsonBytes, read
from api.deps import AdminDep, ConnDep, ReaderDep, SettingsDep
from api.examples import ACCELERATION, STYLE
from api.openapi import body as documented
from api.registering import ACCEPTED, accepted
from api.schemas import AdapterBody
from farm import catalogue
from farm.views import AdapterView, Page, RegistrationView

router = APIRouter(prefix="/adapters", tags=["models"])


@router.get("")
def list_adapters(caller: ReaderDep, conn: ConnDep) -> Page[AdapterView]:
    """Adapters that jobs of your project may name, and the family of checkpoints each fits. An admin sees all."""
    return Page(items=catalogue.list_adapters(conn, caller.sees))


@router.post(
    "", status_code=ACCEPTED, openapi_extra=documented(AdapterBody, {"a style": STYLE, "an LCM-LoRA": ACCELERATION})
)
def add_adapter(
    _: AdminDep, body: JsonBytes, settings: SettingsDep, response: Response, conn: ConnDep
) -> RegistrationView:
    """Register a LoRA: a worker fetches, checks, stores and tests it. Poll the registration in `Location`."""
    wanted = read(body, AdapterBody)
    return accepted(conn, response, settings, wanted, wanted.kind)
