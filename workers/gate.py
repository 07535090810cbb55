"""Who may claim next: a thread gets its turn only once the device is about to be free.

Otherwise the second thread of a busy worker would sit on jobs that an idle worker elsewhere could have.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition
from time import monotonic

from workers.leaving import Leaving

LEAVING_LOOK_SECONDS = 0.5


class Turn:
    """The right to claim and to use the device next; over at the last denoising step, or when it fails before."""

    def __init__(self, gate: "Gate", given: bool) -> None:
        self._gate, self._given = gate, given
        self._kept = False
        self.over_at = 0.0

    def __bool__(self) -> bool:
        return self._given

    def keep(self) -> None:
        """Let nobody claim before everything is done."""
        self._kept = True

    def over(self) -> None:
        """Let the next thread claim. Harmless when repeated."""
        self.over_at = self.over_at or monotonic()
        if not self._kept:
            self.close()

    def close(self) -> None:
        if self._given:
            self._given = False
            self._gate.open()


class Gate:
    """One thread at a time is between claiming and its last denoising step."""

    def __init__(self, leaving: Leaving) -> None:
        self._leaving = leaving
        self._changed = Condition()
        self._taken = False

    @contextmanager
    def turn(self) -> Iterator[Turn]:
        """Wait for the turn; it is false once the process is leaving."""
        with self._changed:
            while self._taken and not self._leaving.requested.is_set():
                self._changed.wait(LEAVING_LOOK_SECONDS)
            given = not self._leaving.requested.is_set()
            self._taken |= given
        turn = Turn(self, given)
        try:
            yield turn
        finally:
            turn.close()

    def open(self) -> None:
        with self._changed:
            self._taken = False
            self._changed.notify()
