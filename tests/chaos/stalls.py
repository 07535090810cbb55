"""When the machine stood still: a run cannot blame the farm for seconds in which nobody got a turn."""

import time
from collections.abc import Sequence
from threading import Event, Thread

TICK_SECONDS = 0.1
LEAST_SECONDS = 0.5
"""A tick that comes later than this was held up by the machine, not by this process's own threads."""

Interval = tuple[float, float]
"""Begin and end, in seconds since the epoch, as the history's."""


class Stalls:
    """Notes when its own ticks came late: a machine that sleeps, is frozen, or is overbooked."""

    def __init__(self) -> None:
        self._noted: list[Interval] = []
        self._ticked = time.time()
        self._done = Event()
        self._thread = Thread(target=self._run, name="stalls", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._done.set()
        self._thread.join(10)

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return sum(end - begin for begin, end in self._all())

    def within(self, begin: float, end: float) -> float:
        """Seconds between two moments in which the machine stood still."""
        return within(self._all(), begin, end)

    def lately(self, seconds: float, moment: float | None = None) -> float:
        """Seconds of standing still among the last `seconds` before `moment` (now) in which the machine ran."""
        return lately(self._all(), seconds, time.time() if moment is None else moment)

    def _all(self) -> list[Interval]:
        # Whoever asks may be awake before the ticks are.
        ticked, now = self._ticked, time.time()
        standing = [(ticked + TICK_SECONDS, now)] if now - ticked - TICK_SECONDS > LEAST_SECONDS else []
        return [*self._noted, *standing]

    def _run(self) -> None:
        while not self._done.wait(TICK_SECONDS):
            now = time.time()
            if now - self._ticked - TICK_SECONDS > LEAST_SECONDS:
                self._noted.append((self._ticked + TICK_SECONDS, now))
            self._ticked = now


def within(stalls: Sequence[Interval], begin: float, end: float) -> float:
    """Seconds of these intervals that lie between two moments."""
    return sum(max(0.0, min(end, last) - max(begin, first)) for first, last in stalls)


def lately(stalls: Sequence[Interval], seconds: float, moment: float) -> float:
    """Seconds of these intervals, which follow each other, that one passes going back from `moment` until `seconds`
    outside of them were passed as well: a standstill longer than what is waited for excuses all of itself."""
    stood = 0.0
    for first, end in reversed(stalls):
        last = min(end, moment)
        if moment - stood - last >= seconds:
            break
        stood += max(0.0, last - first)
    return stood
