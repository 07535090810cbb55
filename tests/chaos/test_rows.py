"""A short cut of every row; `make chaos` runs them at the size they are meant for."""

from pathlib import Path

import pytest

from farm.stack import Servers
from tests.chaos.rows import ROWS
from tests.chaos.suite import run_row

# One worker of pytest-xdist for all: they share servers, and some kill them.
pytestmark = pytest.mark.xdist_group("chaos")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ROWS)
def test_it_holds(name: str, durable_servers: Servers, tmp_path: Path) -> None:
    report = run_row(name, ROWS[name], durable_servers, tmp_path / name, size="short", seed=1)
    assert not report.violations, "\n".join(f"{one.invariant}: {one.what}" for one in report.violations)
