"""Work that keeps coming in while a row breaks things, and how long each submission takes meanwhile."""

import time
from statistics import quantiles
from threading import Event, Thread
from typing import Self

from tests.chaos.harness import Chaos
from tests.chaos.stalls import TICK_SECONDS


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

    def percentile(self, phase: str, percent: int) -> float:
        """Seconds that so many of a hundred submissions took at most. Of 100 of them 99 says what the slowest took."""
        taken = self.seconds.get(phase, [])
        return quantiles(taken, n=100)[percent - 1] if len(taken) > 1 else float("nan")

    def _run(self) -> None:
        try:
            while not self._done.is_set():
                phase, began, stood = self.phase, time.monotonic(), self._chaos.stalls.seconds
                made = self._chaos.client.submit(self._jobs)
                self._done.wait(max(TICK_SECONDS * 2, self._every - (time.monotonic() - began)))
                # A machine that stood still meanwhile says nothing about the farm.
                if self._chaos.stalls.seconds == stood:
                    self.seconds.setdefault(phase, []).append(made.seconds)
        except Exception as error:  # noqa: BLE001  # told when the block ends
            self._error = error
