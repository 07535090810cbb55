"""The sweeper: duties that keep promises when nobody else is there to.

Each duty has its own thread, its own transactions and an advisory lock, so two sweepers share the work and no duty
waits for another; rescue least of all.
"""

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

import structlog

from farm import doorbell, jobs, stopping, telling, uploads
from farm.courier import Courier
from farm.db import Database
from farm.errors import FarmError, Unavailable
from farm.jobs.changing import TURNED_AT_ONCE, turn_cancelled, turn_retried
from farm.queries import changing, claiming, limits, maintaining, registrations, webhooks, workers
from farm.settings import Settings
from farm.storage import Store

log = structlog.get_logger(__name__)

FOLDED_AT_ONCE = 5_000
SEGMENTS_AT_ONCE = 500
OBJECTS_AT_ONCE = 500
UPLOADS_AT_ONCE = 500
ERROR_PAUSE_SECONDS = 1.0
PULSE_SECONDS = 5.0
LONGEST_TURN_SECONDS = 900.0
"""A duty that takes longer over one piece of its work hangs: its statements and requests have far shorter limits."""


@dataclass(frozen=True, slots=True)
class Duty:
    """One thing the sweeper does: `work` answers True when it wants to go on at once."""

    name: str
    every: timedelta
    work: Callable[[], bool]


class Sweeper:
    """All duties of one sweeper process. Any number of sweepers may run."""

    def __init__(self, settings: Settings, database: Database | None = None, store: Store | None = None) -> None:
        self.settings = settings
        self.database = database or Database(settings)
        self.store = store or Store(settings)
        self._turned: dict[str, float] = {}
        second = settings.sweep_every
        self.duties = (
            Duty("rescue", settings.rescue_every, self.rescue),
            Duty("fold", second, self.fold),
            Duty("ring", second, self.ring),
            Duty("settle", settings.rescue_every, self.settle),
            Duty("turn", second, self.turn),
            Duty("delete", second, self.delete),
            Duty("objects", second * 5, self.objects),
            Duty("uploads", second * 60, self.uploads),
            Duty("prune", second * 60, self.prune),
            Duty("recount", second * 60, self.recount),
        )

    def wait_for_schema(self, stop: threading.Event, pulse: Callable[[], None] = lambda: None) -> None:
        """Wait until Postgres answers, or until `stop` is set. Raises SchemaMismatch: what another release keeps in the
        database is not ours to tidy."""
        while not stop.is_set():
            try:
                self.database.check_schema()
            except Unavailable as error:
                log.warning("waiting for Postgres", error=error.message)
                pulse()
                stop.wait(ERROR_PAUSE_SECONDS)
            else:
                return

    def run(self, stop: threading.Event, pulse: Callable[[], None] = lambda: None) -> None:
        """Do all duties and carry messages to webhooks until `stop` is set. `pulse` is called every few seconds while
        none of them hangs."""
        courier = Courier(self.settings)
        duties = (*self.duties, Duty("webhooks", self.settings.sweep_every, courier.turn))
        self._turned = {duty.name: time.monotonic() for duty in duties}
        threads = [threading.Thread(target=self._loop, args=(duty, stop), name=duty.name) for duty in duties]
        for thread in threads:
            thread.start()
        while not self._hangs():
            pulse()
            if stop.wait(PULSE_SECONDS):
                break
        stop.wait()
        for thread in threads:
            thread.join()
        courier.close()

    def once(self) -> None:
        """Every duty once, in order, until it has nothing left: for tests and benchmarks."""
        for duty in self.duties:
            while duty.work():
                pass

    def rescue(self) -> bool:
        """Take back the jobs of claims whose lease ran out."""
        with self.database.transaction() as conn:
            # No advisory lock: two rescuers block each other on the rows at worst, and rescue waits for nobody.
            rescued = jobs.rescue(conn, settings=self.settings)
        if rescued:
            log.warning("rescued jobs of vanished workers", jobs=rescued)
            doorbell.ring(self.settings, self.settings.pool)
        return rescued > 0

    def fold(self) -> bool:
        """Fold appended deltas into the counters, tell of the batches that finished by them, and stop those of which
        too many jobs failed."""
        with self.database.transaction() as conn:
            if not maintaining.try_duty(conn, 1):
                return False
            folded = maintaining.fold(conn, FOLDED_AT_ONCE)
            telling.batches_moved(conn, folded.ended)
        if folded.ended:
            # Apart: folding holds rows of projects that whoever retries a batch waits for with its segments in hand.
            with self.database.transaction() as conn:
                for batch in stopping.stop_batches(conn, folded.ended):
                    log.warning("a batch stopped itself: too many of its jobs failed", batch=str(batch))
        return folded.deltas == FOLDED_AT_ONCE

    def ring(self) -> bool:
        """Ring for work that nobody hears of: retries that fell due, doorbells lost with the broker."""
        with self.database.transaction() as conn:
            if not maintaining.try_duty(conn, 2):
                return False
            waiting = maintaining.backlog(conn)
        for pool in waiting:
            doorbell.ring(self.settings, pool["pool"], times=max(1, min(int(pool["queued"]), int(pool["slots"]))))
        return False

    def settle(self) -> bool:
        """Raise the heads of segments past the dead entries of jobs already taken."""
        after = UUID(int=0)
        while True:
            with self.database.transaction() as conn:
                page = maintaining.segments_to_settle(conn, after, SEGMENTS_AT_ONCE)
                if page:
                    claiming.settle_heads(conn, page)
            if len(page) < SEGMENTS_AT_ONCE:
                return False
            after = page[-1]

    def turn(self) -> bool:
        """Turn over the rows behind a cancelled or retried batch, in pieces."""
        with self.database.transaction() as conn:
            if not maintaining.try_duty(conn, 3):
                return False
            turned = 0
            for segment in changing.turning(conn, SEGMENTS_AT_ONCE):
                if segment["cancelling"]:
                    turned += turn_cancelled(conn, segment["id"], TURNED_AT_ONCE)
                else:
                    turned += turn_retried(conn, segment["batch_id"], segment["id"])
                    changing.flag_retrying(conn, [segment["id"]], retrying=False)
                if turned >= TURNED_AT_ONCE:
                    return True
        return False

    def delete(self) -> bool:
        """Remove the rows of deleted batches, in pieces; their objects are doomed in the same transaction."""
        with self.database.transaction() as conn:
            if not maintaining.try_duty(conn, 4):
                return False
            for batch in changing.deleted_batches(conn, 1):
                ids = changing.some_jobs(conn, batch, TURNED_AT_ONCE)
                if ids:
                    changing.delete_jobs(conn, ids, self.settings.keep_deleted)
                else:
                    changing.delete_batch_rows(conn, batch)
                return True
        return False

    def objects(self) -> bool:
        """Delete objects in S3 that nothing refers to any more."""
        with self.database.transaction() as conn:
            if not maintaining.try_duty(conn, 5):
                return False
            keys = maintaining.due_objects(conn, OBJECTS_AT_ONCE)
            if keys:
                # First the objects, then the rows that remember them: a crash in between only repeats a delete.
                gone = set(keys) - maintaining.needed_objects(conn, keys)
                self.store.delete_many(found for key in gone for found in self._objects_of(key))
                maintaining.forget_objects(conn, keys)
        return len(keys) == OBJECTS_AT_ONCE

    def _objects_of(self, key: str) -> list[str]:
        return self.store.keys_below(key) if key.endswith("-") else [key]

    def uploads(self) -> bool:
        """Let go of pictures that people sent and no job has named for long."""
        with self.database.transaction() as conn:
            if not maintaining.try_duty(conn, 7):
                return False
            return uploads.forget_unused(conn, self.settings, UPLOADS_AT_ONCE) == UPLOADS_AT_ONCE

    def prune(self) -> bool:
        """Forget what nobody asks for any more."""
        with self.database.transaction() as conn:
            if maintaining.try_duty(conn, 6):
                maintaining.prune(conn, self.settings.idempotency_ttl)
                workers.prune(conn)
                registrations.prune(conn)
                webhooks.prune(conn, self.settings.webhook_keep)
        return False

    def recount(self) -> bool:
        """Count the open jobs of projects anew: an older sweeper folds without telling them."""
        with self.database.transaction() as conn:
            if maintaining.try_duty(conn, 1) and maintaining.try_duty(conn, 4):
                wrong = limits.recount(conn)
                if wrong:
                    log.warning("open jobs of projects were counted anew", projects=wrong)
        return False

    def _hangs(self) -> bool:
        for name, turned in self._turned.items():
            if (seconds := time.monotonic() - turned) > LONGEST_TURN_SECONDS:
                log.critical("a duty hangs; whoever watches the pulse restarts us", duty=name, seconds=round(seconds))
                return True
        return False

    def _loop(self, duty: Duty, stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                self._turned[duty.name] = time.monotonic()
                while duty.work() and not stop.is_set():
                    self._turned[duty.name] = time.monotonic()
            except FarmError as error:
                log.warning("duty failed, will try again", duty=duty.name, error=error.message)
                stop.wait(ERROR_PAUSE_SECONDS)
            except Exception:
                log.exception("duty failed, will try again", duty=duty.name)
                stop.wait(ERROR_PAUSE_SECONDS)
            stop.wait(duty.every.total_seconds() * random.uniform(0.9, 1.1))  # noqa: S311  # spreads sweepers
