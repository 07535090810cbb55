"""How the farm's choice of work does on a simulated farm, beside first in first out and beside warm first.

    python -m benchmarks.scheduling [--quick] [--seconds 60] [--utilisation 0.7 --utilisation 0.95] [--seed 1] [--json]

At the end it says of each promise whether it was reached or missed, and answers 1 when one was missed.

1,000 workers, 3 checkpoints and 500 adapters with Zipf popularity (exponent 1.1), 100 projects, bursts; a cold load
takes 10 s, an adapter swap 0.1 s, a worker has room for 2 checkpoints and 50 adapters. The choice is the real
`farm.scheduling.rank` over what the claim's statement would find. Nothing is measured by the clock: the same seed
prints the same table. `--quick` is for tests: 20 s of submissions at utilisation 0.95, the large project beside a tenth
of the workers, and warm first left out.

Cold loads and swaps count from the first submission until everything is in work. A wait lasts from submission until
rendering begins, loads and swaps included. Utilisation: rendering time that is submitted, by the time all workers have.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import numpy as np

from benchmarks.simulated.farm import Chooser, Costs, Farm, first_in_first_out, ours, warm_first
from benchmarks.simulated.workload import PROJECTS, Submission, Workload
from farm.scheduling import Policy

AFFINITY_BOUND = timedelta(seconds=30)
"""The default of FARM_AFFINITY_BOUND."""
HOG_JOBS = 100_000
PROBES = 40
FIFO, WARM_FIRST, OURS = "first in, first out", "warm first", "farm"
FEWER = 5.0
"""Times fewer cold loads, and swaps, than first in first out, at no worse p99: what is promised."""
MICRO_BATCHES = 2.0
"""What a project with 100,000 jobs may delay another's first job by at most, in full micro-batches of a worker."""


@dataclass(frozen=True, slots=True)
class Row:
    """One policy at one utilisation. Waits in seconds; `jain` over projects, of the mean speed of their jobs."""

    policy: str
    utilisation: float
    jobs: int
    micro_batches: int
    loads: int
    swaps: int
    fetches: int
    p50: float
    p99: float
    jain: float
    done_seconds: float


@dataclass(frozen=True, slots=True)
class Hog:
    """How long first jobs of other projects waited beside a project with 100,000; `micro_batches`: the longest, in
    full micro-batches of a worker."""

    policy: str
    batches: int
    worst: float
    micro_batches: float


def policies(costs: Costs) -> dict[str, Chooser]:
    policy = Policy(AFFINITY_BOUND, costs.micro_batch, workers=costs.workers)
    return {FIFO: first_in_first_out, WARM_FIRST: warm_first, OURS: ours(policy)}


def measure(name: str, costs: Costs, batches: list[Submission], utilisation: float, seed: int) -> Row:
    """Run one policy over these batches."""
    farm = Farm(costs, policies(costs)[name], seed)
    farm.run(batches)
    waits = np.array([each.wait for each in farm.begun])
    jobs = np.array([each.jobs for each in farm.begun])
    owners = np.array([each.project for each in farm.begun])
    # Speed: rendering by rendering and waiting, 1 for a job that never waits.
    speeds = costs.full / (costs.full + waits)
    of_project = np.bincount(owners, weights=speeds * jobs)[np.unique(owners)]
    means = of_project / np.bincount(owners, weights=jobs)[np.unique(owners)]
    p50, p99 = (percentile(waits, jobs, share) for share in (0.5, 0.99))
    return Row(
        name, utilisation, int(jobs.sum()), farm.micro_batches, farm.loads, farm.swaps, farm.fetches, p50, p99,
        float(means.sum() ** 2 / (len(means) * (means**2).sum())), farm.rendered_at,
    )  # fmt: skip


def percentile(values: Any, weights: Any, share: float) -> float:
    """The smallest value (of (n,) values) that this share of the weights does not pass."""
    order = np.argsort(values)
    reached = np.cumsum(weights[order]) / weights.sum()
    return float(values[order][np.searchsorted(reached, share)])


def beside_a_hog(name: str, costs: Costs, batches: int, seconds: float, seed: int) -> Hog:
    """On a farm at half load one project submits 100,000 jobs at once, in so many batches; then new projects come."""
    workload = Workload(seed)
    start = seconds / 4
    around = workload.stream(seconds, int(0.5 * costs.capacity * seconds))
    hog = [workload.one(start, 0, HOG_JOBS // batches) for _ in range(batches)]
    busy = HOG_JOBS / costs.capacity
    probes = [workload.one(start + busy * (n + 1) / PROBES, PROJECTS + n, 1) for n in range(PROBES)]
    farm = Farm(costs, policies(costs)[name], seed)
    farm.run(sorted(around + hog + probes, key=lambda each: each.at))
    worst = max(each.wait for each in farm.begun if each.project >= PROJECTS)
    return Hog(name, batches, worst, worst / costs.full)


def verdicts(rows: Iterable[Row], hogs: Iterable[Hog]) -> list[dict[str, Any]]:
    """`promise`, `figure` (words), `ratio` and whether it is `reached`, for everything promised that was measured."""
    found: list[dict[str, Any]] = []

    def add(promise: str, figure: str, ratio: float, reached: bool) -> None:
        found.append({"promise": promise, "figure": figure, "ratio": ratio, "reached": reached})

    by = {(row.policy, row.utilisation): row for row in rows}
    for utilisation in sorted({at for _, at in by}):
        fifo, mine = by[FIFO, utilisation], by[OURS, utilisation]
        for name, theirs, own in (("cold loads", fifo.loads, mine.loads), ("swaps", fifo.swaps, mine.swaps)):
            fewer = theirs / max(1, own)
            promise = f"at utilisation {utilisation}: {name} at least {FEWER:g} times fewer than {FIFO}"
            add(promise, f"{own:,} to {theirs:,}", fewer, fewer >= FEWER)
        promise = f"at utilisation {utilisation}: wait at p99 no longer than {FIFO}"
        add(promise, f"{mine.p99:.2f} to {fifo.p99:.2f} s", mine.p99 / fifo.p99, mine.p99 <= fifo.p99)
    for hog in hogs:
        if hog.policy == OURS:
            promise = f"beside {HOG_JOBS:,} jobs in {hog.batches:,} batches: a first job waits at most "
            promise += f"{MICRO_BATCHES:g} micro-batches of a worker"
            add(promise, f"{hog.worst:.2f} s", hog.micro_batches, hog.micro_batches <= MICRO_BATCHES)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="what the tests run, in a few seconds")
    parser.add_argument("--seconds", type=float, help="simulated seconds of submissions (60; quick: 20)")
    parser.add_argument("--utilisation", type=float, action="append", help="0.7 and 0.95 (quick: 0.95) unless given")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    options = parser.parse_args()
    quick, costs = options.quick, Costs()
    seconds = options.seconds or (20.0 if quick else 60.0)
    rows: list[Row] = []
    hogs: list[Hog] = []
    say = (lambda _: None) if options.json else lambda line: print(line, flush=True)
    say(f"{costs.workers:,} workers, full micro-batch {costs.full:.2f} s, {costs.capacity:,.0f} jobs/s at most")
    say("policy               util      jobs  cold loads     swaps  fetches   p50 s   p99 s   Jain   all done s")
    names = [name for name in policies(costs) if not (quick and name == WARM_FIRST)]
    for utilisation in options.utilisation or ((0.95,) if quick else (0.7, 0.95)):
        batches = Workload(options.seed).stream(seconds, int(utilisation * costs.capacity * seconds))
        for name in names:
            row = measure(name, costs, batches, utilisation, options.seed)
            rows.append(row)
            say(
                f"{name:20} {utilisation:4.2f} {row.jobs:9,} {row.loads:6,} {row.loads / row.micro_batches:5.1%}"
                f" {row.swaps:8,} {row.fetches:8,} {row.p50:7.2f} {row.p99:7.2f} {row.jain:6.3f}"
                f" {row.done_seconds:12.0f}"
            )
    around = Costs(workers=costs.workers // 10) if quick else costs
    say(f"\nworst wait of another project's first job beside one with {HOG_JOBS:,} queued, {around.workers:,} workers")
    for count in (1, 100) if quick else (1, 1_000):
        for name in names if count == 1 or not quick else (OURS,):
            hog = beside_a_hog(name, around, count, 20.0 if quick else 40.0, options.seed)
            hogs.append(hog)
            say(f"{name:20} {count:5,} batches {hog.worst:7.2f} s = {hog.micro_batches:6.1f} micro-batches of a worker")
    found = verdicts(rows, hogs)
    say("")
    for one in found:
        state = "reached" if one["reached"] else "missed"
        say(f"{state:8} {one['promise']}: {one['figure']}, {one['ratio']:.2f}")
    if options.json:
        told = {"seed": options.seed, "workers": costs.workers, "seconds": seconds}
        tables = {"rows": [asdict(row) for row in rows], "hogs": [asdict(hog) for hog in hogs]}
        json.dump({**told, **tables, "verdicts": found}, sys.stdout)
    return int(not all(one["reached"] for one in found))


if __name__ == "__main__":
    sys.exit(main())
