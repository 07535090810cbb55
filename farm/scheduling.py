"""Choosing what to render next. Pure: no clock, no database.

Higher priority first, where a long wait raises priority; then whoever waited past the bound; then the project that was
served least, within a small deficit equal; then warm before same checkpoint before cold.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import IntEnum
from uuid import UUID


class Warmth(IntEnum):
    """How much of a lane's pipeline a worker holds already; less is better."""

    WARM = 0
    SAME_CHECKPOINT = 1
    COLD = 2


@dataclass(frozen=True, slots=True)
class Warm:
    """What a worker keeps warm: lanes with the adapter set merged there, and checkpoints by hash.

    `mixes`: it renders several adapter sets of a lane in one micro-batch, but for the lanes in `apart`.
    """

    lanes: dict[str, str] = field(default_factory=dict)
    checkpoints: frozenset[str] = frozenset()
    mixes: bool = False
    apart: frozenset[str] = frozenset()

    def of(self, lane: str, checkpoint: str) -> Warmth:
        if lane in self.lanes:
            return Warmth.WARM
        return Warmth.SAME_CHECKPOINT if checkpoint in self.checkpoints else Warmth.COLD


@dataclass(frozen=True, slots=True)
class Candidate:
    """A segment with claimable work. `served` counts jobs its project was served lately."""

    segment: UUID
    lane: str
    checkpoint: str
    project: UUID
    priority: int
    ready_since: datetime
    served: float


@dataclass(frozen=True, slots=True)
class Policy:
    """`affinity_bound`: how long warm work may go first. `ageing`: waiting that long is worth one priority level.
    `deficit`: jobs by which projects may differ and still count as served equally (two micro-batches)."""

    affinity_bound: timedelta
    deficit: float
    ageing: timedelta = timedelta(minutes=10)


def rank(candidates: Sequence[Candidate], warm: Warm, policy: Policy, now: datetime) -> list[Candidate]:
    """The candidates in the order in which a worker should try them."""
    if not candidates:
        return []
    least = min(candidate.served for candidate in candidates)

    def order(candidate: Candidate) -> tuple[int, bool, int, Warmth, datetime, UUID]:
        waited = max(now - candidate.ready_since, timedelta(0))
        aged = candidate.priority + waited // policy.ageing
        overdue = waited > policy.affinity_bound
        share = int((candidate.served - least) // policy.deficit) if policy.deficit else 0
        # Overdue work goes oldest first: warmth would let a busy warm lane starve it again.
        warmth = Warmth.WARM if overdue else warm.of(candidate.lane, candidate.checkpoint)
        return (-aged, not overdue, share, warmth, candidate.ready_since, candidate.segment)

    return sorted(candidates, key=order)
