"""Checkpoints a job may name."""

from fastapi import APIRouter

from api.deps import ConnDep, ReaderDep
from farm import catalogue
from farm.views import CheckpointView, Page

router = APIRouter(prefix="/checkpoints", tags=["models"])


@router.get("")
def list_checkpoints(_: ReaderDep, conn: ConnDep) -> Page[CheckpointView]:
    """Every checkpoint with its profile: default size, steps and guidance, and its limits."""
    return Page(items=catalogue.list_checkpoints(conn))
