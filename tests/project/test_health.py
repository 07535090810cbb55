"""Health checks of the containers: they fail when the process does not do its work, and only then."""

import os
import socket
from threading import Thread
from wsgiref.simple_server import make_server

import pytest
from pydantic import SecretStr

from farm import health, jobs
from farm.db import Database
from farm.ids import new_id
from farm.settings import Settings


@pytest.fixture
def nobody(settings: Settings) -> Settings:
    """Settings whose Postgres and API do not answer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = SecretStr(f"postgresql://farm:0d9c8b7a@127.0.0.1:{port}/farm")
    return settings.model_copy(update={"database_url": url, "api_port": port})


def say_hello(database: Database, host: str) -> None:
    with database.transaction() as conn:
        jobs.hello(conn, worker=new_id(), pool="default", host=host, pid=os.getpid(), device="cpu", version="0")


def test_a_worker_is_healthy_once_it_said_hello(settings: Settings, database: Database) -> None:
    say_hello(database, "another-host")
    assert "no worker of this host" in health.worker(settings)
    say_hello(database, socket.gethostname())
    assert health.worker(settings) == ""


def test_a_worker_whose_postgres_is_away_is_not_restarted(nobody: Settings) -> None:
    assert health.worker(nobody) == ""


def test_the_sweeper_needs_its_database(
    settings: Settings, nobody: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(health, "settings", lambda: settings)
    assert health.main(["sweeper"]) == 0
    monkeypatch.setattr(health, "settings", lambda: nobody)
    assert health.main(["sweeper"]) == 1
    assert "Postgres" in capsys.readouterr().err


@pytest.mark.parametrize(("status", "ill"), [("200 OK", False), ("503 Service Unavailable", True)])
def test_the_api_says_itself_whether_it_is_ready(settings: Settings, status: str, ill: bool) -> None:
    def app(request: dict[str, str], start: object) -> list[bytes]:
        asked.append(request["PATH_INFO"])
        start(status, [])  # type: ignore[operator]
        return [b'{"status": "said so"}']

    asked: list[str] = []
    with make_server("127.0.0.1", 0, app) as server:  # type: ignore[arg-type]
        answering = Thread(target=server.handle_request)
        answering.start()
        reason = health.api(settings.model_copy(update={"api_port": server.server_port}))
        answering.join()
    assert asked == ["/api/v1/health/ready"]
    assert bool(reason) is ill
    assert "said so" in reason or not ill


def test_nothing_there_is_ill_and_a_wrong_name_is_wrong_usage(
    nobody: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "does not answer" in health.api(nobody)
    assert health.main(["nonsense"]) == 2
    assert "api|flower|worker|sweeper" in capsys.readouterr().err
