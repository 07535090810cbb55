"""Keeping services alive: what dies is started again, after a pause that grows while it keeps dying; what hangs is
ended, and then started again like the dead.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from random import Random

from farm.backoff import backoff
from farm.errors import StackError
from farm.stack.service import Program, Service, ServiceStatus

LOOK_EVERY = 0.1
"""Seconds between two looks at the processes."""
FIRST_PAUSE = timedelta(milliseconds=500)
LONGEST_PAUSE = timedelta(seconds=30)
WELL_AFTER = 60.0
"""Seconds of health after which earlier deaths no longer count."""
ASK_EVERY = 5.0
"""Seconds between two questions to a healthy service whether it still works."""
MOST_SILENCES = 6
"""So many questions in a row without an answer, and it hangs: half a minute, as a busy machine answers late."""
HUNG_GRACE = 2.0
"""Seconds that what hangs gets to leave by itself."""
REFUSED = 78
"""Exit status of a program that a restart would not help (`workers.exits.Exit.REFUSED`)."""

Report = Callable[[ServiceStatus, str], None]
"""Told of every service that became healthy (empty text) and of whatever else happens to one (in words)."""


def silent(_status: ServiceStatus, _event: str) -> None:
    """Reports nothing."""


@dataclass
class Supervised:
    """A service, how to make its next program, and what to do when its process died."""

    service: Service
    program: Callable[[], Program]
    died: Callable[[], None] = lambda: None
    deaths: int = 0
    """Since it was last well for a while."""
    since: float = field(default_factory=time.monotonic)
    """When its process was started."""
    due: float | None = None
    """When to start it again; `None` while it runs or is left alone."""
    asked: float = field(default_factory=time.monotonic)
    """When it was asked last whether it still works."""
    silences: int = 0
    """Questions in a row that it did not answer."""


class Supervisor:
    """Watches services that are already started. `random` jitters the pauses; times are monotonic seconds."""

    def __init__(self, report: Report, random: Random | None = None) -> None:
        self._report = report
        self._random = random or Random()  # noqa: S311  # no secret
        self._watched: list[Supervised] = []

    def watch(self, service: Service, program: Callable[[], Program], died: Callable[[], None] = lambda: None) -> None:
        self._watched.append(Supervised(service, program, died))

    def run(self, stop: threading.Event) -> None:
        """Look, again and again, until `stop` is set."""
        while not stop.wait(LOOK_EVERY):
            self.look()

    def look(self) -> None:
        """One look at every service."""
        for one in self._watched:
            match one.service.state:
                case "healthy" | "starting" if not one.service.alive:
                    self._bury(one, f"ended with {_exit(one.service)}")
                case "starting":
                    self._await(one)
                case "healthy":
                    self._listen(one)
                case "restarting" if one.due is not None and time.monotonic() >= one.due:
                    self._revive(one)

    def _listen(self, one: Supervised) -> None:
        """Ask a healthy service now and then; end it when it hangs."""
        now = time.monotonic()
        if one.deaths and now - one.since > WELL_AFTER:
            one.deaths = 0
        answers = one.service.program.answers
        if answers is None or now - one.asked < ASK_EVERY:
            return
        one.silences = 0 if answers() else one.silences + 1
        one.asked = time.monotonic()
        if one.silences >= MOST_SILENCES:
            one.service.stop(grace=HUNG_GRACE)
            self._bury(one, f"hung: {one.silences} times in a row without an answer")

    def _bury(self, one: Supervised, what: str) -> None:
        one.silences = 0
        refused = one.service.exit_code == REFUSED
        one.service.mark_dead(restarting=not refused)
        one.died()
        if refused:
            one.due = None
            self._report(one.service.status(), f"{what}: not started again; see {one.service.program.log}")
            return
        one.deaths += 1
        pause = backoff(one.deaths, FIRST_PAUSE, LONGEST_PAUSE, self._random).total_seconds()
        one.due = time.monotonic() + pause
        self._report(one.service.status(), f"{what}; starting again in {pause:.1f} s")

    def _revive(self, one: Supervised) -> None:
        one.due = None
        one.since = time.monotonic()
        try:
            one.service.program = one.program()
            one.service.spawn()
        except StackError as error:
            self._bury(one, f"could not be started: {error}")

    def _await(self, one: Supervised) -> None:
        if one.service.check():
            self._report(one.service.status(), "")
        elif time.monotonic() - one.since > one.service.program.patience:
            one.service.stop()
            self._bury(one, f"was not healthy within {one.service.program.patience:.0f} s")


def _exit(service: Service) -> str:
    code = service.exit_code
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
