"""The app and the program: `create_app(settings)` for tests and other servers, `python -m api.main` to run it."""

import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import FrameType

import anyio.to_thread
import uvicorn
from fastapi import APIRouter, Depends, FastAPI
from fastapi.routing import APIRoute
from starlette.middleware import Middleware

import farm as package
from api import errors, openapi
from api.auth import Authenticator
from api.deps import Farm, refuse_unknown_query
from api.middleware import API, Authentication, BodyLimit, RequestLog
from api.routes import (
    adapters,
    batches,
    checkpoints,
    controlnets,
    events,
    health,
    images,
    jobs,
    keys,
    motions,
    projects,
    queue,
    registrations,
    uploads,
    vaes,
    version,
    webhooks,
    workers,
)
from farm import doorbell, logs
from farm.catalogue import Kept
from farm.db import Database
from farm.errors import Unavailable
from farm.logs import get_logger
from farm.settings import Settings
from farm.settings import settings as read_settings
from farm.storage import Store

NOUNS = (
    jobs,
    images,
    batches,
    events,
    uploads,
    checkpoints,
    adapters,
    vaes,
    controlnets,
    motions,
    registrations,
    workers,
    queue,
    keys,
    projects,
    webhooks,
    health,
    version,
)

log = get_logger(__name__)


def create_app(settings: Settings) -> FastAPI:
    """The API with these settings. Servers are reached once its lifespan runs, not before.

    There is no page of documentation, only /api/v1/openapi.json, with a key like everything else.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = settings.api_threads
        database = Database(settings)
        await anyio.to_thread.run_sync(_refuse_other_schema, database)
        store = Store(settings)
        farm = Farm(settings, database, store, Authenticator(database), Kept(store))
        app.state.farm = farm
        app.state.readiness = health.Probe(farm)
        try:
            yield
        finally:
            farm.closing.set()
            with anyio.CancelScope(shield=True):
                await farm.requests.close()
                await anyio.to_thread.run_sync(doorbell.flush, settings)
                app.state.readiness.close()
                database.dispose()

    app = FastAPI(
        title="lcm-farm",
        version=package.__version__,
        lifespan=lifespan,
        openapi_url=f"{API}/openapi.json",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=_operation_id,
        middleware=[Middleware(RequestLog), Middleware(Authentication), Middleware(BodyLimit)],
    )
    api = APIRouter(prefix=API)
    for noun in NOUNS:
        # Health checks are asked by programs that may add what they like, against caches for instance.
        strict = [] if noun is health else [Depends(refuse_unknown_query)]
        api.include_router(noun.router, dependencies=strict)
    app.include_router(api)
    errors.install(app)
    openapi.install(app)
    return app


def _operation_id(route: APIRoute) -> str:
    return route.name


def _refuse_other_schema(database: Database) -> None:
    """Raises SchemaMismatch. Without an answer we start all the same and say "not ready" until there is one."""
    try:
        database.check_schema()
    except Unavailable as error:
        log.warning("started without Postgres", reason=str(error))


class Server(uvicorn.Server):
    """Ends event streams as soon as it is told to leave; otherwise it would wait for them."""

    def __init__(self, settings: Settings) -> None:
        self.app = create_app(settings)
        config = uvicorn.Config(
            self.app,
            host=settings.api_host,
            port=settings.api_port,
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_graceful_shutdown=max(1, int(settings.grace.total_seconds())),
        )
        super().__init__(config)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.end_streams()
        super().handle_exit(sig, frame)

    def end_streams(self) -> None:
        """Let every event stream end at its next look; clients come back by Last-Event-ID."""
        farm = getattr(self.app.state, "farm", None)
        if isinstance(farm, Farm):
            farm.close_streams()


def main() -> int:
    """Serve until SIGTERM or SIGINT; requests under way are finished within the grace period."""
    settings = read_settings()
    logs.configure(settings)
    server = Server(settings)
    for stop in (signal.SIGTERM, signal.SIGINT):
        # uvicorn raises the signal again once it has left; leaving as asked is no failure.
        signal.signal(stop, lambda *_: None)
    server.run()
    return 0 if server.started else 1


if __name__ == "__main__":
    raise SystemExit(main())
