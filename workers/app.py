"""The Celery side of a worker: hears doorbells, answers Flower. Nothing that happens here decides about jobs."""

import socket
from threading import Thread
from uuid import UUID

import structlog
from celery import Celery, signals
from celery.worker import control, state

from farm import doorbell
from farm.settings import Settings
from workers.executor import THREADS
from workers.leaving import Leaving

ANSWERED = frozenset({
    "active", "active_queues", "clock", "conf", "heartbeat", "hello", "ping", "query_task", "registered",
    "report", "reserved", "revoked", "scheduled", "stats",
})  # fmt: skip
"""Remote control that only looks. Whoever reaches Redis must not stop, pause or reroute a worker through it."""
AGAIN_SECONDS = 1.0

log = structlog.get_logger(__name__)


def make_app(settings: Settings) -> Celery:
    """The farm's Celery app as a worker runs it, with a transport that survives garbage."""
    app = doorbell.make_app(settings, timeout=doorbell.WORKER_TIMEOUT_SECONDS)
    app.conf.broker_transport = "workers.broker:Transport"
    for command in set(control.Panel.data) - ANSWERED:
        del control.Panel.data[command]
    # Being connected makes Celery leave logging as it is.
    signals.setup_logging.connect(_keep_logging, weak=False)
    return app


def hostname_of(settings: Settings, worker: UUID) -> str:
    """The worker's name in Flower."""
    return f"{settings.pool}-{worker.hex[-8:]}@{socket.gethostname()}"


def hear(app: Celery, hostname: str, leaving: Leaving) -> None:
    """Serve doorbells in this thread until the process leaves. Broker trouble ends nothing: it starts over."""
    Thread(target=_stop_with, args=[leaving], name="stop-celery", daemon=True).start()
    while not leaving.requested.is_set():
        state.should_stop = None
        if leaving.requested.is_set():
            return
        worker = app.WorkController(
            hostname=hostname,
            pool="threads",
            concurrency=THREADS,
            without_gossip=True,
            without_mingle=True,
            task_events=True,
        )
        worker.start()
        if not leaving.requested.is_set():
            log.error("Celery's consumer ended; the worker goes on and starts it again", status=worker.exitcode)
            leaving.requested.wait(AGAIN_SECONDS)


def _stop_with(leaving: Leaving) -> None:
    leaving.requested.wait()
    # Celery's loop looks at this flag at least once a second.
    state.should_stop = 0


def _keep_logging(**_: object) -> None:
    """Our own set-up stays."""
