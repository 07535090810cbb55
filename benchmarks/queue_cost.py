"""What claim + finish of a micro-batch of 8 cost, at a thousand and at a million queued jobs, side by side.

    python benchmarks/queue_cost.py [--large 1000000] [--small 1000] [--rounds 200] [--case NAME]...

Starts its own Postgres. Autovacuum is off for the jobs tables throughout, so the churn case measures what it says. For
each case both sizes stand in the same server and are measured in turns; the ratio of the medians is what promise 4
speaks of. A size is what is queued at the end: what the measuring itself takes (8 jobs a round) is queued on top of it,
on both sides. With one lane measured: pausing, resuming, reading and cancelling a batch of the large size. Says of each
case whether what is promised was reached or missed, and answers 1 when something was missed.
"""

import argparse
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, text

from farm import jobs, keys, submission
from farm.db import Database, migrate
from farm.ids import new_id
from farm.jobs import Result, StoredImage, Warm
from farm.queries import claiming
from farm.resolving import Catalogue
from farm.settings import Settings
from farm.stack import embedded
from farm.states import Outcome
from farm.views import AdapterView, BatchView, CheckpointView

MICRO_BATCH = 8
WARM_UP = 10
"""Rounds that are not counted."""
MOST_LANES = 10_000
TIMES = 1.5
"""Times what it costs at the small size that a claim and a finish may cost at the large one."""
AT_ONCE = 1.0
"""Seconds that pausing or cancelling may take."""


def catalogue() -> Catalogue:
    now = datetime.now(UTC)
    profile = {"width": 128, "height": 128, "min_size": 64, "max_size": 256, "steps": 4, "guidance_scale": 1.0}
    base = CheckpointView(
        name="crack-tiny", hash="a" * 64, family="f", state="available", bytes=1, profile=profile, created_at=now
    )
    lora = AdapterView(
        name="lcm", hash="b" * 64, family="f", kind="acceleration", state="available", bytes=1, created_at=now
    )
    return Catalogue({"crack-tiny": base}, {"lcm": lora})


class Farm:
    """One database with one project."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.database = Database(settings, pool_size=2)
        self.worker = uuid.uuid4()
        with self.database.transaction() as conn:
            key = keys.create_key(conn, project="bench", name="bench", scopes=["admin"])
            self.project = keys.authenticate(conn, str(key.key)).project_id
            for table in ("jobs", "attempts", "claims", "counters", "counter_deltas", "images", "recipes", "segments"):
                conn.execute(text(f"ALTER TABLE {table} SET (autovacuum_enabled = false)"))

    def submit(self, rows: Iterable[dict[str, Any]], **defaults: Any) -> BatchView:
        with self.database.transaction() as conn:
            now = claiming.database_now(conn)
        with (
            submission.prepare(
                rows, defaults=defaults, catalogue=catalogue(), settings=self.settings, name="bench", now=now
            ) as prepared,
            self.database.transaction() as conn,
        ):
            return jobs.submit(conn, prepared, project_id=self.project, pool="default")

    def micro_batch(self, limit: int = MICRO_BATCH) -> int:
        """Claim and finish once; answers how many jobs that were."""
        with self.database.transaction() as conn:
            claimed = jobs.claim(
                conn,
                claim_id=new_id(),
                worker=self.worker,
                pool="default",
                warm=Warm(),
                limit=limit,
                settings=self.settings,
            )
        if claimed is None:
            return 0
        results = [
            Result(
                job.id,
                job.attempt,
                Outcome.SUCCEEDED,
                StoredImage(f"{job.id}", f"{job.id}.webp", "0" * 64, 1, 128, 128, 1),
            )
            for job in claimed.jobs
        ]
        with self.database.transaction() as conn:
            jobs.finish(conn, claim_id=claimed.claim_id, results=results, settings=self.settings)
        return len(results)

    def settle(self) -> None:
        with self.database.transaction() as conn:
            claiming.settle_heads(
                conn, list(conn.scalars(text("SELECT id FROM segments WHERE head_run_at IS NOT NULL")))
            )


def plain(count: int) -> Iterable[dict[str, Any]]:
    return ({"prompt": f"a crack {n}", "seed": n} for n in range(count))


def one_lane(farm: Farm, size: int, taken: int) -> None:
    farm.submit(plain(size + taken))


def many_lanes(farm: Farm, size: int, taken: int) -> None:
    """Every lane holds whole micro-batches: what one costs is compared, not how full it is."""
    lanes = min(size // MICRO_BATCH, MOST_LANES)
    farm.submit(
        {"prompt": "x", "seed": n, "guidance_scale": 1 + (n // MICRO_BATCH) % lanes / 1000} for n in range(size + taken)
    )


def future_in_front(farm: Farm, size: int, taken: int) -> None:
    farm.submit(plain(size), priority=5, run_at=(datetime.now(UTC) + timedelta(days=1)).isoformat())
    farm.submit(plain(taken))


def paused_in_front(farm: Farm, size: int, taken: int) -> None:
    batch = farm.submit(plain(size), priority=5)
    with farm.database.transaction() as conn:
        jobs.pause_batch(conn, farm.project, batch.id)
    farm.submit(plain(taken))


def after_churn(farm: Farm, size: int, taken: int) -> None:
    """As many again were rendered as are queued, in one segment: their dead rows lie where the next claim looks."""
    farm.submit(plain(2 * size + taken))
    done = 0
    while done < size:
        done += farm.micro_batch(limit=min(2_000, size - done))
        farm.settle()


Case = Callable[[Farm, int, int], None]
"""Prepares a farm in which `size` jobs are queued, and `taken` more that the measuring takes."""
CASES: dict[str, Case] = {
    "one lane": one_lane,
    "10,000 lanes": many_lanes,
    "future run_at in front": future_in_front,
    "paused in front": paused_in_front,
    "after churn, no vacuum": after_churn,
}


@dataclass(frozen=True)
class Measured:
    small_ms: float
    large_ms: float


def measure(farms: list[Farm], rounds: int) -> Measured:
    times: list[list[float]] = [[], []]
    for turn in range(WARM_UP + rounds):
        for farm, into in zip(farms, times, strict=True):
            start = time.perf_counter()
            taken = farm.micro_batch()
            elapsed = time.perf_counter() - start
            if taken != MICRO_BATCH:
                raise SystemExit(f"a micro-batch of {taken}: the case is prepared wrongly")
            if turn >= WARM_UP:
                into.append(elapsed * 1000)
    return Measured(statistics.median(times[0]), statistics.median(times[1]))


def fresh(settings: Settings) -> Settings:
    """A migrated database of its own on the same server."""
    name = f"bench_{uuid.uuid4().hex[:8]}"
    url = settings.database_url.get_secret_value()
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"), isolation_level="AUTOCOMMIT")
    with engine.connect() as conn:
        conn.execute(text(f"CREATE DATABASE {name}"))
    engine.dispose()
    made = settings.model_copy(update={"database_url": type(settings.database_url)(url.rsplit("/", 1)[0] + "/" + name)})
    migrate(made)
    return made


def verdict(what: str, reached: bool, figure: str) -> bool:
    """Says whether a promise is kept."""
    print(f"  {'reached' if reached else 'missed':8} {what}: {figure}", flush=True)
    return reached


def main() -> int:
    """0 when everything measured is as promised, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", type=int, default=1_000_000)
    parser.add_argument("--small", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--case", action="append", choices=list(CASES))
    options = parser.parse_args()
    if min(options.small, options.large) < MICRO_BATCH or options.small % MICRO_BATCH or options.large % MICRO_BATCH:
        parser.error(f"sizes are multiples of {MICRO_BATCH}")
    taken = (WARM_UP + options.rounds) * MICRO_BATCH
    kept: list[bool] = []
    with tempfile.TemporaryDirectory(prefix="farm-measure-") as folder, embedded(Path(folder)) as started:
        # All of a case in one batch: two would be two segments, and a claim would look at one of them alone.
        settings = started.model_copy(update={"max_batch_jobs": 2 * options.large + taken})
        print(f"{'case':26} {options.small:>12,} {options.large:>12,}   ratio   (median ms, claim + finish of 8)")
        for name in options.case or CASES:
            farms = []
            for size in (options.small, options.large):
                farm = Farm(fresh(settings))
                CASES[name](farm, size, taken)
                with farm.database.transaction() as conn:
                    conn.execute(text("ANALYZE"))
                farms.append(farm)
            with farms[-1].database.transaction() as conn:
                # What the preparation wrote is on disk before the clock starts: its flushing is not a claim's cost.
                conn.execute(text("CHECKPOINT"))
            found = measure(farms, options.rounds)
            ratio = found.large_ms / found.small_ms
            print(f"{name:26} {found.small_ms:12.2f} {found.large_ms:12.2f}   {ratio:5.2f}", flush=True)
            at_most = f"{ratio:.2f} times the time with {options.small:,} (at most {TIMES})"
            kept.append(verdict(f"{name}, {options.large:,} queued", ratio <= TIMES, at_most))
            if name == "one lane":
                kept += verbs(farms[1])
            for farm in farms:
                farm.database.dispose()
    return int(not all(kept))


def verbs(farm: Farm) -> list[bool]:
    """Pause, resume, read and cancel the whole batch; whether each was quick enough."""
    with farm.database.transaction() as conn:
        batch = jobs.list_batches(conn, farm.project).items[0]
    kept = []
    for verb in (jobs.pause_batch, jobs.resume_batch, jobs.get_batch, jobs.cancel_batch):
        start = time.perf_counter()
        with farm.database.transaction() as conn:
            verb(conn, farm.project, batch.id)
        elapsed = time.perf_counter() - start
        what = f"{verb.__name__} with {batch.counts.queued:,} queued"
        kept.append(verdict(what, elapsed <= AT_ONCE, f"{elapsed * 1000:.1f} ms (at most {AT_ONCE * 1000:,.0f} ms)"))
    return kept


if __name__ == "__main__":
    sys.exit(main())
