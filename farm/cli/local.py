"""The farm on this machine: its settings for commands that work on the servers themselves, and one for the occasion."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from pydantic import ValidationError

from farm.cli.display import waiting
from farm.cli.options import connect
from farm.errors import InvalidRequest, Problem, Unavailable
from farm.views import BatchView

if TYPE_CHECKING:
    from farm.client import Farm
    from farm.db import Database
    from farm.settings import Settings
    from farm.storage import Store

Stage = Callable[[str], AbstractContextManager[object]]
SERVERS = ("FARM_DATABASE_", "FARM_REDIS_", "FARM_S3_")
"""How the variables start that say where a farm's servers are."""
LOOK_EVERY = 1.0
"""Seconds between two looks at the services of a farm that was started for the occasion."""


def environment(data_dir: Path) -> dict[str, str]:
    """Our environment, completed by what leads to the servers of the farm in `data_dir` unless it leads to some itself.

    Never a mixture of two farms. Raises Unavailable when there is neither.
    """
    own = dict(os.environ)
    if "FARM_DATABASE_URL" in own:
        return own
    file = data_dir / "environment.json"
    try:
        theirs = {str(name): str(value) for name, value in json.loads(file.read_text()).items()}
    except FileNotFoundError:
        raise Unavailable(
            f"no farm is running in {data_dir}, and FARM_DATABASE_URL is not set; "
            "start one with `farm up`, or set the FARM_* variables of a farm"
        ) from None
    except (OSError, ValueError, AttributeError) as error:
        raise InvalidRequest(f"{file} cannot be read: {error}; start the farm again") from error
    return theirs | {name: value for name, value in own.items() if not name.startswith(SERVERS)}


def settings(data_dir: Path) -> "Settings":
    """The settings that `environment` means. Raises InvalidRequest with every variable that is missing or wrong."""
    from farm.settings import Settings

    found = environment(data_dir)
    variables = {name.removeprefix("FARM_").lower(): value for name, value in found.items() if name.startswith("FARM_")}
    try:
        return Settings(**variables)  # type: ignore[arg-type]  # pydantic reads text
    except ValidationError as error:
        problems: list[Problem] = [
            {"field": "_".join(["FARM", *(str(part).upper() for part in found["loc"])]), "problem": found["msg"]}
            for found in error.errors()
        ]
        raise InvalidRequest("the settings are not valid", problems=problems) from None


@contextmanager
def servers(data_dir: Path) -> "Iterator[tuple[Database, Store, Settings]]":
    """Postgres and S3 of a farm, for commands that work on them directly."""
    from farm.db import Database
    from farm.storage import Store

    configured = settings(data_dir)
    database = Database(configured, pool_size=2)
    try:
        database.check_schema()
        yield database, Store(configured), configured
    finally:
        database.dispose()


@dataclass(frozen=True)
class Occasion:
    """A farm to use now. `look` keeps its services alive where nobody else does."""

    farm: "Farm"
    look: Callable[[], None] | None = None

    def wait(self, batch: BatchView, on_progress: Callable[[BatchView], object]) -> BatchView:
        """As `Farm.wait`."""
        while True:
            try:
                return self.farm.wait(batch, LOOK_EVERY if self.look else None, on_progress)
            except TimeoutError:
                if self.look:
                    self.look()


@contextmanager
def some_farm(data_dir: Path) -> Iterator[Occasion]:
    """The farm that is there already, else one that runs in `data_dir` until the block ends."""
    if _is_there(data_dir):
        with connect(data_dir) as farm:
            yield Occasion(farm)
    else:
        with own_farm(data_dir) as occasion:
            yield occasion


@contextmanager
def own_farm(data_dir: Path, stage: Stage = nullcontext) -> Iterator[Occasion]:
    """A farm started now, on a free port, and stopped at the end, also by Ctrl-C and SIGTERM. Raises StackError.

    Starting and stopping each happen within `stage`, which is told what they are.
    """
    from farm.client import Farm
    from farm.stack.stack import Stack

    started = stage("start PostgreSQL, Valkey, S3, API, worker, sweeper and Flower")
    with started, _terminated_like_interrupted(), waiting("starting the farm") as note:
        stack = Stack(data_dir, 0, report=lambda status, event: note(f"{status['name']} {event or status['state']}"))
        stack.up()
    try:
        with _terminated_like_interrupted(), Farm(stack.url, _key(data_dir)) as farm:
            yield Occasion(farm, stack.look)
    finally:
        with stage("stop everything"), waiting("stopping the farm"):
            stack.down()


def _is_there(data_dir: Path) -> bool:
    if os.environ.get("FARM_URL"):
        return True
    if (data_dir / "secrets.json").exists():
        # A farm of this machine. Its address may by now be somebody else's, so the process decides.
        from farm.stack import running

        return running(data_dir) is not None
    return (data_dir / "credentials.json").exists()


def _key(data_dir: Path) -> str:
    return str(json.loads((data_dir / "credentials.json").read_text())["api_key"])


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as Ctrl-C does, so that nothing we started stays behind."""

    def interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
