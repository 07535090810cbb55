"""What is running."""

from fastapi import APIRouter

import farm
from api.deps import CallerDep
from api.schemas import Version
from farm.models import SCHEMA_VERSION

router = APIRouter(prefix="/version", tags=["monitoring"])


@router.get("")
async def get_version(_: CallerDep) -> Version:
    """The farm's version and that of its database schema. Any key may ask."""
    return Version(version=farm.__version__, schema_version=SCHEMA_VERSION)
