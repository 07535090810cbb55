"""The real API on real servers: uvicorn in a thread, spoken to over HTTP."""

import logging
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
import structlog
from sqlalchemy import text

from api.main import Server
from farm import jobs, keys
from farm.catalogue import ModelFile
from farm.db import Database
from farm.jobs import Result, StoredImage, Warm
from farm.modelfiles import FoundModel
from farm.queries import models as model_rows
from farm.schema import Base
from farm.settings import Settings
from farm.states import Outcome
from farm.storage import Store
from tests.conftest import TEMPLATE, administer, with_database

PROMPT = "A single split crack on a concrete wall"
EVERYTHING = ("admin", "jobs:read", "jobs:write")
TLS = httpx.create_ssl_context()
"""For all clients: none speaks TLS here, and each would read the list of authorities for itself, 30 ms a time."""
HEALTH = {"/health/live", "/health/ready"}
PROFILE = {"width": 128, "height": 128, "min_size": 64, "max_size": 256, "steps": 4, "guidance_scale": 1.0}
"""A checkpoint's profile: sizes in pixels."""


def small(settings: Settings) -> Settings:
    """These settings with small limits, so that going past them is quick, and any free port."""
    return settings.model_copy(
        update={
            "api_port": 0,
            "database_pool_size": 5,
            "max_body_bytes": 200_000,
            "max_upload_bytes": 400_000,
            "max_image_bytes": 500_000,
            "max_image_pixels": 65_536,
            "grace": timedelta(seconds=2),
        }
    )


@pytest.fixture(scope="session", autouse=True)
def _plain_logs() -> Iterator[None]:
    """Tracebacks without local variables: a console in colours takes half a minute to draw those."""
    structlog.configure(
        processors=[structlog.processors.format_exc_info, structlog.processors.KeyValueRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
    )
    yield
    structlog.reset_defaults()


class Api:
    """A running API, a key for it, and what a worker would do to its jobs."""

    def __init__(self, url: str, server: Server, database: Database, settings: Settings) -> None:
        self.url = url
        self.server = server
        self.database = database
        self.settings = settings
        self.key = self.new_key()
        self.http = self.client(self.key)

    def new_key(self, *scopes: str, project: str = "cracks", expires_at: Any = None) -> str:
        """An API key, with every scope unless told otherwise."""
        with self.database.transaction() as conn:
            made = keys.create_key(
                conn, project=project, name="test", scopes=scopes or EVERYTHING, expires_at=expires_at
            )
        assert made.key is not None
        return made.key

    def client(self, key: str | None) -> httpx.Client:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=f"{self.url}/api/v1", headers=headers, timeout=30, verify=TLS)

    def submit(self, count: int = 1, **fields: Any) -> Any:
        """Submit `count` prompts as one batch; the batch's document."""
        rows = [{"prompt": f"{PROMPT} {n}", "seed": n} for n in range(count)]
        answer = self.http.post("/batches", json={"jobs": rows, "defaults": fields})
        assert answer.status_code == 201, answer.text
        return answer.json()

    def stored(self) -> dict[str, int]:
        """How many rows a submission left behind."""
        tables = ("batches", "segments", "jobs", "recipes", "counters", "idempotency")
        with self.database.transaction() as conn:
            return {table: conn.execute(text(f"SELECT count(*) FROM {table}")).scalar_one() for table in tables}

    def render(self, limit: int = 100, *, outcome: Outcome = Outcome.SUCCEEDED) -> list[UUID]:
        """Claim and finish up to `limit` jobs as a worker would; their ids."""
        claim_id = uuid4()
        with self.database.transaction() as conn:
            claimed = jobs.claim(
                conn,
                claim_id=claim_id,
                worker=uuid4(),
                pool=self.settings.pool,
                warm=Warm(),
                limit=limit,
                settings=self.settings,
            )
        assert claimed is not None, "there was nothing to claim"
        results = []
        for job in claimed.jobs:
            image, code = None, "render-failed"
            if outcome is Outcome.SUCCEEDED:
                image, code = StoredImage(*keys_of(job.id), "a" * 64, 100, 128, 128, 10), ""
            results.append(Result(job.id, job.attempt, outcome, image, code, code))
        with self.database.transaction() as conn:
            jobs.finish(conn, claim_id=claim_id, results=results, settings=self.settings)
        return [job.id for job in claimed.jobs]


def keys_of(job_id: UUID) -> tuple[str, str]:
    """Object keys of a job's picture and thumbnail, in the shape that workers give them."""
    return f"p/{job_id}/1-{'a' * 64}.png", f"p/{job_id}/1-{'b' * 64}.webp"


@contextmanager
def serving(settings: Settings) -> Iterator[Server]:
    """A server in a thread; it leaves as SIGTERM would make it leave."""
    server = Server(settings)
    thread = threading.Thread(target=server.run, name="api")
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive())
        assert server.started, "the API did not start"
        yield server
    finally:
        server.handle_exit(signal.SIGTERM, None)
        thread.join(20)
        assert not thread.is_alive(), "the API did not stop"


def address(server: Server) -> str:
    host, port = server.servers[0].sockets[0].getsockname()[:2]
    return f"http://{host}:{port}"


def until(true: Callable[[], Any], seconds: float = 10.0) -> Any:
    """Wait until something is true, and answer what it was."""
    ends = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < ends, "it did not happen in time"
        time.sleep(0.005)
    return found


def add_models(database: Database) -> None:
    """Checkpoints and adapters without files worth the name: the API only resolves them."""
    models = (
        ("crack-tiny", "a", "crack-tiny", "checkpoint"),
        ("big", "c", "sdxl", "checkpoint"),
        ("lcm", "b", "crack-tiny", "acceleration"),
        ("moss", "d", "crack-tiny", "style"),
        ("big-moss", "e", "sdxl", "style"),
    )
    with database.transaction() as conn:
        for name, mark, family, kind in models:
            profile = PROFILE if kind == "checkpoint" else {}
            found = FoundModel(hash=mark * 64, family=family, bytes=1, files=(), profile=profile, source={})
            model_rows.insert(conn, name=name, kind=kind, found=found)
            model_rows.insert_files(conn, found.hash, [ModelFile("weights.safetensors", "models/x", mark * 64, 1)])


@pytest.fixture(scope="session")
def shared(server_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """One API with a catalogue for all tests that leave it as it was."""
    name = f"api_{uuid4().hex}"
    administer(server_settings, f"CREATE DATABASE {name} TEMPLATE {TEMPLATE} STRATEGY FILE_COPY")
    spool = tmp_path_factory.mktemp("spool")
    own = with_database(server_settings, name).model_copy(
        update={"s3_bucket": name.replace("_", "-"), "redis_prefix": f"{name}:", "spool_dir": spool}
    )
    database = Database(own)
    add_models(database)
    store = Store(own)
    store.ensure_bucket()
    try:
        with serving(small(own)) as server:
            yield Api(address(server), server, database, small(own))
    finally:
        store._client.delete_bucket(Bucket=store.bucket)
        database.dispose()
        administer(server_settings, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def api(shared: Api) -> Iterator[Api]:
    """The API with a catalogue, a key and nothing else."""
    with shared.database.transaction() as conn:
        for table in reversed(Base.metadata.sorted_tables):
            if table.name not in {"models", "model_files", "catalogue_stamp"}:
                conn.execute(table.delete())
    running = Api(shared.url, shared.server, shared.database, shared.settings)
    yield running
    running.http.close()


@pytest.fixture
def fresh(settings: Settings, database: Database, store: Store) -> Iterator[Callable[..., Any]]:
    """A function that starts an API of the test's own, with settings changed as it says."""
    add_models(database)
    with ExitStack() as stack:

        def start(**changes: Any) -> Api:
            own = small(settings).model_copy(update=changes)
            server = stack.enter_context(serving(own))
            running = Api(address(server), server, database, own)
            stack.callback(running.http.close)
            return running

        yield start


def problem_of(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The problem document of a refusal, after checking that it is one."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = answer.json()
    assert document["status"] == status
    assert document["code"] == code
    assert document["type"] == f"urn:lcm-farm:problem:{code}"
    assert document["request_id"] == answer.headers["x-request-id"]
    assert document["title"]
    assert document["detail"]
    assert document["instance"].startswith("/")
    return document


def operations(api: Api) -> list[tuple[str, str]]:
    """Method and path (below /api/v1) of every operation, with made-up ids."""
    paths = api.http.get("/openapi.json").json()["paths"]
    found = [(method.upper(), path.removeprefix("/api/v1")) for path, methods in paths.items() for method in methods]
    return [(method, path.replace("{", "").replace("}", "")) for method, path in found]


def made_up(path: str) -> str:
    path = path.replace("upload_hash", uuid4().hex * 2)
    return re.sub(r"\w+_id\b", lambda _: str(uuid4()), path)
