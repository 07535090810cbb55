"""How long the machine stood still: a run cannot blame the farm for seconds in which nobody got a turn."""

import time
from threading import Event, Thread

TICK_SECONDS = 0.1
LEAST_SECONDS = 0.5
"""A tick that comes later than this was held up by the machine, not by this process's own threads."""


class Stalls:
    """Counts the seconds by which its own ticks came late: a machine that sleeps, is frozen, or is overbooked."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._done = Event()
        self._thread = Thread(target=self._run, name="stalls", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._done.set()
        self._thread.join(10)

    def _run(self) -> None:
        last = time.monotonic()
        while not self._done.wait(TICK_SECONDS):
            now = time.monotonic()
            late = now - last - TICK_SECONDS
            last = now
            if late > LEAST_SECONDS:
                self.seconds += late
