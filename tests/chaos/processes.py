"""The farm's processes as a run starts them: forked from one that has imported everything, so that a thousand
restarts cost seconds. What they run is the product's own main functions; the renderer is the stub.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.chaos.faults import Faults

PRELOAD = ["tests.chaos.rows", "tests.chaos.parts"]
"""The rows too: multiprocessing has every forked process read the run's own main module again, and what that imports
would cost a second for each."""
ENGINE = "tests.chaos.engine"
"""To be added to PRELOAD before the first process starts, where workers with the real renderer are among them."""
PR_SET_PDEATHSIG = 1


class Process:
    """One process of the farm. `part` names the main function in `tests.chaos.parts`."""

    def __init__(
        self, part: str, environment: Mapping[str, str], log: Path, faults: Faults, history: Path | None = None
    ) -> None:
        self.part = part
        self.log = log
        self.faults = faults
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self._process: BaseProcess = context.Process(
            target=become, args=(part, dict(environment), log, faults, history), daemon=True
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.exitcode is None

    @property
    def status(self) -> int | None:
        """Exit status; negative is the signal that ended it."""
        return self._process.exitcode

    def send(self, number: int) -> None:
        """Send a signal, unless the process ended."""
        if self.alive:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def wait(self, seconds: float) -> int | None:
        self._process.join(seconds)
        return self.status

    def kill(self) -> None:
        """End it, frozen or not, and wait until it is gone."""
        self.send(signal.SIGKILL)
        self._process.join(30)

    def said(self, words: str) -> bool:
        return self.log.exists() and words in self.log.read_text(errors="replace")


def become(part: str, environment: dict[str, str], log: Path, faults: Faults, history: Path | None) -> None:
    """In the new process: be that part of the farm, and never come back."""
    # Whatever ends the run ends this process: the one that forked it dies with the run.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    output = os.open("/dev/full" if faults.full_disk else log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    for name in [name for name in os.environ if name.startswith(("FARM_", "STUB_"))]:
        del os.environ[name]
    os.environ.update(environment)
    from tests.chaos import parts

    status = parts.run(part, faults, history)
    with suppress(OSError):
        sys.stderr.flush()
    os._exit(status)
