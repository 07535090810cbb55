"""How the farm's choice of work does on a simulated farm, beside first in first out and beside warm first.

    python -m benchmarks.scheduling [--quick] [--seconds 60] [--utilisation 0.7 --utilisation 0.95] [--seed 1] [--json]

1,000 workers, 3 checkpoints and 500 adapters with Zipf popularity (exponent 1.1), 100 projects, bursts; a cold load
takes 10 s, an adapter swap 0.1 s, a worker has room for 2 checkpoints and 50 adapters. The choice is the real
`farm.scheduling.rank` over what the claim's statement would find. Nothing is measured by the clock: the same seed
prints the same table. `--quick` is a smaller farm for a few seconds.

Cold loads and swaps count from the first submission until everything is in work. A wait lasts from submission until
rendering begins, loads and swaps included. Utilisation: rendering time that is submitted, by the time all workers have.
"""

import argparse
import json
import sys
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
    return {"first in, first out": first_in_first_out, "warm first": warm_first, "farm": ours(policy)}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100 workers, a few seconds")
    parser.add_argument("--seconds", type=float, help="simulated seconds of submissions (60; quick: 40)")
    parser.add_argument("--utilisation", type=float, action="append", help="0.7 and 0.95 unless given")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    options = parser.parse_args()
    costs = Costs(workers=100) if options.quick else Costs()
    seconds = options.seconds or (40.0 if options.quick else 60.0)
    rows: list[Row] = []
    hogs: list[Hog] = []
    say = (lambda _: None) if options.json else lambda line: print(line, flush=True)
    say(f"{costs.workers:,} workers, full micro-batch {costs.full:.2f} s, {costs.capacity:,.0f} jobs/s at most")
    say("policy               util      jobs  cold loads     swaps  fetches   p50 s   p99 s   Jain   all done s")
    for utilisation in options.utilisation or (0.7, 0.95):
        batches = Workload(options.seed).stream(seconds, int(utilisation * costs.capacity * seconds))
        for name in policies(costs):
            row = measure(name, costs, batches, utilisation, options.seed)
            rows.append(row)
            say(
                f"{name:20} {utilisation:4.2f} {row.jobs:9,} {row.loads:6,} {row.loads / row.micro_batches:5.1%}"
                f" {row.swaps:8,} {row.fetches:8,} {row.p50:7.2f} {row.p99:7.2f} {row.jain:6.3f}"
                f" {row.done_seconds:12.0f}"
            )
    say(f"\nworst wait of another project's first job beside one with {HOG_JOBS:,} queued")
    for count in (1, 100) if options.quick else (1, 1_000):
        for name in policies(costs):
            hog = beside_a_hog(name, costs, count, 20.0 if options.quick else 40.0, options.seed)
            hogs.append(hog)
            say(f"{name:20} {count:5,} batches {hog.worst:7.2f} s = {hog.micro_batches:6.1f} micro-batches of a worker")
    if options.json:
        json.dump({"rows": [asdict(row) for row in rows], "hogs": [asdict(hog) for hog in hogs]}, sys.stdout)


if __name__ == "__main__":
    main()
