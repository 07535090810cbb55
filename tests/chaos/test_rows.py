"""A short cut of every row; `make chaos` runs them at the size they are meant for."""

from pathlib import Path

import pytest

from farm.stack import Servers
from tests.chaos.processes import ENGINE, PRELOAD
from tests.chaos.rows import ROWS
from tests.chaos.suite import run_row

# Two halves that last alike, each in one worker of pytest-xdist: a half shares servers, and some rows kill them.
# The real renderer begins its half: the process that all others are forked from then brings PyTorch.
FIRST = {"R1", "R2", "R3", "R5", "R7", "R9", "R10", "soak"}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.xdist_group(f"chaos-{name in FIRST}")) for name in ROWS]
)
def test_it_holds(name: str, durable_servers: Servers, tmp_path: Path) -> None:
    if ROWS[name].real:
        PRELOAD.append(ENGINE)
    report = run_row(name, ROWS[name], durable_servers, tmp_path / name, size="short", seed=1)
    assert not report.violations, "\n".join(f"{one.invariant}: {one.what}" for one in report.violations)
