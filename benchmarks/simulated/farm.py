"""A farm of simulated workers: events on a heap, and the policy that is really run."""

import heapq
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from uuid import UUID

from benchmarks.simulated.queue import Queue, Segment, when
from benchmarks.simulated.workload import CHECKPOINTS, Submission
from farm import scheduling
from farm.doorbell import MOST_WAITING
from farm.scheduling import Candidate, Policy, Warm


@dataclass(frozen=True, slots=True)
class Costs:
    """What things take, in seconds, and what a worker has room for.

    A micro-batch of n takes `base + n * each`: SDXL at 13 images a second. `fetch` comes before the swap to an adapter
    that the worker does not hold. `hop`: from a ring to the claim of whoever heard it.
    """

    workers: int = 1_000
    micro_batch: int = 8
    base: float = 0.06
    each: float = 0.07
    load: float = 10.0
    swap: float = 0.1
    fetch: float = 0.3
    checkpoints: int = 2
    adapters: int = 50
    hop: float = 0.005
    poll: float = 5.0
    sweep: float = 1.0

    @property
    def full(self) -> float:
        """Seconds a full micro-batch renders."""
        return self.base + self.micro_batch * self.each

    @property
    def capacity(self) -> float:
        """Jobs a second of all workers, were every micro-batch full and everything warm."""
        return self.workers * self.micro_batch / self.full


@dataclass(slots=True, eq=False)
class Worker:
    """`merged`: checkpoints on the device with the adapter set merged there, least recently used first; `held`: the
    adapters at hand likewise; `turn` counts looks for work, so that a poll planned before the last one is void."""

    id: UUID
    merged: OrderedDict[str, str] = field(default_factory=OrderedDict)
    lanes: dict[str, str] = field(default_factory=dict)
    held: OrderedDict[str, None] = field(default_factory=OrderedDict)
    busy: bool = False
    turn: int = 0


@dataclass(frozen=True, slots=True)
class Begun:
    """Jobs of one segment whose rendering began: times in seconds."""

    project: int
    jobs: int
    submitted: float
    wait: float


Chooser = Callable[["Farm", Worker], Segment | None]


class Farm:
    """`choose` picks the segment for a worker; everything else is alike for all policies."""

    def __init__(self, costs: Costs, choose: Chooser, seed: int) -> None:
        self.costs = costs
        self.random = Random(seed)
        self.queue = Queue(self.random)
        self.now = 0.0
        self.micro_batches = self.loads = self.swaps = self.fetches = 0
        self.begun: list[Begun] = []
        self.rendered_at = 0.0
        self._choose = choose
        self._bells = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._planned = 0
        self.workers = [Worker(UUID(int=self.random.getrandbits(128))) for _ in range(costs.workers)]
        self._holders: Counter[str] = Counter()
        for worker in self.workers:
            # Nobody starts cold: the first loads belong to no policy.
            for number in self.random.sample(range(CHECKPOINTS), costs.checkpoints):
                worker.merged[f"c{number}"] = ""
                self._holders[f"c{number}"] += 1
        self._idle = deque(self.workers)

    def run(self, batches: Sequence[Submission]) -> None:
        """Submit these, in order of time, and go on until all of it is in work."""
        coming = deque(batches)

        def submit() -> None:
            self.queue.submit(coming.popleft())
            self._ring(1)
            if coming:
                self._at(coming[0].at, submit)

        def sweep() -> None:
            self.queue.fold(self.costs.sweep)
            if self.queue.jobs:
                self._ring(min(self.queue.jobs, 2 * len(self.workers)))
            self._at(self.now + self.costs.sweep, sweep)

        self._at(coming[0].at, submit)
        self._at(self.costs.sweep, sweep)
        for worker in self.workers:
            self._plan_poll(worker)
        while coming or self.queue.jobs:
            self.now, _, event = heapq.heappop(self._events)
            event()

    def candidates(self, worker: Worker) -> tuple[dict[UUID, Segment], list[Candidate], Warm]:
        """Rows, candidates and warmth as `farm.jobs.claim` hands them to `rank`."""
        lanes = {lane: worker.merged[home] for lane, home in worker.lanes.items() if home in worker.merged}
        warm = Warm(lanes, frozenset(worker.merged), self.costs.full)
        rows = self.queue.candidates(lanes)
        return rows, [self._candidate(row, warm) for row in rows.values()], warm

    def _candidate(self, row: Segment, warm: Warm) -> Candidate:
        return Candidate(
            row.id,
            row.lane,
            row.checkpoint,
            row.adapter_set,
            row.project,
            0,
            row.ready_since,
            self.queue.served(row),
            row.queued,
            row.running,
            row.checkpoint not in warm.checkpoints and self._holders[row.checkpoint] > 0,
        )

    def _look(self, worker: Worker) -> None:
        """A worker is done, heard a bell or asks on its own."""
        worker.turn += 1
        lead = self._choose(self, worker) if self.queue.jobs else None
        if lead is None:
            worker.busy = False
            self._idle.append(worker)
            self._plan_poll(worker)
            return
        worker.busy = True
        taken = self.queue.take(lead, self.costs.micro_batch)
        if self.queue.jobs:
            self._ring(1)
        begins = self.now + self._prepare(worker, lead)
        for segment, count in taken:
            self.begun.append(Begun(segment.owner, count, segment.at, begins - segment.at))
        ends = begins + self.costs.base + sum(count for _, count in taken) * self.costs.each
        self.micro_batches += 1
        self.rendered_at = max(self.rendered_at, ends)

        def done() -> None:
            for segment, count in taken:
                segment.running -= count
            self._look(worker)

        self._at(ends, done)

    def _prepare(self, worker: Worker, lead: Segment) -> float:
        """Load, fetch and merge what the lead needs; answers the seconds."""
        seconds = 0.0
        if lead.checkpoint not in worker.merged:
            self.loads += 1
            seconds += self.costs.load
            if len(worker.merged) >= self.costs.checkpoints:
                gone, _ = worker.merged.popitem(last=False)
                self._holders[gone] -= 1
            worker.merged[lead.checkpoint] = ""
            self._holders[lead.checkpoint] += 1
        worker.merged.move_to_end(lead.checkpoint)
        worker.lanes[lead.lane] = lead.checkpoint
        if worker.merged[lead.checkpoint] == lead.adapter_set:
            return seconds
        self.swaps += 1
        if lead.adapter_set not in worker.held:
            self.fetches += 1
            seconds += self.costs.fetch
            worker.held[lead.adapter_set] = None
            if len(worker.held) > self.costs.adapters:
                worker.held.popitem(last=False)
        worker.held.move_to_end(lead.adapter_set)
        worker.merged[lead.checkpoint] = lead.adapter_set
        return seconds + self.costs.swap

    def _plan_poll(self, worker: Worker) -> None:
        turn = worker.turn

        def poll() -> None:
            if not worker.busy and worker.turn == turn:
                self._idle.remove(worker)
                self._look(worker)

        self._at(self.now + self.costs.poll * self.random.uniform(0.5, 1.5), poll)

    def _ring(self, times: int) -> None:
        """See that so many bells are waiting; a hop later each is heard by whoever waited longest."""
        for _ in range(min(times, MOST_WAITING) - self._bells):
            self._bells += 1
            self._at(self.now + self.costs.hop, self._hear)

    def _hear(self) -> None:
        self._bells -= 1
        if self._idle and self.queue.jobs:
            self._look(self._idle.popleft())

    def _at(self, seconds: float, event: Callable[[], None]) -> None:
        self._planned += 1
        heapq.heappush(self._events, (seconds, self._planned, event))


def first_in_first_out(farm: Farm, _: Worker) -> Segment | None:
    """The oldest work, whatever it needs."""
    return farm.queue.oldest()


def warm_first(farm: Farm, worker: Worker) -> Segment | None:
    """Warm before same checkpoint before cold, then the oldest: no bound, no fairness, nothing left to others."""
    rows, _, warm = farm.candidates(worker)
    return min(
        rows.values(),
        key=lambda row: (warm.of(row.lane, row.checkpoint, row.adapter_set), row.ready_since, row.id),
        default=None,
    )


def ours(policy: Policy) -> Chooser:
    """What `farm.jobs.claim` does with `rank`: tries the first candidate, and here it has work."""

    def choose(farm: Farm, worker: Worker) -> Segment | None:
        rows, candidates, warm = farm.candidates(worker)
        ranked = scheduling.rank(
            candidates, warm, policy, when(farm.now), worker=worker.id, chance=farm.random.random()
        )
        return rows[ranked[0].segment] if ranked else None

    return choose
