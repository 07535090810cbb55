"""What is submitted to a simulated farm: batches of jobs with skewed popularity, in bursts."""

from dataclasses import dataclass
from typing import Any

import numpy as np

CHECKPOINTS = 3
ADAPTERS = 500
PROJECTS = 100
EXPONENT = 1.1
SHAPES = 2
"""Lanes a checkpoint has: two sizes of picture."""
BURST_SECONDS = 20.0
"""For half of this three quarters of the batches come, for the other half the rest."""
SIZES = ((0.60, 1, 4), (0.25, 8, 200), (0.15, 200, 10_000))
"""Batches by share: single pictures, a few dozen to look at, data sets. Log-uniform within each range."""
SWEEPS = 0.2
"""Share of the batches above eight jobs that try several adapters of one checkpoint, 2 to 8."""


@dataclass(frozen=True, slots=True)
class Submission:
    """A batch: `sets` are adapter sets with how many of its jobs want each. `at` in seconds since the start."""

    at: float
    project: int
    checkpoint: int
    lane: int
    sets: tuple[tuple[int, int], ...]


def zipf(count: int) -> Any:
    """Probabilities (count,) of ranks 1..count, each proportional to its rank to the power of minus `EXPONENT`."""
    weights = np.arange(1, count + 1, dtype=float) ** -EXPONENT
    return weights / weights.sum()


class Workload:
    """Random submissions; the same seed makes the same ones."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._adapters = zipf(ADAPTERS)
        self._projects = self._rng.permutation(zipf(PROJECTS))
        self._home = self._rng.choice(CHECKPOINTS, size=ADAPTERS, p=zipf(CHECKPOINTS))
        self._of = [np.flatnonzero(self._home == checkpoint) for checkpoint in range(CHECKPOINTS)]

    def one(self, at: float, project: int, jobs: int, *, sweep: bool = False) -> Submission:
        """A batch of `jobs` with random adapters."""
        first = int(self._rng.choice(ADAPTERS, p=self._adapters))
        checkpoint = int(self._home[first])
        chosen = [first]
        if sweep:
            others = self._of[checkpoint]
            p = self._adapters[others] / self._adapters[others].sum()
            chosen = sorted({first, *self._rng.choice(others, size=int(self._rng.integers(1, 8)), p=p).tolist()})
        each, rest = divmod(jobs, len(chosen))
        sets = tuple((name, each + (index < rest)) for index, name in enumerate(chosen) if each + (index < rest))
        return Submission(at, project, checkpoint, checkpoint * SHAPES + int(self._rng.integers(SHAPES)), sets)

    def stream(self, seconds: float, jobs: int) -> list[Submission]:
        """Batches of `jobs` altogether over so many seconds, a whole number of bursts, in order of time."""
        sizes: list[int] = []
        while (missing := jobs - sum(sizes)) > 0:
            _, low, high = SIZES[int(self._rng.choice(len(SIZES), p=[share for share, _, _ in SIZES]))]
            sizes.append(min(missing, round(float(np.exp(self._rng.uniform(np.log(low), np.log(high)))))))
        # The middle of the unit interval is stretched: 3/4 of the draws fall into the first half of a burst.
        phase = self._rng.random(len(sizes))
        phase = np.where(phase < 0.75, phase / 1.5, phase * 2 - 1)
        bursts = self._rng.integers(max(1, round(seconds / BURST_SECONDS)), size=len(sizes))
        times = np.sort((bursts + phase) * BURST_SECONDS)
        owners = self._rng.choice(PROJECTS, size=len(sizes), p=self._projects)
        sweeps = self._rng.random(len(sizes)) < SWEEPS
        return [
            self.one(float(at), int(owner), size, sweep=bool(sweep) and size > 8)
            for at, owner, size, sweep in zip(times, owners, sizes, sweeps, strict=True)
        ]
