"""Choosing what to render next. Pure: no clock, no database, no randomness of its own.

Higher priority first; then projects by how much they were served; then warm before same checkpoint before cold, except
that now and then age decides. What other workers are about to finish anyway is left to them. docs/scheduling.md says
why, and how a simulated farm of a thousand workers fares with it.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import IntEnum
from uuid import UUID
from zlib import crc32

FAIR_SHARE_HALF_LIFE = timedelta(minutes=2)
"""After this long, what a project was served counts half."""

SETS_TRIED = 8
"""Lanes and adapter sets a claim looks into before it answers that there is nothing: others may hold the jobs of the
first ones."""

SEGMENTS_TRIED = 3
"""Segments it looks into for each of these."""

_ANY_AGE = datetime.min.replace(tzinfo=UTC)


class Warmth(IntEnum):
    """How much of what a segment needs a worker holds already; less is better."""

    WARM = 0
    SAME_CHECKPOINT = 1
    COLD = 2


@dataclass(frozen=True, slots=True)
class Warm:
    """What a worker keeps warm: lanes with the adapter set merged there, and checkpoints by hash.

    `pace`: seconds that a micro-batch takes it, 0 while it has rendered none.
    `mixes`: it renders several adapter sets of a lane in one micro-batch, but for the lanes in `apart`.
    `resting`: hashes of checkpoints and lanes that it failed lately, and leaves to others as long as there are some.
    """

    lanes: dict[str, str] = field(default_factory=dict)
    checkpoints: frozenset[str] = frozenset()
    pace: float = 0.0
    mixes: bool = False
    apart: frozenset[str] = frozenset()
    resting: frozenset[str] = frozenset()

    def mixes_in(self, lane: str) -> bool:
        """Whether jobs of this lane may come in several adapter sets at once."""
        return self.mixes and lane not in self.apart

    def of(self, lane: str, checkpoint: str, adapter_set: str | None) -> Warmth:
        """`adapter_set` is None for a segment that has several."""
        if lane in self.lanes and (self.mixes_in(lane) or adapter_set in (None, self.lanes[lane])):
            return Warmth.WARM
        return Warmth.SAME_CHECKPOINT if lane in self.lanes or checkpoint in self.checkpoints else Warmth.COLD


@dataclass(frozen=True, slots=True)
class Candidate:
    """A segment with claimable work.

    `served`: jobs its project was served lately. `queued`, `running`: its own jobs. `elsewhere`: its checkpoint is not
    here, but some other worker of the pool holds it.
    """

    segment: UUID
    lane: str
    checkpoint: str
    adapter_set: str | None
    project: UUID
    priority: int
    ready_since: datetime
    served: float
    queued: int
    running: int
    elsewhere: bool


@dataclass(frozen=True, slots=True)
class Policy:
    """How a worker chooses. `micro_batch`: most jobs it takes at once; `workers`: how many the pool has.

    `affinity_bound`: how long warm work may go first. `by_age`: in which share of claims (0..1) that bound counts; in
    the others warm work goes on, or a backlog older than the bound would make every claim a swap.
    `ageing`: waiting that long is worth one priority level. `deficit`: micro-batches of every worker by which projects
    may differ and still count as served equally. `swap_patience`, `load_patience`: a worker swaps adapters, or loads a
    checkpoint that others hold, only for a segment that they would not finish within this time.
    """

    affinity_bound: timedelta
    micro_batch: int
    workers: int = 1
    by_age: float = 0.125
    ageing: timedelta = timedelta(minutes=10)
    deficit: float = 16.0
    swap_patience: timedelta = timedelta(seconds=5)
    load_patience: timedelta = timedelta(seconds=20)

    def share(self, served: float, least: float) -> int:
        """0 for a project that was not served a micro-batch lately; then the more, the more it is ahead of the least.

        >>> policy = Policy(timedelta(seconds=30), micro_batch=8)
        >>> [policy.share(served, 10) for served in (0, 10, 137, 138, 10_000)]
        [0, 1, 1, 2, 79]
        """
        if served < self.micro_batch:
            return 0
        return 1 + int((served - least) // (self.deficit * self.micro_batch * self.workers))

    def left_to_others(self, candidate: Candidate, warmth: Warmth, pace: float) -> bool:
        """Whether others will be done with it before a swap or a load would help. Nobody has to wait for that past
        the affinity bound, and a worker that does not know its pace yet takes what it finds."""
        if warmth is Warmth.WARM:
            return False
        hands, patience = candidate.running, self.swap_patience
        if warmth is Warmth.COLD:
            patience = self.load_patience
            if candidate.elsewhere:
                # Whoever holds the checkpoint comes for it.
                hands = max(hands, self.micro_batch)
        return 0 < candidate.queued * pace <= hands * patience.total_seconds()


def rank(
    candidates: Sequence[Candidate], warm: Warm, policy: Policy, now: datetime, *, worker: UUID, chance: float
) -> list[Candidate]:
    """The candidates worth trying, in the order in which a worker should try them.

    `chance` (0..1, drawn anew for each claim) decides whether age counts this time. `worker` makes each worker prefer
    other adapter sets among equals: a thousand idle ones then spread over the segments, and meet their sets again.
    """
    if not candidates:
        return []
    least = min(candidate.served for candidate in candidates)
    by_age = chance < policy.by_age
    taste = crc32(worker.bytes)
    keyed: list[tuple[tuple[int, int, int, datetime, int, UUID], Candidate]] = []
    for candidate in candidates:
        waited = max(now - candidate.ready_since, timedelta(0))
        overdue = waited > policy.affinity_bound
        warmth = warm.of(candidate.lane, candidate.checkpoint, candidate.adapter_set)
        if not overdue and policy.left_to_others(candidate, warmth, warm.pace):
            continue
        share = policy.share(candidate.served, least)
        # A backlog of a project that is ahead does not age, or it would outrank everybody who came later.
        aged = candidate.priority + (waited // policy.ageing if share <= 1 else 0)
        if overdue and by_age:
            # Oldest first: warmth would let a busy warm lane starve it again.
            last = (-1, candidate.ready_since, 0)
        elif warmth is Warmth.WARM:
            last = (warmth, candidate.ready_since, 0)
        else:
            last = (warmth, _ANY_AGE, crc32((candidate.adapter_set or "").encode(), taste))
        keyed.append(((-aged, share, *last, candidate.segment), candidate))
    return [candidate for _, candidate in sorted(keyed, key=lambda pair: pair[0])]


def few(ranked: Sequence[Candidate], warm: Warm) -> Iterator[Candidate]:
    """The first segments of the first lanes and adapter sets; of the first lanes, where their sets may be mixed."""
    tried: Counter[tuple[str, str | None]] = Counter()
    for candidate in ranked:
        like = (candidate.lane, None if warm.mixes_in(candidate.lane) else candidate.adapter_set)
        if tried[like] < SEGMENTS_TRIED and (like in tried or len(tried) < SETS_TRIED):
            tried[like] += 1
            yield candidate
