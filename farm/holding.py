"""Holding a registration: its lease is renewed while somebody works on it, and whoever lost it learns so."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from time import monotonic

import structlog

from farm import registrations
from farm.db import Database
from farm.errors import Unavailable
from farm.registrations import Claim, Lost
from farm.settings import Settings

log = structlog.get_logger(__name__)


class Holding:
    """One attempt under way. Every method but `stop` raises Lost once the registration is somebody else's."""

    def __init__(
        self,
        database: Database,
        settings: Settings,
        claim: Claim,
        *,
        progress: Callable[[], int] = lambda: 0,
        overdue: Callable[[str], None] = lambda _stage: None,
    ) -> None:
        """`progress` answers the bytes fetched so far; `overdue` is told of a stage that ran over its limit."""
        self.claim = claim
        self.stage = "waiting"
        self._database, self._settings = database, settings
        self._progress, self._overdue = progress, overdue
        self._lost, self._stopped = Event(), Event()
        self._ends = float("inf")
        self._thread = Thread(target=self._renew_on, name="registration", daemon=True)
        self._thread.start()

    def enter(self, stage: str, limit: float | None = None, **known: object) -> None:
        """A stage begins, and may take `limit` seconds."""
        self.check()
        self.stage, self._ends = stage, monotonic() + limit if limit else float("inf")
        with self._database.transaction() as conn:
            registrations.enter(conn, self.claim, stage, **known)

    def check(self) -> None:
        """Go on only while it is ours."""
        if self._lost.is_set():
            raise Lost

    def stop(self) -> None:
        """Renew no more."""
        self._stopped.set()
        self._thread.join()

    def _renew_on(self) -> None:
        while not self._stopped.wait(self._settings.heartbeat.total_seconds()):
            if monotonic() > self._ends:
                self._overdue(self.stage)
            try:
                with self._database.transaction() as conn:
                    fetched = self._progress() if self.stage == "fetching" else None
                    registrations.renew(conn, self.claim, self._settings, fetched)
            except Lost:
                self._lost.set()
                return
            except (Unavailable, OSError) as error:
                log.warning("a registration's lease was not renewed", error=str(error))


@contextmanager
def holding(
    database: Database, settings: Settings, claim: Claim, **more: Callable[..., int | None]
) -> Iterator[Holding]:
    """Hold a registration until the block ends; what the block says last decides what becomes of it."""
    held = Holding(database, settings, claim, **more)  # type: ignore[arg-type]
    try:
        yield held
    finally:
        held.stop()


def upload(database: Database, settings: Settings, claim: Claim, send: Callable[[], None]) -> None:
    """Send a registration's files and hand it to the workers; cancel it if that fails. Raises what `send` raises."""
    try:
        with holding(database, settings, claim) as held:
            send()
            held.check()
    except BaseException:
        with database.transaction() as conn:
            registrations.cancel(conn, claim.id, settings)
        raise
    with database.transaction() as conn:
        registrations.give_back(conn, claim, settings)
