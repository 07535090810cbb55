"""Adapters a job may name."""

from fastapi import APIRouter

from api.deps import ConnDep, ReaderDep
from farm import catalogue
from farm.views import AdapterView, Page

router = APIRouter(prefix="/adapters", tags=["models"])


@router.get("")
def list_adapters(_: ReaderDep, conn: ConnDep) -> Page[AdapterView]:
    """Every adapter, and the family of checkpoints it fits."""
    return Page(items=catalogue.list_adapters(conn))
