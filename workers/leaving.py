"""Leaving in order: take nothing new, finish what fits the grace period, give back the rest, and never hang."""

from collections.abc import Callable
from threading import Event, Lock, Timer
from time import monotonic

import structlog

from workers.exits import Exit, end_process

LAST_WORDS = 0.1
"""Share of the grace period kept for giving back what a hanging thread holds."""
LAST_WORDS_MOST_SECONDS = 2.0

log = structlog.get_logger(__name__)


class Leaving:
    """Whether this process was asked to leave, why, and until when. `grace` in seconds."""

    def __init__(self, grace: float, *, end: Callable[[Exit, str], None] = end_process) -> None:
        self._grace = grace
        self._end = end
        self._lock = Lock()
        self.requested = Event()
        self.status = Exit.LEFT
        self._deadline = float("inf")
        self._last: list[Callable[[], object]] = []

    def at_last(self, act: Callable[[], object]) -> None:
        """What to do for the threads that hang, shortly before the timer ends the process."""
        self._last.append(act)

    def request(self, status: Exit = Exit.LEFT, *, hurry: bool = True) -> None:
        """Leave. With `hurry` the grace period runs from now on, and a timer ends the process when it is over;
        without, what is held is finished first, in its own time. Asking again may only add hurry."""
        with self._lock:
            if not self.requested.is_set():
                self.status = status
            self.requested.set()
            if not hurry or self._deadline < float("inf"):
                return
            kept = min(self._grace * LAST_WORDS, LAST_WORDS_MOST_SECONDS)
            self._deadline = monotonic() + self._grace - kept
        log.info("leaving", grace_seconds=self._grace)
        timer = Timer(self._grace - kept, self._hung, [kept])
        timer.daemon = True
        timer.start()

    @property
    def seconds_left(self) -> float:
        """Until work must be given back; infinite while nobody hurries us."""
        return self._deadline - monotonic()

    def _hung(self, kept: float) -> None:
        watch = Timer(kept, self._end, [Exit.HUNG, "a thread hung until the grace period was over"])
        watch.daemon = True
        watch.start()
        for act in self._last:
            act()
        self._end(Exit.HUNG, "work was still in progress when the grace period was over; it was given back")
