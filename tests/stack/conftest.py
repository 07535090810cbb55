"""Data directories for stacks of their own."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """A data directory that does not exist yet, in a folder that other users may walk through."""
    folder = Path(tempfile.mkdtemp(prefix="farm-stack-"))
    folder.chmod(0o711)
    yield folder / "data"
    shutil.rmtree(folder, ignore_errors=True)
