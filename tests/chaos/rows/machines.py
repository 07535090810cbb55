"""Rows about the machines: R11 clocks, sweepers and releases, R12 disk, file descriptors, name resolution."""

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
from sqlalchemy import make_url, text

from farm.stack.ports import answers
from tests.chaos.faults import FILES_GONE, UNRESOLVED, Faults
from tests.chaos.harness import Chaos
from tests.chaos.processes import Process
from tests.chaos.rows.servers import cut_connections
from tests.chaos.setting import Worker
from tests.chaos.trickle import Trickle
from workers.exits import Exit

HOUR = 3600.0
LIVE = "/api/v1/health/live"
LOCK_SECONDS = 2
EXPAND_EVERY = 0.1
EXPANSION = (
    *(
        f"ALTER TABLE {table} ADD COLUMN next_note text NOT NULL DEFAULT 'old'"
        for table in ("jobs", "recipes", "claims", "attempts", "images", "batches", "workers")
    ),
    "CREATE TABLE next_notes (job_id uuid PRIMARY KEY REFERENCES jobs (id), note text NOT NULL)",
    "CREATE INDEX ON claims (next_note)",
    "CREATE INDEX CONCURRENTLY IF NOT EXISTS next_jobs ON jobs (next_note)",
)
"""Statements of a migration that the running release knows nothing of."""


def mix_machines(chaos: Chaos, *, jobs: int) -> None:
    """R11. Workers an hour ahead and an hour behind, an API that is, two sweepers, and then a schema nobody knows."""
    chaos.start("sweeper")
    # S3 would refuse their signatures, after everything was rendered: they say so, and leave the work to others.
    for worker in [chaos.worker(Faults(clock=by)) for by in (HOUR, -HOUR)]:
        if worker.process.wait(60) != Exit.REFUSED or not worker.process.said("clock is wrong"):
            chaos.fail(f"a worker whose clock is wrong ended with {worker.process.status}, or said nothing")
        chaos.figures.add("wrong clocks refused")
    # A few minutes nobody minds: leases believe the database alone.
    chaos.worker(Faults(clock=300))
    chaos.stop_part("api")
    chaos.start("api", Faults(clock=HOUR))
    chaos.client.submit(jobs)
    chaos.until_done(60 + jobs * 0.2)
    chaos.stop_part("api")
    chaos.start("api")
    chaos.keep(3)
    chaos.ready()
    batch = chaos.client.submit(jobs).id
    with _changed_schema(chaos):
        _expand(chaos)
        stranger = chaos.worker()
        if stranger.process.wait(60) != Exit.REFUSED:
            chaos.fail(f"a worker started on a schema it does not know: {stranger.process.status}")
        chaos.client.submit(jobs)
        # Those that run already go on: a schema is expanded first.
        chaos.until_done(60 + jobs * 0.2)
        for path in ("/batches", f"/batches/{batch}", f"/batches/{batch}/jobs"):
            answer = chaos.client.http.get(path)
            if answer.status_code != 200:
                chaos.fail(f"GET {path} was answered {answer.status_code} on an expanded schema")


def _expand(chaos: Chaos) -> None:
    """What the next release's migration may do while this one's workers render: add columns with defaults, a table and
    an index. A statement waits for its lock only as long as work may wait for it, and is tried again."""
    url = make_url(chaos.settings.database_url.get_secret_value()).render_as_string(hide_password=False)
    with (
        Trickle(chaos),
        psycopg.connect(url, autocommit=True, options=f"-c lock_timeout={LOCK_SECONDS}s") as connection,
    ):
        chaos.until(chaos.holding, 60, "a worker renders while the schema is expanded")
        for statement in EXPANSION:
            chaos.until(lambda statement=statement: _done(connection, statement), 60, statement)  # type: ignore[misc]
            chaos.figures.add("statements of a migration")
            # Some work between two of them, so that every process meets each in the middle of it.
            time.sleep(EXPAND_EVERY)


def _done(connection: "psycopg.Connection[Any]", statement: str) -> bool:
    try:
        connection.execute(statement.encode())
    except psycopg.errors.LockNotAvailable:
        return False
    return True


@contextmanager
def _changed_schema(chaos: Chaos) -> Iterator[None]:
    """While the block runs the database says that another release has migrated it."""
    with chaos.database.transaction() as conn:
        before = conn.scalar(text("SELECT version_num FROM alembic_version"))
        conn.execute(text("UPDATE alembic_version SET version_num = 'chaos'"))
    try:
        yield
    finally:
        with chaos.database.transaction() as conn:
            conn.execute(text("UPDATE alembic_version SET version_num = :before"), {"before": before})


def starve_machines(chaos: Chaos, *, jobs: int, seconds: float) -> None:
    """R12. A worker whose disk is full, one and an API with 64 file descriptors and then none to spare, one that can
    resolve no name."""
    healthy = chaos.worker()
    chaos.until(lambda: healthy.process.said("ready"), 60)
    healthy.process.kill()
    named = {
        name: type(value)(value.get_secret_value().replace("127.0.0.1", "localhost"))
        for name in ("database_url", "redis_url")
        if (value := getattr(chaos.settings, name))
    }
    named["s3_endpoint_url"] = str(chaos.settings.s3_endpoint_url).replace("127.0.0.1", "localhost")
    no_names, no_files, no_files_there = (chaos.folder / name for name in ("no-names", "no-files", "no-files-there"))
    poor = {
        "disk": chaos.worker(Faults(full_disk=True)),
        "files": chaos.worker(Faults(files=64, filled=no_files)),
        "names": chaos.worker(Faults(nameless=no_names), **named),
    }
    chaos.stop_part("api")
    api = chaos.start("api", Faults(files=64, filled=no_files_there))
    _until_each_rendered(chaos, poor)
    _fill(chaos, api, no_files_there, jobs // 4, seconds / 4)
    no_names.touch()
    no_files.touch()
    chaos.until(lambda: poor["files"].process.said(FILES_GONE), 60, "a worker has no file to spare")
    # Who has a connection asks for no name, and opens no file.
    cut_connections(chaos)
    chaos.until(lambda: poor["names"].process.said(UNRESOLVED), 60, "a worker asks for a name in vain")
    for _ in range(3):
        chaos.client.submit(jobs // 4)
        time.sleep(seconds / 4)
    no_names.unlink()
    no_files.unlink()
    chaos.keep(4)
    chaos.until_done(60 + jobs * 0.2)
    done = _rendered(chaos)
    for name, worker in poor.items():
        chaos.figures.add(f"rendered without {name}", done.get(worker.id, 0))
        chaos.figures.add(f"alive without {name}", worker.process.alive)
    # It wrote neither a log nor its part of the history, and rendered all the same.
    if str(poor["disk"].id).encode() in _told_by_workers(chaos) or poor["disk"].process.log.exists():
        chaos.fail("the worker whose disk is full could write: the row tried nothing of it")


def _rendered(chaos: Chaos) -> dict[UUID, int]:
    """Pictures by worker."""
    rows = chaos.ask("""
        SELECT c.worker_id, count(*) FILTER (WHERE a.outcome = 'succeeded') AS n FROM attempts a
        JOIN claims c ON c.id = a.claim_id GROUP BY 1
    """)
    return {row.worker_id: row.n for row in rows}


def _until_each_rendered(chaos: Chaos, some: Mapping[str, Worker]) -> None:
    """Feed these workers until each of them has rendered something: who never worked shows nothing."""

    def all_have() -> bool:
        done = _rendered(chaos)
        if all(done.get(worker.id) for worker in some.values()):
            return True
        if not chaos.backlog():
            chaos.client.submit(8)
        return False

    chaos.until(all_have, 90, f"every worker of {', '.join(some)} renders something")


def _fill(chaos: Chaos, api: Process, flag: Path, jobs: int, seconds: float) -> None:
    """An API that can open no file takes no connection; who waits for it is accepted once it can."""
    flag.touch()
    chaos.until(lambda: api.said(FILES_GONE), 60, "the API has no file to spare")
    answered = [answers(chaos.settings.api_port, LIVE) for _ in range(2)]
    if all(answered):
        chaos.fail("an API that can open no file took connections: the row tried nothing of it")
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(chaos.client.submit, jobs)
        time.sleep(seconds)
        flag.unlink()
        waiting.result()
    chaos.until(lambda: answers(chaos.settings.api_port, LIVE), 60, "the API answers again")


def _told_by_workers(chaos: Chaos) -> bytes:
    """What workers themselves wrote of the history."""
    lines = chaos.history_path.read_bytes().splitlines()
    return b"".join(line for line in lines if b'"who": "worker ' in line)
