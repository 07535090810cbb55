"""Who may claim next: a thread gets its turn only once the device is about to be free.

Otherwise the second thread of a busy worker would sit on jobs that an idle worker elsewhere could have. "About to be
free" is what claiming and staging took lately.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Condition

from workers.leaving import Leaving

LEAVING_LOOK_SECONDS = 0.5


AHEAD_MOST_SECONDS = 1.0
"""A cold load takes minutes, but claiming that long before the device is free would keep jobs from idle workers."""


@dataclass
class Lately:
    """How many seconds something took lately: the longest time, halved with each time it went faster."""

    seconds: float = 0.0

    def took(self, seconds: float) -> None:
        self.seconds = max(seconds, self.seconds / 2)


@dataclass(frozen=True)
class Pace:
    """How long the parts of a micro-batch take: `ahead` is claiming and staging, `render` all of it on the device."""

    ahead: Lately = field(default_factory=Lately)
    render: Lately = field(default_factory=Lately)
    decode: Lately = field(default_factory=Lately)
    store: Lately = field(default_factory=Lately)

    def claim_is_due(self, to_go: float, each_step: float) -> bool:
        """Whether the next micro-batch would come too late if it was claimed one step from now. In seconds."""
        return to_go - each_step <= min(self.ahead.seconds, AHEAD_MOST_SECONDS)


class Turn:
    """The right to claim and to use the device next; over when the next claim is due, or when it fails before."""

    def __init__(self, gate: "Gate", given: bool) -> None:
        self._gate, self._given = gate, given
        self._kept = False

    def __bool__(self) -> bool:
        return self._given

    def keep(self) -> None:
        """Let nobody claim before everything is done."""
        self._kept = True

    def over(self) -> None:
        """Let the next thread claim. Harmless when repeated."""
        if not self._kept:
            self.close()

    def close(self) -> None:
        if self._given:
            self._given = False
            self._gate.open()


class Gate:
    """One thread at a time is between claiming and the moment from which the next claim is due."""

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
