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
def list_adapters(_: ReaderDep, conn: ConnDep) -> Page[AdapterView]:
    """Every adapter, and the family of checkpoints it fits."""
    return Page(items=catalogue.list_adapters(conn))


@router.post(
    "", status_code=ACCEPTED, openapi_extra=documented(AdapterBody, {"a style": STYLE, "an LCM-LoRA": ACCELERATION})
)
def add_adapter(
    _: AdminDep, body: JsonBytes, settings: SettingsDep, response: Response, conn: ConnDep
) -> RegistrationView:
    """Register a LoRA: a worker fetches, checks, stores and tests it. Poll the registration in `Location`."""
    wanted = read(body, AdapterBody)
    return accepted(conn, response, settings, wanted, wanted.kind)
