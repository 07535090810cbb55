"""Checkpoints a job may name, and asking for more."""

from fastapi import APIRouter, Response

from api.bodies import JsonBytes, read
from api.deps import AdminDep, ConnDep, ReaderDep, SettingsDep
from api.examples import CHECKPOINT
from api.openapi import body as documented
from api.registering import ACCEPTED, accepted
from api.schemas import CheckpointBody
from farm import catalogue
from farm.views import CheckpointView, Page, RegistrationView

router = APIRouter(prefix="/checkpoints", tags=["models"])


@router.get("")
def list_checkpoints(caller: ReaderDep, conn: ConnDep) -> Page[CheckpointView]:
    """Checkpoints that jobs of your project may name, with their profiles: default size, steps and guidance, and
    limits. An admin sees all."""
    return Page(items=catalogue.list_checkpoints(conn, caller.sees))


@router.post("", status_code=ACCEPTED, openapi_extra=documented(CheckpointBody, {"SDXL from the hub": CHECKPOINT}))
def add_checkpoint(
    _: AdminDep, body: JsonBytes, settings: SettingsDep, response: Response, conn: ConnDep
) -> RegistrationView:
    """Register a checkpoint: a worker fetches, checks, stores and tests it. Poll the registration in `Location`."""
    return accepted(conn, response, settings, read(body, CheckpointBody), "checkpoint")
