"""Liveness is progress, not a pulse: a worker that takes no work although there is some for it is broken, and ends.

Asking costs one claim that is rolled back, and only a worker that took nothing lately asks. Whatever keeps a healthy
worker from claiming keeps this claim from finding anything: paused segments, limits of projects, jobs of later. A
broker that is away changes nothing, as workers ask Postgres on their own; without Postgres there is no answer, and
nobody ends.
"""

from collections.abc import Callable
from random import Random
from threading import Thread
from time import monotonic

import structlog

from farm import jobs
from farm.errors import Unavailable
from farm.ids import new_id
from workers.executor import Executor
from workers.exits import Exit, end_process

LOOKS = 4
"""How often it is looked within the limit. Every look has to find work that nobody took."""

log = structlog.get_logger(__name__)

_choices = Random()  # noqa: S311  # draws which segments are looked at, guards nothing


class Idling(Thread):
    """Ends the process when work was claimable by this very worker for `limit_idle` while it claimed none."""

    def __init__(
        self,
        executor: Executor,
        *,
        end: Callable[[Exit, str], None] = end_process,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        super().__init__(name="idling", daemon=True)
        self._executor = executor
        self._limit = executor.settings.limit_idle.total_seconds()
        self._end = end
        self._clock = clock
        self._claims = executor.claims
        self._since: float | None = None
        """Since when every look found work for us."""

    def run(self) -> None:
        while not self._executor.leaving.requested.wait(self._limit / LOOKS):
            self.look()

    def look(self) -> None:
        """One look; to be repeated."""
        claims, now = self._executor.claims, self._clock()
        if claims != self._claims or self._executor.lease.held or not self._claimable():
            self._claims, self._since = claims, None
        elif self._since is None:
            self._since = now
        elif now - self._since >= self._limit:
            self._end(Exit.IDLE, f"there was work for this worker for {now - self._since:.0f} s, and it took none")

    def _claimable(self) -> bool:
        """Whether a claim would find something just now; takes nothing."""
        executor = self._executor
        try:
            with executor.database.transaction() as conn:
                found = jobs.claim(
                    conn,
                    claim_id=new_id(),
                    worker=executor.worker,
                    pool=executor.settings.pool,
                    warm=executor.warm(),
                    limit=1,
                    settings=executor.settings,
                    random=_choices,
                )
                conn.rollback()
        except Unavailable as error:
            log.debug("could not look for work", error=error.message)
            return False
        return found is not None
