"""The rows a claim looks at, in memory: finds what `farm/queries/claiming.py` finds.

One priority, everything due when submitted, no pauses and no failures: there a claim only looks at more of the same.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice
from random import Random
from uuid import UUID

from benchmarks.simulated.workload import Submission
from farm.queries.claiming import FURTHER, FURTHER_WIDTH, LEVEL_WIDTH, PROJECTS_SEEN, WARM_WIDTH
from farm.scheduling import FAIR_SHARE_HALF_LIFE

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)


def when(seconds: float) -> datetime:
    """Simulated seconds as the clock of the database."""
    return EPOCH + timedelta(seconds=seconds)


class Segment:
    """Jobs of one batch in one lane with one adapter set, all due since `at` (seconds)."""

    __slots__ = (
        "adapter_set",
        "at",
        "checkpoint",
        "id",
        "lane",
        "owner",
        "project",
        "queued",
        "ready_since",
        "running",
    )

    def __init__(self, number: int, batch: Submission, adapter_set: int, jobs: int) -> None:
        self.id = UUID(int=number)
        self.at = batch.at
        self.ready_since = when(batch.at)
        self.owner = batch.project
        self.project = UUID(int=batch.project)
        self.checkpoint = f"c{batch.checkpoint}"
        self.lane = f"l{batch.lane}"
        self.adapter_set = f"a{adapter_set}"
        self.queued = jobs
        self.running = 0


Ordered = OrderedDict[UUID, Segment]


class Queue:
    """Segments with queued jobs, oldest first, by everything that claims look for them by."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._ready: Ordered = OrderedDict()
        self._by_lane: dict[str, Ordered] = defaultdict(OrderedDict)
        self._by_set: dict[tuple[str, str], Ordered] = defaultdict(OrderedDict)
        self._by_project: dict[int, Ordered] = {}
        self._served: dict[int, float] = defaultdict(float)
        self._claimed: dict[int, int] = defaultdict(int)
        self._numbers = 0
        self.jobs = 0

    def submit(self, batch: Submission) -> None:
        """A segment for each adapter set: never more of them than submission keeps apart."""
        for adapter_set, jobs in batch.sets:
            self._numbers += 1
            segment = Segment(self._numbers, batch, adapter_set, jobs)
            for index in self._indexes(segment):
                index[segment.id] = segment
            self.jobs += jobs

    def candidates(self, lanes: dict[str, str]) -> dict[UUID, Segment]:
        """What the claim's first statement answers a worker with these warm lanes."""
        found = dict(islice(self._ready.items(), LEVEL_WIDTH))
        further = self._random.randrange(FURTHER)
        found.update(islice(self._ready.items(), further, further + FURTHER_WIDTH))
        projects = list(self._by_project)
        if len(projects) > PROJECTS_SEEN:
            projects.sort()
            start = self._random.randrange(len(projects))
            projects = (projects[start:] + projects[:start])[:PROJECTS_SEEN]
        for owner in projects:
            found.update(islice(self._by_project[owner].items(), 1))
        for lane, adapter_set in lanes.items():
            found.update(islice(self._by_set[lane, adapter_set].items(), WARM_WIDTH))
            found.update(islice(self._by_lane[lane].items(), WARM_WIDTH))
        return found

    def oldest(self) -> Segment | None:
        """The head of the whole queue."""
        return next(iter(self._ready.values()), None)

    def take(self, lead: Segment, limit: int) -> list[tuple[Segment, int]]:
        """A micro-batch: from the lead segment, then from others of its lane and set. Answers (segment, jobs)."""
        taken: list[tuple[Segment, int]] = []
        for segment in self._with_others(lead, limit):
            count = min(segment.queued, limit)
            segment.queued -= count
            segment.running += count
            limit -= count
            self.jobs -= count
            self._claimed[segment.owner] += count
            taken.append((segment, count))
            if not limit:
                break
        for segment, _ in taken:
            if not segment.queued:
                for index in self._indexes(segment):
                    del index[segment.id]
                if not self._by_project[segment.owner]:
                    del self._by_project[segment.owner]
        return taken

    def fold(self, seconds: float) -> None:
        """What the sweeper does every so many seconds: claims made since then begin to count as served."""
        decay = 0.5 ** (seconds / FAIR_SHARE_HALF_LIFE.total_seconds())
        for owner in self._served.keys() | self._claimed.keys():
            self._served[owner] = self._served[owner] * decay + self._claimed.pop(owner, 0)

    def served(self, segment: Segment) -> float:
        """As of the last fold."""
        return self._served[segment.owner]

    def _with_others(self, lead: Segment, limit: int) -> Iterator[Segment]:
        yield lead
        others = list(islice(self._by_set[lead.lane, lead.adapter_set].values(), limit + 1))
        yield from (segment for segment in others if segment is not lead)

    def _indexes(self, segment: Segment) -> tuple[Ordered, ...]:
        return (
            self._ready,
            self._by_lane[segment.lane],
            self._by_set[segment.lane, segment.adapter_set],
            self._by_project.setdefault(segment.owner, OrderedDict()),
        )
