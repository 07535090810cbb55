"""A short cut of every row; `make chaos` runs them at the size they are meant for, and one with `crack-tiny`."""

from pathlib import Path

import pytest

from farm.stack import Servers
from tests.chaos.rows import ROWS
from tests.chaos.suite import run_row

# Two halves that last alike, each in one worker of pytest-xdist: a half shares servers, and some rows kill them.
FIRST = {"R1", "R2", "R3", "R7", "R9", "R10", "soak"}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.xdist_group(f"chaos-{name in FIRST}"))
        for name, row in ROWS.items()
        if not row.real
    ],
)
def test_it_holds(name: str, durable_servers: Servers, tmp_path: Path) -> None:
    report = run_row(name, ROWS[name], durable_servers, tmp_path / name, size="short", seed=1)
    assert not report.violations, "\n".join(f"{one.invariant}: {one.what}" for one in report.violations)
