"""The soak: all faults mixed, over many jobs, while memory, connections and tables are measured: they stay flat."""

import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median

import psutil

from tests.chaos.harness import Chaos
from tests.chaos.proxy import Proxy
from tests.chaos.rows.servers import (
    crash,
    crash_postgres,
    cut_connections,
    empty_broker,
    freeze_broker,
    litter_broker,
    revive,
)
from tests.chaos.setting import Worker

MEGABYTE = 1024 * 1024
BATCH = 100
AHEAD = 8
"""Batches in the queue, so that nobody waits for the next one."""
RARE = 12
"""One fault in so many is a crash of Postgres, which costs everybody a lease."""
BROKER_SECONDS = 1.0
PAUSE = 0.2
"""Seconds between two looks: counting a hundred thousand jobs more often would take the processor from the workers."""

# The suite's own tables grow with every move of a job.
_SIZES = """
    SELECT c.relname AS name, pg_total_relation_size(c.oid) AS bytes FROM pg_class c
    JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind = 'r' AND n.nspname = 'public' AND c.relname NOT LIKE 'chaos%'
"""
_CONNECTIONS = "SELECT count(*) AS n FROM pg_stat_activity WHERE datname = current_database()"
_DONE = "SELECT count(*) AS n FROM jobs WHERE finished_at IS NOT NULL"
SMALL = ("counter_deltas", "rates", "doomed_objects")
"""Tables whose rows come and go: what they hold does not depend on how many jobs there ever were."""


@dataclass(frozen=True)
class Sample:
    """What was measured when so many jobs had ended. Memory is resident megabytes; sizes are bytes."""

    done: int
    api: float
    sweeper: float
    worker: float
    """Of the one worker to which nothing is done."""
    broker: float
    connections: int
    bytes_per_job: float
    small_tables: int


BOUNDS: dict[str, tuple[float, float]] = {
    "api": (1.15, 16), "sweeper": (1.15, 16), "worker": (1.15, 16), "broker": (1.25, 8), "connections": (1.0, 8),
    "bytes_per_job": (1.25, 512), "small_tables": (1.5, 2 * MEGABYTE),
}  # fmt: skip
"""How much more the last third of a soak may show than its first: a factor, and what is added for noise."""


def soak(chaos: Chaos, *, jobs: int, every: float, samples: int, errors: float, workers: int = 3) -> None:
    """Soak. Every `every` seconds one fault, drawn by chance, until so many jobs have ended; a share of all uploads
    fails all the time."""
    assert chaos.settings.s3_endpoint_url is not None
    with Proxy(chaos.settings.s3_endpoint_url, chaos.random.randrange(10**6)) as proxy:
        proxy.cause("busy", errors)
        chaos.worker_settings = {"s3_endpoint_url": proxy.url}
        elder = chaos.worker()
        chaos.keep(workers + 1)
        chaos.ready()
        taken = _until_all_are_done(chaos, elder, jobs, every, samples)
        chaos.until_done(120 + jobs * 0.01)
        chaos.figures.add("spoilt requests", proxy.spoilt)
        if not elder.process.alive:
            chaos.fail(f"the worker to which nothing was done ended with {elder.process.status}")
        chaos.keep(0)
        for worker in chaos.alive():
            worker.process.kill()
    for name, (first, last) in thirds(taken).items():
        chaos.figures.add(f"{name} first third", first)
        chaos.figures.add(f"{name} last third", last)
    for wrong in not_flat(taken):
        chaos.fail(wrong)


def thirds(taken: Sequence[Sample]) -> dict[str, tuple[float, float]]:
    """The medians of the first and of the last third of the samples, by what was measured."""
    some = max(1, len(taken) // 3)
    return {
        name: (
            round(median(getattr(one, name) for one in taken[:some]), 1),
            round(median(getattr(one, name) for one in taken[-some:]), 1),
        )
        for name in BOUNDS
    }


def not_flat(taken: Sequence[Sample]) -> list[str]:
    """What grew more than its bound allows.

    >>> flat = Sample(100, 90, 80, 85, 10, 12, 2000, 65536)
    >>> not_flat([flat] * 6)
    []
    >>> from dataclasses import replace
    >>> not_flat([flat, flat, flat, replace(flat, api=200)])
    ['api is not flat: 90 in the first third of the soak, 200 in the last']
    """
    found = []
    for name, (first, last) in thirds(taken).items():
        factor, more = BOUNDS[name]
        if last > first * factor + more:
            found.append(f"{name} is not flat: {first:g} in the first third of the soak, {last:g} in the last")
    return found


def _until_all_are_done(chaos: Chaos, elder: Worker, jobs: int, every: float, samples: int) -> list[Sample]:
    taken: list[Sample] = []
    frozen: list[tuple[float, Worker]] = []
    lease = chaos.settings.lease.total_seconds()
    due = time.monotonic() + every
    while True:
        open_jobs = chaos.until(lambda: (chaos.backlog(),), what="the length of the queue")[0]
        if chaos.client.accepted < jobs and open_jobs < AHEAD * BATCH:
            chaos.client.submit(min(BATCH, jobs - chaos.client.accepted))
        done = chaos.until(lambda: (chaos.ask(_DONE)[0].n,), what="how many jobs have ended")[0]
        if done >= jobs * (len(taken) + 1) / (samples + 1):
            taken.append(chaos.until(lambda done=done: _sample(chaos, elder, done)))  # type: ignore[misc]
            chaos.history.write("sample", **asdict(taken[-1]))
        for moment, worker in list(frozen):
            if time.monotonic() > moment:
                frozen.remove((moment, worker))
                worker.frozen = False
                worker.process.send(signal.SIGCONT)
        if len(taken) == samples and chaos.client.accepted >= jobs and not frozen:
            return taken
        if time.monotonic() > due:
            if caught := _one_fault(chaos, elder):
                frozen.append((time.monotonic() + 2 * lease, caught))
            due = time.monotonic() + every
        time.sleep(PAUSE)


def _one_fault(chaos: Chaos, elder: Worker) -> Worker | None:
    """Do one of them; answers the worker that was frozen by it."""
    server, broker = chaos.servers.postgres, chaos.servers.valkey
    assert server is not None
    assert broker is not None
    kinds = ["kill", "kill", "freeze", "cut", "broker killed", "broker frozen", "broker emptied", "litter"]
    kind = "postgres" if chaos.random.randrange(RARE) == 0 else chaos.random.choice(kinds)
    if kind in ("kill", "freeze"):
        found = chaos.catch([one for one in chaos.holding() if one is not elder])
        if found is None:
            return None
        if kind == "kill":
            chaos.kill(found)
            return None
        found.frozen = True
        chaos.history.write("freeze", worker=found.id)
        chaos.figures.add("freezes")
        return found
    if kind == "postgres":
        crash_postgres(chaos, server)
    elif kind == "cut":
        cut_connections(chaos)
    elif kind == "broker killed":
        crash(broker, signal.SIGKILL)
        time.sleep(BROKER_SECONDS)
        revive(chaos, broker)
    else:
        act = {"broker frozen": freeze_broker, "broker emptied": empty_broker, "litter": litter_broker}[kind]
        act(chaos, broker, BROKER_SECONDS)
    chaos.history.write("fault", kind=kind)
    if kind.startswith("broker") or kind == "litter":
        chaos.figures.add(kind)
    return None


def _sample(chaos: Chaos, elder: Worker, done: int) -> Sample:
    memory = {process.part: _resident(process.pid) for process in chaos.others}
    broker = chaos.servers.valkey
    assert broker is not None
    assert broker.pid is not None
    sizes = {row.name: row.bytes for row in chaos.ask(_SIZES)}
    return Sample(
        done=done,
        api=memory["api"],
        sweeper=memory["sweeper"],
        worker=_resident(elder.process.pid),
        broker=_resident(broker.pid),
        connections=chaos.ask(_CONNECTIONS)[0].n,
        bytes_per_job=round(sum(sizes.values()) / max(1, chaos.client.accepted), 1),
        small_tables=sum(sizes[name] for name in SMALL),
    )


def _resident(pid: int) -> float:
    return round(psutil.Process(pid).memory_info().rss / MEGABYTE, 1)
