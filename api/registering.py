"""Accepting a model to register: the same for checkpoints, VAEs, ControlNets, motion adapters and LoRAs."""

from fastapi import Response
from sqlalchemy import Connection

from api.middleware import API
from api.schemas import AdapterBody, CheckpointBody, ControlNetBody, MotionBody, VaeBody
from farm import registrations
from farm.modelkinds import ModelKind
from farm.settings import Settings
from farm.views import RegistrationView

ACCEPTED = 202


def accepted(
    conn: Connection,
    response: Response,
    settings: Settings,
    wanted: CheckpointBody | VaeBody | ControlNetBody | MotionBody | AdapterBody,
    kind: ModelKind | None,
) -> RegistrationView:
    """Ask for a model of a kind; None for an adapter that does not say which.

    Raises InvalidRequest for a source or a project that is none, Conflict if the name is taken or being registered.
    """
    more = wanted.model_dump(exclude={"name", "source", "kind", "project"}, exclude_none=True)
    made = registrations.ask(
        conn,
        name=wanted.name,
        kind=kind,
        source=wanted.source,
        wanted=more,
        pool=settings.pool,
        project=wanted.project,
    )
    response.headers["Location"] = f"{API}/registrations/{made.id}"
    return made
