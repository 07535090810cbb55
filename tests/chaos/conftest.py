"""Servers of the suite's own: durable ones, as a server that crashes must keep what it had committed."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from farm.stack import Servers, embedded_servers


@pytest.fixture(scope="session")
def durable_servers() -> Iterator[Servers]:
    """PostgreSQL, Valkey and SeaweedFS, which rows may kill and must leave running."""
    # Not pytest's own folder: as root that one is closed to the user who runs PostgreSQL.
    place = Path(tempfile.mkdtemp(prefix="farm-chaos-"))
    place.chmod(0o711)
    try:
        with embedded_servers(place / "data") as running:
            yield running
    finally:
        shutil.rmtree(place, ignore_errors=True)
