"""The right to render: one heartbeat for all claims of this process, and a limit for every phase of the work.

Threads cannot be killed, so the process is crash-only: claims are renewed as long as every phase is within its limit,
and a phase over its limit ends the process. Postgres being away ends nothing; only Postgres says what was lost.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Condition, Lock, Thread
from typing import Any, Literal
from uuid import UUID

import psutil
import structlog

from farm import jobs
from farm.db import Database
from farm.errors import Unavailable
from farm.jobs import Claimed, ClaimedJob
from farm.settings import Settings
from workers.exits import Exit, end_process
from workers.leaving import Leaving
from workers.resting import Rests

HEARTBEATS_APART = 0.25
"""Least share of the heartbeat interval between two beats, however many cancels are hinted."""
TICKS_PER_HEARTBEAT = 4
"""How often phases are looked at."""

WorkerState = Literal["starting", "idle", "busy", "leaving"]
Phase = Literal["load", "wait", "merge", "step", "decode", "store", "finish"]

log = structlog.get_logger(__name__)


@dataclass(eq=False)
class Held:
    """One claim of this process: its jobs, the phase they are in, and what the database said about them."""

    claim_id: UUID
    jobs: tuple[ClaimedJob, ...]
    lost: bool = False
    cancelled: frozenset[UUID] = frozenset()
    phase: Phase = "load"
    _limit: float | None = None
    _since: float = field(default_factory=time.monotonic)

    def enter(self, phase: Phase, limit: float | None = None) -> None:
        """A phase begins, and may take `limit` seconds. Waiting for another thread or for Postgres has no limit."""
        self.phase, self._since, self._limit = phase, time.monotonic(), limit

    @property
    def seconds(self) -> float:
        """How long the present phase has lasted."""
        return time.monotonic() - self._since

    @property
    def overdue(self) -> bool:
        limit = self._limit
        return limit is not None and self.seconds > limit


class Lease:
    """Renews what this process holds, learns what it lost and what was cancelled, and watches phases and memory."""

    def __init__(
        self,
        database: Database,
        settings: Settings,
        worker: UUID,
        leaving: Leaving,
        *,
        warm: Callable[[], Sequence[dict[str, Any]]] = tuple,
        cache: Callable[[], Mapping[str, Any]] = dict,
        rests: Rests | None = None,
        end: Callable[[Exit, str], None] = end_process,
    ) -> None:
        self.rests = rests or Rests(settings)
        self._database = database
        self._settings = settings
        self._worker = worker
        self._leaving = leaving
        self._warm, self._cache = warm, cache
        self._end = end
        self._interval = settings.heartbeat.total_seconds()
        self._lock = Lock()
        self._held: dict[UUID, Held] = {}
        self._wake = Condition()
        self._hinted = False
        self._stopped = False
        self._ready = False
        self._reachable = True
        self._threads = [
            Thread(target=self._guarded, args=[self._beat_on], name="heartbeat", daemon=True),
            Thread(target=self._guarded, args=[self._watch_on], name="watch", daemon=True),
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def ready(self) -> None:
        """From now on this worker takes work, and says so at once."""
        self._ready = True
        self.beat_soon()

    def stop(self) -> None:
        """Beat no more. Anything still held is left to its lease."""
        with self._wake:
            self._stopped = True
            self._wake.notify_all()
        for thread in self._threads:
            thread.join(self._interval)

    @contextmanager
    def hold(self, claimed: Claimed) -> Iterator[Held]:
        """Renew this claim until the block ends."""
        held = Held(claimed.claim_id, claimed.jobs)
        with self._lock:
            self._held[held.claim_id] = held
        try:
            yield held
        finally:
            with self._lock:
                del self._held[held.claim_id]

    @property
    def held(self) -> list[Held]:
        with self._lock:
            return list(self._held.values())

    def beat_soon(self) -> None:
        """There is something to ask or tell (a hint came that jobs were cancelled): do not wait for the next beat."""
        with self._wake:
            self._hinted = True
            self._wake.notify_all()

    def beat(self) -> None:
        """One heartbeat: renew, tell, learn. Raises Unavailable."""
        held = {one.claim_id: one for one in self.held if not one.overdue}
        with self._database.transaction() as conn:
            if held:
                renewal = jobs.renew(conn, worker=self._worker, claims=list(held), settings=self._settings)
            jobs.tell(
                conn,
                worker=self._worker,
                state=self._state(held),
                warm=self._warm(),
                cache=self._cache(),
                resting=self.rests.told(),
            )
        if held:
            self._learn(held, renewal.lost, renewal.cancelled)

    def _learn(self, held: dict[UUID, Held], lost: Collection[UUID], cancelled: frozenset[UUID]) -> None:
        for claim_id, one in held.items():
            # A claim that is just being finished is closed, which renewing cannot tell from lost; finishing can.
            if claim_id in lost and not one.lost and one.phase != "finish":
                log.warning("claim lost", claim=str(claim_id), phase=one.phase)
            one.lost = claim_id in lost
            one.cancelled = one.cancelled | cancelled

    def _state(self, held: Collection[UUID]) -> WorkerState:
        if self._leaving.requested.is_set():
            return "leaving"
        if not self._ready:
            return "starting"
        return "busy" if held else "idle"

    def _beat_on(self) -> None:
        while not self._stopped:
            try:
                self.beat()
                if not self._reachable:
                    log.info("Postgres is back")
                self._reachable = True
            except Unavailable as error:
                # Rendering goes on; what we hold may be rescued once the lease ran out, and then finishing says so.
                if self._reachable:
                    log.warning("no heartbeat", error=error.message)
                self._reachable = False
            time.sleep(self._interval * HEARTBEATS_APART)
            with self._wake:
                self._wake.wait_for(
                    lambda: self._hinted or self._stopped, timeout=self._interval * (1 - HEARTBEATS_APART)
                )
                self._hinted = False

    def _watch_on(self) -> None:
        process = psutil.Process()
        most = self._settings.max_worker_rss_bytes
        while not self._stopped:
            for one in self.held:
                if one.overdue:
                    self._end(Exit.PHASE, f"{one.phase} has taken {one.seconds:.1f} s, claim {one.claim_id}")
            if most is not None and not self._leaving.requested.is_set() and process.memory_info().rss > most:
                log.error("over the memory limit: finishing what is held, then leaving", limit_bytes=most)
                self._leaving.request(Exit.MEMORY, hurry=False)
            with self._wake:
                self._wake.wait_for(lambda: self._stopped, timeout=self._interval / TICKS_PER_HEARTBEAT)

    def _guarded(self, run: Callable[[], None]) -> None:
        """Without these threads a process would render for nobody, so it ends with them."""
        try:
            run()
        except Exception:
            log.exception("a thread the process cannot do without ended")
            self._end(Exit.BROKEN, "heartbeat or watch ended")
