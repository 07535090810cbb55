"""The worker's program: `python -m workers.main`, or `main(renderer_factory)` with another renderer (tests)."""

import os
import platform
import signal
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any
from uuid import UUID

import structlog

from farm import __version__, catalogue, jobs
from farm.db import Database
from farm.errors import SchemaMismatch, Unavailable
from farm.ids import new_id
from farm.logs import configure
from farm.queries.claiming import database_now
from farm.settings import Settings
from farm.settings import settings as read_settings
from farm.storage import Store
from workers.app import hear, hostname_of, make_app
from workers.asking import start_asking
from workers.canary import sings
from workers.executor import Executor
from workers.exits import Exit
from workers.feed import Feed
from workers.hints import start_listening
from workers.idling import Idling
from workers.lease import Lease
from workers.leaving import Leaving
from workers.modelstore import ModelStore
from workers.registering.registrar import Registrar
from workers.tasks import register

AGAIN_SECONDS = 1.0
LOOK_SECONDS = 0.5
"""How late a signal may be heard."""
LAST_WORD_SECONDS = 2.0
"""How long Celery may take to say goodbye to Flower."""
CLOCK_TOLERANCE = timedelta(minutes=10)
"""How far the clock may be from the database's. S3 refuses requests that are 15 minutes off."""
STOPPED_BY = (signal.SIGTERM, signal.SIGINT)

RendererFactory = Callable[[Settings, Callable[[str], Path]], Any]

log = structlog.get_logger(__name__)


def engine(settings: Settings, fetch: Callable[[str], Path]) -> Any:
    """The real renderer. Torch is imported here, at the last moment, and only below workers.pipelines."""
    # Read by diffusers when it is imported: no code is ever taken from a model's folder.
    os.environ["DIFFUSERS_DISABLE_REMOTE_CODE"] = "1"
    return import_module("workers.pipelines.engine").Engine(settings, fetch)


def main(renderer_factory: RendererFactory = engine) -> Exit:
    """Serve one device until told to leave; answers the exit status."""
    settings = read_settings()
    configure(settings)
    leaving = Leaving(settings.grace.total_seconds())
    _leave_on_signals(leaving)
    worker = UUID(os.environ["FARM_WORKER_ID"]) if os.environ.get("FARM_WORKER_ID") else new_id()
    structlog.contextvars.bind_contextvars(worker=str(worker))
    # A worker that freezes in the middle of a transaction must not hold its locks longer than its lease.
    database = Database(settings, idle_limit=settings.lease / 2)
    if not _wait_for_schema(database, leaving) or _clock_is_wrong(database):
        return Exit.REFUSED
    store = Store(settings)
    models = ModelStore(database, store, settings)
    renderer = renderer_factory(settings, models.fetch)
    _persist(lambda: _hello(database, settings, worker, renderer.device), leaving)
    lease = Lease(database, settings, worker, leaving, warm=renderer.warm, cache=renderer.cache)
    lease.start()
    wrong = _canary(database, renderer, settings)
    if wrong is None:
        _serve(settings, database, store, models, renderer, worker, lease, leaving)
    else:
        log.critical("the canary does not sing", wrong=wrong)
        leaving.request(Exit.CANARY, hurry=False)
    lease.stop()
    _goodbye(database, worker)
    log.info("left", status=int(leaving.status))
    return leaving.status


def _serve(
    settings: Settings,
    database: Database,
    store: Store,
    models: ModelStore,
    renderer: Any,
    worker: UUID,
    lease: Lease,
    leaving: Leaving,
) -> None:
    """Work until the process is to leave and nothing is held any more."""
    app = make_app(settings)
    hostname = hostname_of(settings, worker)
    feed = Feed(app, hostname, settings.pool)
    executor = Executor(database, store, renderer, settings, worker, leaving=leaving, lease=lease, watcher=feed)
    leaving.at_last(executor.give_back)
    register(app, executor)
    feed.start()
    start_listening(settings, lease.beat_soon, leaving.requested)
    start_asking(executor, settings.poll.total_seconds())
    Idling(executor).start()
    registrar = Registrar(database, store, models, settings, worker, leaving, executor.try_out)
    registrar.start()
    # Not in this thread: leaving must not wait for a broker that hangs.
    hearing = Thread(target=hear, args=[app, hostname, leaving], name="celery", daemon=True)
    hearing.start()
    lease.ready()
    log.info("ready", pool=settings.pool, device=renderer.device, dtype=renderer.dtype, version=__version__)
    # Never for ever: Python runs the handler of a signal that arrives on the brink of a wait only after that wait.
    while not leaving.requested.wait(LOOK_SECONDS):
        pass
    executor.drain()
    registrar.give_back()
    hearing.join(LAST_WORD_SECONDS)


def _canary(database: Database, renderer: Any, settings: Settings) -> str | None:
    """What is wrong with the canary, rendered with the default checkpoint or, where it was removed, with the first."""
    with database.transaction() as conn:
        known = {one.name: one.hash for one in catalogue.list_checkpoints(conn) if one.state == "available"}
    if not known:
        log.warning("no checkpoint is registered: starting without a canary")
        return None
    return sings(renderer, known.get(catalogue.DEFAULT_CHECKPOINT) or known[min(known)], settings)


def _hello(database: Database, settings: Settings, worker: UUID, device: str) -> None:
    with database.transaction() as conn:
        jobs.hello(
            conn,
            worker=worker,
            pool=settings.pool,
            name=settings.worker_name,
            host=platform.node(),
            pid=os.getpid(),
            device=device,
            version=__version__,
        )


def _goodbye(database: Database, worker: UUID) -> None:
    try:
        with database.transaction() as conn:
            jobs.goodbye(conn, worker=worker)
    except Unavailable as error:
        log.warning("left without a goodbye", error=error.message)


def _wait_for_schema(database: Database, leaving: Leaving) -> bool:
    """Whether the schema is ours; waits for Postgres as long as it takes."""
    try:
        _persist(database.check_schema, leaving)
    except SchemaMismatch as error:
        log.critical("this worker does not know the database's schema", error=error.message)
        return False
    return True


def _clock_is_wrong(database: Database) -> bool:
    """Whether this machine's clock is so far from the database's that S3 would refuse every upload.

    Leases believe the database alone; but a signature tells the time, and every attempt would fail after its rendering.
    """
    try:
        with database.transaction() as conn:
            ahead = datetime.now(UTC) - database_now(conn)
    except Unavailable:
        return False
    if abs(ahead) <= CLOCK_TOLERANCE:
        return False
    log.critical(
        "this machine's clock is wrong, and S3 would refuse its uploads: set it, for example by NTP",
        seconds_ahead_of_database=round(ahead.total_seconds()),
    )
    return True


def _persist(act: Callable[[], None], leaving: Leaving) -> None:
    """Try until Postgres answers, or until there is no point any more."""
    while not leaving.requested.is_set():
        try:
            act()
        except Unavailable as error:
            log.warning("waiting for Postgres", error=error.message)
            leaving.requested.wait(AGAIN_SECONDS)
        else:
            return


def _leave_on_signals(leaving: Leaving) -> None:
    # A handler interrupts the main thread anywhere, so it takes no lock and writes no log: a queue made for this passes
    # the signal on to a thread.
    arrived: SimpleQueue[int] = SimpleQueue()
    for number in STOPPED_BY:
        signal.signal(number, lambda received, _frame: arrived.put(received))

    def pass_on() -> None:
        while True:
            arrived.get()
            leaving.request()

    Thread(target=pass_on, name="signals", daemon=True).start()


def run(renderer_factory: RendererFactory = engine) -> None:
    """Be the process: end it with main's status, whatever threads are still about."""
    try:
        status: int = main(renderer_factory)
    except Exception:
        log.exception("the worker could not start")
        status = Exit.BROKEN
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    run()
