"""The farm's own processes as the supervisor runs them: API, workers, sweeper and Flower."""

import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from uuid import UUID

import farm
from farm import jobs
from farm.db import Database
from farm.errors import FarmError
from farm.settings import Settings
from farm.stack.datadir import DataDir
from farm.stack.ports import LOOPBACK, answers, get
from farm.stack.service import Program

READY = "/api/v1/health/ready"
LIVE = "/api/v1/health/live"
ASK_EVERY = 0.2
"""Seconds between two health checks of a starting Python process, which takes seconds itself."""
PYTHON = ("-P", "-u", "-m")
"""`-P`: the data directory, where they run, is no place to import from."""
WORKER = "workers.main"
PULSE_AGE = 20.0
"""Seconds after which a pulse that beats every few is missed."""


def environment(settings: Mapping[str, str]) -> dict[str, str]:
    """The supervisor's environment with these `FARM_*` variables; importable code as ours, no stray Flower options."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FLOWER_")}
    ours = str(Path(farm.__file__).parent.parent)
    paths = [ours, *(path for path in inherited.get("PYTHONPATH", "").split(os.pathsep) if path and path != ours)]
    return inherited | dict(settings) | {"PYTHONPATH": os.pathsep.join(paths)}


def api(directory: DataDir, variables: Mapping[str, str], port: int) -> Program:
    return _program(
        directory,
        "api",
        ("api.main",),
        environment(variables),
        address=f"http://{LOOPBACK}:{port}",
        healthy=lambda: get(port, READY) is not None,
        answers=lambda: answers(port, LIVE),
        grace=10.0,
    )


def worker(
    directory: DataDir,
    variables: Mapping[str, str],
    database: Database,
    settings: Settings,
    *,
    name: str,
    device: str,
    worker_id: UUID,
) -> Program:
    """One worker process. It is healthy once Postgres has heard that it is ready for work, and while it hears more."""

    def state() -> str | None:
        with database.transaction() as conn:
            return next((str(found.state) for found in jobs.workers(conn) if found.id == worker_id), None)

    def ready() -> bool:
        try:
            return state() in ("idle", "busy")
        except FarmError:
            return False

    def heard() -> bool:
        try:
            return state() != "lost"
        except FarmError:
            return True  # without Postgres it renders on; nobody can tell how it is

    return _program(
        directory,
        name,
        (WORKER,),
        environment({**variables, "FARM_DEVICE": device, "FARM_WORKER_ID": str(worker_id)}),
        # It listens nowhere. What tells several apart is their device, once it is known which.
        address="-" if device == "auto" else device,
        healthy=ready,
        answers=heard,
        patience=settings.limit_load.total_seconds(),
        # Its own timer ends it at the end of the grace period; ours is for a process that cannot even do that.
        grace=settings.grace.total_seconds() + 5.0,
    )


def sweeper(directory: DataDir, variables: Mapping[str, str]) -> Program:
    """The sweeper, which shows by its pulse, a file it touches, that all of its duties go round."""
    pulse = directory.path / "sweeper.pulse"
    pulse.unlink(missing_ok=True)

    def beats() -> bool:
        try:
            return time.time() - pulse.stat().st_mtime < PULSE_AGE
        except FileNotFoundError:
            return False

    return _program(
        directory,
        "sweeper",
        ("farm.cli", "sweeper", "--pulse", str(pulse)),
        environment(variables),
        address="-",
        healthy=beats,
        answers=beats,
        grace=10.0,
    )


def flower(directory: DataDir, variables: Mapping[str, str], settings: Settings, port: int) -> Program:
    """Flower behind a password, for looking only."""
    password = settings.flower_password
    options = {
        "FLOWER_ADDRESS": LOOPBACK,
        "FLOWER_PORT": str(port),
        "FLOWER_BASIC_AUTH": f"{settings.flower_user}:{password.get_secret_value() if password else ''}",
        "FLOWER_READ_ONLY": "true",
    }
    return _program(
        directory,
        "flower",
        ("farm.flower",),
        environment(variables) | options,
        address=f"http://{LOOPBACK}:{port}",
        healthy=lambda: get(port, "/healthcheck") is not None,
        answers=lambda: answers(port, "/healthcheck"),
        grace=5.0,
    )


def _program(
    directory: DataDir,
    name: str,
    module: tuple[str, ...],
    variables: Mapping[str, str],
    *,
    address: str,
    healthy: Callable[[], bool],
    answers: Callable[[], bool],
    grace: float,
    patience: float = 60.0,
) -> Program:
    return Program(
        name=name,
        arguments=[sys.executable, *PYTHON, *module],
        environment=variables,
        directory=directory.path,
        log=directory.logs / f"{name}.log",
        address=address,
        healthy=healthy,
        patience=patience,
        grace=grace,
        ask_every=ASK_EVERY,
        answers=answers,
    )
