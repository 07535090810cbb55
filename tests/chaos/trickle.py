"""Work that keeps coming in while a row breaks things, and how long each submission takes meanwhile."""

import time
from statistics import quantiles
from threading import Event, Thread
from typing import Self

from tests.chaos.harness import Chaos


class Trickle:
    """Submits a few jobs again and again while the block runs. `phase` names what is broken just now."""

    def __init__(self, chaos: Chaos, *, every: float = 0.2, jobs: int = 2) -> None:
        self.phase = "normal"
        self.seconds: dict[str, list[float]] = {}
        self._chaos, self._every, self._jobs = chaos, every, jobs
        self._done = Event()
        self._thread = Thread(target=self._run, name="trickle", daemon=True)
        self._error: Exception | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(200)
        if self._error is not None:
            self._chaos.fail(f"a submission was not accepted: {self._error!r}")

    def p99(self, phase: str) -> float:
        """Seconds of the slowest submission but one in a hundred."""
        taken = self.seconds.get(phase, [])
        return quantiles(taken, n=100)[98] if len(taken) > 1 else float("nan")

    def _run(self) -> None:
        try:
            while not self._done.is_set():
                phase, began = self.phase, time.monotonic()
                made = self._chaos.client.submit(self._jobs)
                self.seconds.setdefault(phase, []).append(made.seconds)
                self._done.wait(max(0.0, self._every - (time.monotonic() - began)))
        except Exception as error:  # noqa: BLE001  # told when the block ends
            self._error = error
