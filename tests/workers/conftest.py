"""Worker processes with the stub renderer, a sweeper, and timers scaled down."""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

from farm import doorbell
from farm.db import Database
from farm.maintenance import Sweeper
from farm.settings import Settings
from farm.storage import Store
from tests.chaos.faults import Faults
from tests.chaos.processes import Process
from tests.farm.conftest import Queue
from tests.workers.ordered import Ordered
from workers.executor import Executor
from workers.exits import Exit

ROOT = Path(__file__).parents[2]
SECONDS = 60.0
"""Far more than anything takes, for machines that do ten things at once."""


def until(said: Callable[[], Any], seconds: float = SECONDS) -> Any:
    """Ask until the answer is true; answers it. Fails after `seconds`."""
    end = time.monotonic() + seconds
    while not (answer := said()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)
    return answer


@pytest.fixture
def settings(settings: Settings, tmp_path: Path) -> Settings:
    """Timers scaled down: the lease by five, which a worker on a busy machine still keeps."""
    return settings.model_copy(
        update={
            "heartbeat": timedelta(seconds=0.5),
            "lease": timedelta(seconds=4),
            "poll": timedelta(seconds=0.5),
            "rescue_every": timedelta(seconds=0.25),
            "sweep_every": timedelta(seconds=0.25),
            "retry_backoff": timedelta(seconds=0.1),
            "grace": timedelta(seconds=4),
            "cache_dir": tmp_path / "cache",
            "micro_batch": 4,
            "database_pool_size": 6,
            "log_format": "console",
        }
    )


def environment_of(settings: Settings) -> dict[str, str]:
    """The settings as a child process reads them."""
    written = {}
    for name, value in settings:
        plain = value.get_secret_value() if hasattr(value, "get_secret_value") else value
        if isinstance(plain, timedelta):
            plain = plain.total_seconds()
        if plain is not None:
            written[f"FARM_{name.upper()}"] = str(plain)
    return written


class WorkerProcess:
    """One stub worker; `log` is where it writes. Forked from a process that has imported everything."""

    def __init__(self, settings: Settings, log: Path, **knobs: str) -> None:
        self._process = Process("stub", {**environment_of(settings), **knobs}, log, Faults())
        self.pid = self._process.pid
        self.log = log

    def signal(self, number: int) -> None:
        self._process.send(number)

    def wait(self, seconds: float = SECONDS) -> int:
        status = self._process.wait(seconds)
        assert status is not None, "it did not end in time"
        return status

    def said(self, words: str) -> bool:
        return self._process.said(words)

    @property
    def alive(self) -> bool:
        return self._process.alive


Start = Callable[..., WorkerProcess]


@pytest.fixture
def start(settings: Settings, store: Store, tmp_path: Path) -> Iterator[Start]:
    """Start stub workers: `start(STUB_HANG="word")`; all are gone after the test. Answers once the worker is ready."""
    started: list[WorkerProcess] = []

    def begin(settings: Settings = settings, *, ready: bool = True, **knobs: str) -> WorkerProcess:
        worker = WorkerProcess(settings, tmp_path / f"worker-{len(started)}.log", **knobs)
        started.append(worker)
        if ready:
            until(lambda: worker.said("ready") or not worker.alive)
        return worker

    yield begin
    for worker in started:
        if worker.alive:
            worker.signal(signal.SIGCONT)
            worker.signal(signal.SIGKILL)
        worker.wait()
        sys.stdout.write(worker.log.read_text())


@contextmanager
def sweeping(settings: Settings) -> Iterator[None]:
    """The sweeper's duties, running until the block ends."""
    stop = Event()
    thread = Thread(target=Sweeper(settings).run, args=[stop], daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(10)


@pytest.fixture
def sweeper(settings: Settings) -> Iterator[None]:
    with sweeping(settings):
        yield


@pytest.fixture
def farm(database: Database, settings: Settings, store: Store) -> Queue:
    """A producer and the database, in one."""
    return Queue(database, settings)


@pytest.fixture
def ring(settings: Settings) -> Callable[[], None]:
    return lambda: doorbell.ring(settings, settings.pool)


@pytest.fixture
def renderer() -> Ordered:
    return Ordered()


@pytest.fixture
def executor(
    database: Database, store: Store, settings: Settings, farm: Queue, renderer: Ordered
) -> Iterator[Executor]:
    ended: list[Exit] = []
    yield Executor(database, store, renderer, settings, farm.worker, end=lambda status, _why: ended.append(status))
    assert ended == []
