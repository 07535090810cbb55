"""Merge or slots? By what each was measured to cost on this device, lane by lane."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Literal

Way = Literal["merged", "slots"]

LANES_REMEMBERED = 256
WARM_UP = 1
"""Measurements of each way that do not count: the first one compiles, allocates and fills caches."""
KEPT = 8
"""Measurements kept of each way; the least counts, because noise only ever adds."""
LEAST = 3
"""Measurements of slots before a lane is claimed one set at a time: after that few of them come."""
LOOK_AGAIN = 512
"""After so many images the cheaper way, the other one is measured once more: devices and neighbours change."""


@dataclass
class _Seen:
    """Seconds per image in micro-batches of one size."""

    skipped: int = 0
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))

    def add(self, seconds: float) -> None:
        if self.skipped < WARM_UP:
            self.skipped += 1
        else:
            self.seconds.append(seconds)


@dataclass
class _Lane:
    """What one lane costs: by way and number of images, and by swap. `since` counts images rendered since each way was
    measured last."""

    seen: dict[tuple[Way, int], _Seen] = field(default_factory=dict)
    swap: _Seen = field(default_factory=lambda: _Seen(skipped=WARM_UP))
    since: dict[Way, int] = field(default_factory=lambda: {"merged": 0, "slots": 0})

    def each(self, way: Way, images: int, least: int = 1) -> float | None:
        """Seconds an image takes in a micro-batch of so many: as measured, or of the nearest size that was."""
        sizes = [size for (other, size), seen in self.seen.items() if other == way and len(seen.seconds) >= least]
        if not sizes:
            return None
        nearest = min(sizes, key=lambda size: (abs(size - images), size))
        return min(self.seen[way, nearest].seconds)


class Costs:
    """Measured costs of one device. Lanes fix checkpoint, size and steps, so a lane stands for its geometry.

    Safe to share between threads.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._lanes: OrderedDict[str, _Lane] = OrderedDict()

    def rendered(self, lane: str, way: Way, images: int, seconds: float) -> None:
        """So many images were rendered at once in so many seconds.

        With slots that counts filling them and merging the sets' parts for the text encoders; merged, it counts no
        swap.
        """
        with self._lock:
            known = self._of(lane)
            known.seen.setdefault((way, images), _Seen()).add(seconds / images)
            for other in known.since:
                known.since[other] += images
            known.since[way] = 0

    def swapped(self, lane: str, seconds: float) -> None:
        """A set of adapters was merged in so many seconds."""
        with self._lock:
            self._of(lane).swap.add(seconds)

    def choose(self, lane: str, groups: Sequence[int]) -> Way:
        """How to render a micro-batch with `groups` images of each adapter set.

        Slots until both ways were measured; after that the cheaper one, and now and then the other.
        """
        with self._lock:
            known = self._of(lane)
            slots, merged = _estimates(known, groups)
            since = dict(known.since)
        if slots is None or merged is None:
            return "slots" if slots is None else "merged"
        ways: tuple[Way, Way] = ("slots", "merged") if slots <= merged else ("merged", "slots")
        cheaper, other = ways
        return other if since[other] >= LOOK_AGAIN else cheaper

    def apart(self, limit: int) -> frozenset[str]:
        """Lanes where even a full micro-batch of as many sets as images is cheaper one set after the other: claims
        had better take one set at a time there, until slots are due to be measured again."""
        with self._lock:
            estimated = {
                lane: _estimates(known, [1] * limit, LEAST)
                for lane, known in self._lanes.items()
                if known.since["slots"] < LOOK_AGAIN
            }
        return frozenset(
            lane
            for lane, (slots, merged) in estimated.items()
            if slots is not None and merged is not None and merged < slots
        )

    def _of(self, lane: str) -> _Lane:
        found = self._lanes.setdefault(lane, _Lane())
        self._lanes.move_to_end(lane)
        while len(self._lanes) > LANES_REMEMBERED:
            self._lanes.popitem(last=False)
        return found


def _estimates(known: _Lane, groups: Sequence[int], least: int = 1) -> tuple[float | None, float | None]:
    """Seconds with slots, and seconds merged group by group; None where too little was measured."""
    images = sum(groups)
    each = known.each("slots", images, least)
    slots = None if each is None else each * images
    parts = [known.each("merged", size) for size in groups]
    told = [part * size for part, size in zip(parts, groups, strict=True) if part is not None]
    if len(told) < len(parts):
        return slots, None
    return slots, sum(told) + min(known.swap.seconds, default=0.0) * len(groups)
