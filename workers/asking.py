"""Asking for work that no doorbell announced: messages get lost, brokers go away, and the jobs are in Postgres."""

from random import Random
from threading import Thread

import structlog

from workers.executor import THREADS, Executor

log = structlog.get_logger(__name__)

_jitter = Random()  # noqa: S311  # keeps workers from asking in step, guards nothing


class Asker(Thread):
    """Asks when it starts, when a claim left work behind, and every `poll` seconds (jittered by half of it)."""

    def __init__(self, executor: Executor, poll: float) -> None:
        super().__init__(name="asker", daemon=True)
        self._executor = executor
        self._poll = poll

    def run(self) -> None:
        leaving = self._executor.leaving.requested
        while not leaving.is_set():
            try:
                self._executor.work()
            except Exception:
                # The claim it may have held is left to its lease; asking again is all that a thread can do about it.
                log.exception("working failed")
            self._executor.more_work.wait(self._poll * _jitter.uniform(0.5, 1.5))
            self._executor.more_work.clear()


def start_asking(executor: Executor, poll: float) -> None:
    """As many threads as may work at once: without a broker they are all there is."""
    for _ in range(THREADS):
        Asker(executor, poll).start()
