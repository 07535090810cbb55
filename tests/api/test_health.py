"""Health, version, and the program around the app."""

import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import anyio
import httpx
import pytest
from pydantic import SecretStr
from sqlalchemy import text

import farm
from api.main import create_app
from farm.db import Database
from farm.errors import SchemaMismatch
from farm.models import SCHEMA_VERSION
from farm.settings import Settings
from tests.api.conftest import Api, problem_of, until


def test_a_ready_farm_says_so(api: Api) -> None:
    anyone = api.client(None)
    assert anyone.get("/health/live").json() == {"status": "alive"}
    answer = anyone.get("/health/ready")
    assert answer.status_code == 200
    assert answer.json() == {"status": "ready", "postgres": "ok", "s3": "ok", "redis": "ok"}


def test_what_is_missing_is_named_and_redis_does_not_decide(fresh: Any) -> None:
    api = fresh(redis_url=SecretStr("redis://127.0.0.1:1/0"))
    answer = api.client(None).get("/health/ready")
    assert answer.status_code == 200
    assert answer.json()["redis"] == "down"
    # Without a broker, submitting works and does not wait for it.
    began = time.monotonic()
    assert api.http.post("/jobs", json={"prompt": "x"}).status_code == 201
    assert time.monotonic() - began < 1


def test_without_s3_it_is_not_ready(fresh: Any) -> None:
    api = fresh(s3_bucket="there-is-no-such-bucket")
    answer = api.client(None).get("/health/ready")
    assert answer.status_code == 503
    assert answer.json() == {"status": "not ready", "postgres": "ok", "s3": "down", "redis": "ok"}


def test_it_starts_without_postgres_and_says_so(fresh: Any) -> None:
    api = fresh(database_url=SecretStr("postgresql://farm:long@127.0.0.1:1/farm"))
    assert api.client(None).get("/health/live").status_code == 200
    answer = api.client(None).get("/health/ready")
    assert answer.status_code == 503
    assert answer.json()["postgres"] == "down"
    refused = api.http.get("/version")
    assert problem_of(refused, 503, "unavailable")["retryable"] is True
    assert int(refused.headers["retry-after"]) >= 1
    assert "127.0.0.1" not in refused.text


def test_another_schema_is_refused_at_start(settings: Settings, database: Database) -> None:
    with database.transaction() as conn:
        conn.execute(text("UPDATE alembic_version SET version_num = '0000'"))
    app = create_app(settings)

    async def start() -> None:
        async with app.router.lifespan_context(app):
            raise AssertionError("it started")

    with pytest.raises(SchemaMismatch, match=SCHEMA_VERSION):
        anyio.run(start)


def test_a_schema_that_changes_later_makes_it_unready(fresh: Any) -> None:
    api = fresh()
    with api.database.transaction() as conn:
        conn.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    answer = api.client(None).get("/health/ready")
    assert answer.status_code == 503
    assert answer.json()["postgres"] == "other schema"


def test_health_asks_the_servers_once_a_second_at_most(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    original = Database.check_schema

    def counted(database: Database) -> None:
        asked.append(1)
        original(database)

    monkeypatch.setattr(Database, "check_schema", counted)
    anyone = api.client(None)
    began = time.monotonic()
    for _ in range(20):
        anyone.get("/health/ready")
    assert len(asked) <= 1 + (time.monotonic() - began)


def test_version(api: Api) -> None:
    assert api.http.get("/version").json() == {"version": farm.__version__, "schema_version": SCHEMA_VERSION}


def environment(settings: Settings) -> dict[str, str]:
    secrets = {
        "FARM_DATABASE_URL": settings.database_url.get_secret_value(),
        "FARM_REDIS_URL": settings.redis_url.get_secret_value(),
        "FARM_S3_SECRET_ACCESS_KEY": settings.s3_secret_access_key.get_secret_value()
        if settings.s3_secret_access_key
        else "",
    }
    names = ("s3_endpoint_url", "s3_access_key_id", "s3_bucket", "redis_prefix", "environment")
    plain = {f"FARM_{name.upper()}": str(getattr(settings, name)) for name in names}
    return {**os.environ, **plain, **secrets, "FARM_GRACE": "3"}


def test_the_program_serves_and_leaves_when_told(settings: Settings) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = subprocess.Popen(
        [sys.executable, "-m", "api.main"], env={**environment(settings), "FARM_API_PORT": str(port)}
    )
    try:

        def alive() -> bool:
            assert program.poll() is None
            try:
                return httpx.get(f"http://127.0.0.1:{port}/api/v1/health/live").status_code == 200
            except httpx.TransportError:
                return False

        until(alive, 30)
        program.send_signal(signal.SIGTERM)
        assert program.wait(10) == 0
    finally:
        program.kill()
        program.wait()


def test_neither_api_nor_farm_imports_torch() -> None:
    code = "import api.main, sys; print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
