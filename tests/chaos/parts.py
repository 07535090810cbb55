"""The parts of the farm as main functions: what a forked process becomes. Importing this imports all of them."""

import gc
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import boto3
import botocore.loaders

import api.main
from farm import courier, logs
from farm.maintenance import Sweeper
from farm.recipe import Recipe
from farm.settings import Settings
from farm.settings import settings as read_settings
from tests.chaos.faults import Faults, arm
from tests.chaos.history import History
from tests.stub_worker import StubRenderer
from workers import main as worker_main
from workers.pictures import Pixels

LATE = (
    "celery.app.control", "celery.app.events", "celery.concurrency.thread", "celery.events.receiver",
    "celery.fixups.django", "celery.loaders.default", "celery.worker.autoscale", "celery.worker.components",
    "celery.worker.consumer", "celery.worker.pidbox", "celery.worker.strategy", "encodings.idna",
    "kombu.transport.redis", "numpy.random", "workers.broker",
)  # fmt: skip
"""What processes of the farm import only when they need it, and all of them do."""

# What every process of a run would read and sort out anew, a thousand times: late imports, the description of S3 (which
# making a client reads), and all that has been imported, which no collection of garbage in a forked process has to look
# at again.
for _name in LATE:
    import_module(_name)
_loader = botocore.loaders.create_loader()
botocore.loaders.create_loader = lambda *_: _loader
boto3.session.Session().client("s3", region_name="x", aws_access_key_id="x", aws_secret_access_key="x")
gc.collect()
gc.freeze()

EATEN_BYTES = 32 * 1024 * 1024
"""What a step of a job that eats memory takes."""


class Renderer(StubRenderer):
    """The stub, writing a history of what it rendered."""

    def __init__(self, settings: Settings, fetch: Callable[[str], Path], history: History | None, faults: Faults):
        super().__init__(settings, fetch)
        self.step_seconds = faults.step_seconds
        self.words |= dict(faults.words)
        self._history = history
        self._eaten: list[bytes] = []

    def render(
        self, staged: str, recipes: Sequence[Recipe], on_step: Callable[[int, int], Collection[int]]
    ) -> list[Pixels | None]:
        seeds = [recipe.seed for recipe in recipes]
        self._tell("render", seeds)
        word = self.words.get("EAT")
        while word and any(word in recipe.prompt for recipe in recipes):
            # Touched, so that the pages are really there; whoever watches memory ends this.
            self._eaten.append(os.urandom(1) * EATEN_BYTES)
            time.sleep(0.02)
        pictures = super().render(staged, recipes, on_step)
        self._tell("rendered", [seed for seed, picture in zip(seeds, pictures, strict=True) if picture is not None])
        return pictures

    def _tell(self, event: str, seeds: list[int]) -> None:
        # On a full disk the run has no history, and the job goes on.
        with suppress(OSError):
            if self._history is not None:
                self._history.write(event, seeds=seeds)


def run(part: str, faults: Faults, history: Path | None) -> int:
    """Be that part; answers the exit status."""
    arm(faults)
    try:
        match part:
            case "api":
                return api.main.main()
            case "sweeper":
                return _sweeper()
            case "engine":
                worker_main.run()
            case "stub":
                worker_main.run(StubRenderer)
            case _:
                told = None if history is None else History(history, f"worker {os.environ['FARM_WORKER_ID']}")
                worker_main.run(lambda settings, fetch: Renderer(settings, fetch, told, faults))
    except Exception:  # noqa: BLE001  # the end of a process: its log says why
        with suppress(OSError):
            traceback.print_exc()
            sys.stderr.flush()
    return 1


def _sweeper() -> int:
    """As `farm sweeper` runs it."""
    settings = read_settings()
    logs.configure(settings)
    if settings.lease < Settings.model_fields["lease"].default:
        # With the other timers: how long a try at a webhook is waited for after its sweeper was killed.
        courier.LEASE_MARGIN = settings.lease
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    Sweeper(settings).run(stop)
    return 0
