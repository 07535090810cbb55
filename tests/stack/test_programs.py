"""The farm's own processes as the supervisor runs them: when they are well, when they hang, how they leave."""

import os
import re
import signal
import time
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr

from farm import doorbell, jobs
from farm.db import Database
from farm.ids import new_id
from farm.jobs import Result
from farm.settings import Settings
from farm.stack import programs
from farm.stack.datadir import DataDir
from farm.stack.ports import LOOPBACK, free_port
from farm.stack.service import Service
from farm.states import Outcome
from tests.farm.conftest import Queue
from tests.workers.conftest import environment_of
from workers.feed import Feed


@pytest.fixture
def directory(tmp_path: Path) -> DataDir:
    made = DataDir(tmp_path / "data")
    made.create()
    return made


def test_flower_shows_those_with_the_password_and_leaves_when_it_is_asked(
    directory: DataDir, settings: Settings, database: Database
) -> None:
    settings = settings.model_copy(update={"flower_password": SecretStr("for looking only")})
    port = free_port()
    service = Service(programs.flower(directory, environment_of(settings), settings, port))
    service.start()
    answers = service.program.answers
    assert answers is not None
    assert answers()
    page = f"http://{LOOPBACK}:{port}"
    for password in ("", "wrong"):
        assert httpx.get(page, auth=(settings.flower_user, password)).status_code == 401
    assert httpx.get(f"{page}/api/workers").status_code == 401
    mine = (settings.flower_user, "for looking only")
    assert httpx.get(page, auth=mine).status_code == 200
    for order in ("worker/shutdown/any", "worker/pool/restart/any", "task/async-apply/farm.render", "task/revoke/any"):
        assert httpx.post(f"{page}/api/{order}", auth=mine, json={}).status_code in {403, 404, 405}, order
    shown = told_to_flower(Queue(database, settings), page, mine)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", shown)
    assert "<script>alert" not in shown
    assert r"&lt;script&gt;alert(1)&lt;/script&gt;\x1b[31m\u202e" in shown, "the prompt"
    assert r"1 failed: &#x27;&lt;script&gt;alert(2)&lt;/script&gt;\x1b[31m" in shown.replace("&#39;", "&#x27;")
    assert service.stop(grace=30.0), (directory.logs / "flower.log").read_text()
    assert service.exit_code == 0
    assert not answers()


def told_to_flower(farm: Queue, page: str, auth: tuple[str, str]) -> str:
    """Flower's page of a micro-batch whose prompt and error are hostile."""
    farm.submit([{"prompt": "<script>alert(1)</script>\x1b[31m\u202e", "seed": 1}])
    claimed = farm.claim()
    assert claimed is not None
    (job,) = claimed.jobs
    reason = "<script>alert(2)</script>\x1b[31m\u202e"
    failed = [Result(job.id, job.attempt, Outcome.FAILED, error_code="render-failed", error_message=reason)]
    feed = Feed(doorbell.make_app(farm.settings, timeout=5), "worker@here", "default")
    feed.start()
    for _ in range(100):
        # Flower hears only what is told once it listens, a moment after it answers.
        feed.began(claimed)
        feed.ended(claimed, failed, 1.0)
        answer = httpx.get(f"{page}/task/{claimed.claim_id}", auth=auth)
        if answer.status_code == 200 and "FAILURE" in answer.text:
            return answer.text
        time.sleep(0.2)
    raise AssertionError(answer.text)


def test_the_sweeper_is_well_while_its_pulse_beats(directory: DataDir, settings: Settings) -> None:
    stale = directory.path / "sweeper.pulse"
    stale.touch()
    service = Service(programs.sweeper(directory, environment_of(settings)))
    assert not service.program.healthy(), "the pulse of an earlier one is not its own"
    service.start()
    answers = service.program.answers
    assert answers is not None
    assert answers()
    assert service.pid is not None
    os.kill(service.pid, signal.SIGSTOP)
    long_ago = time.time() - programs.PULSE_AGE
    os.utime(stale, (long_ago, long_ago))
    assert not answers()
    os.kill(service.pid, signal.SIGCONT)
    assert service.stop(grace=30.0)


def test_a_worker_is_well_while_postgres_hears_of_it(
    directory: DataDir, settings: Settings, database: Database
) -> None:
    worker = new_id()
    program = programs.worker(
        directory, environment_of(settings), database, settings, name="worker", device="cpu", worker_id=worker
    )
    assert program.answers is not None
    with database.transaction() as conn:
        jobs.hello(conn, worker=worker, pool="default", host="here", pid=1, device="cpu", version="1")
    assert not program.healthy(), "it is still loading"
    with database.transaction() as conn:
        jobs.tell(conn, worker=worker, state="idle")
    assert program.healthy()
    assert program.answers()
    with database.transaction() as conn:
        conn.exec_driver_sql("UPDATE workers SET heartbeat_at = heartbeat_at - interval '1 hour'")
    assert not program.answers()
    away = Database(settings.model_copy(update={"database_url": SecretStr(f"postgresql://x:y@{LOOPBACK}:1/z")}))
    deaf = programs.worker(
        directory, environment_of(settings), away, settings, name="worker", device="cpu", worker_id=worker
    )
    assert deaf.answers is not None
    assert deaf.answers(), "without Postgres nobody can tell, and it renders on"
    chosen = programs.worker(
        directory, environment_of(settings), away, settings, name="worker", device="auto", worker_id=worker
    )
    assert (program.address, chosen.address) == ("cpu", "-"), "no address, and which device it is the worker says"
    away.dispose()
