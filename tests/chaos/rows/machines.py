"""Rows about the machines: R11 clocks, sweepers and releases, R12 disk, file descriptors, name resolution."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import text

from tests.chaos.faults import Faults
from tests.chaos.harness import Chaos
from workers.exits import Exit

HOUR = 3600.0


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
    chaos.client.submit(jobs)
    with _changed_schema(chaos):
        stranger = chaos.worker()
        if stranger.process.wait(60) != Exit.REFUSED:
            chaos.fail(f"a worker started on a schema it does not know: {stranger.process.status}")
        chaos.client.submit(jobs)
        # Those that run already go on: a schema is expanded first.
        chaos.until_done(60 + jobs * 0.2)


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
    """R12. A worker whose disk is full, one and an API with 64 file descriptors, one that can resolve no name."""
    healthy = chaos.worker()
    chaos.until(lambda: healthy.process.said("ready"), 60)
    healthy.process.kill()
    named = {
        name: type(value)(value.get_secret_value().replace("127.0.0.1", "localhost"))
        for name in ("database_url", "redis_url")
        if (value := getattr(chaos.settings, name))
    }
    named["s3_endpoint_url"] = str(chaos.settings.s3_endpoint_url).replace("127.0.0.1", "localhost")
    flag = chaos.folder / "no-names"
    poor = {
        "disk": chaos.worker(Faults(full_disk=True)),
        "files": chaos.worker(Faults(files=64)),
        "names": chaos.worker(Faults(nameless=flag), **named),
    }
    chaos.stop_part("api")
    chaos.start("api", Faults(files=64))
    chaos.until(lambda: poor["names"].process.said("ready"), 60)
    flag.touch()
    end = time.monotonic() + seconds
    for _ in range(4):
        chaos.client.submit(jobs // 4)
        time.sleep(seconds / 4)
    time.sleep(max(0.0, end - time.monotonic()))
    flag.unlink()
    chaos.keep(4)
    chaos.until_done(60 + jobs * 0.2)
    rows = chaos.ask("""
        SELECT c.worker_id, count(*) FILTER (WHERE a.outcome = 'succeeded') AS n FROM attempts a
        JOIN claims c ON c.id = a.claim_id GROUP BY 1
    """)
    done = {row.worker_id: row.n for row in rows}
    for name, worker in poor.items():
        chaos.figures.add(f"rendered without {name}", done.get(worker.id, 0))
        chaos.figures.add(f"alive without {name}", worker.process.alive)
