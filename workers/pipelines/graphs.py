"""CUDA graphs of compiled programs: captured by ourselves, replayed from any thread, kept where they are faster.

torch's own (`mode="reduce-overhead"`) belong to the thread that made them: their state is thread-local, and a worker
renders in two threads by turns. A graph captured by hand has no such state. What it needs instead is ours to see to:
inputs are copied to where it reads them, its answer is copied before the next replay overwrites it, and all of it
happens inside the device lock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from workers.pipelines.programs import Program

WARM_UPS = 3
TRIALS = 5
"""How often each way is measured; the fastest counts."""
GAIN = 1.02
"""A graph holds device memory for good, so it has to be this much faster at least."""

Replay = Callable[[], Tensor]
Capture = Callable[[Callable[[], Tensor]], Replay]


class Graph:
    """A captured program. Calls belong inside the device lock."""

    def __init__(self, program: Program, tensors: Sequence[Tensor], capture: Capture) -> None:
        self._inputs = [shape.empty().copy_(one) for shape, one in zip(program.shapes, tensors, strict=True)]
        self._replay = capture(lambda: program(*self._inputs))

    def __call__(self, *tensors: Tensor) -> Tensor:
        for kept, one in zip(self._inputs, tensors, strict=True):
            kept.copy_(one)
        return self._replay().clone()


class Graphs:
    """Makes graphs of programs on one device."""

    def __init__(
        self, finish: Callable[[], None], capture: Capture | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """`finish` waits for the device, so that what is measured was done."""
        self._finish = finish
        self._capture = capture or Captured()
        self._clock = clock

    def of(self, program: Program, tensors: Sequence[Tensor]) -> Graph | None:
        """A graph of a program with inputs like these, or None where it gains too little."""
        graph = Graph(program, tensors, self._capture)
        plain = self._seconds(lambda: program(*tensors))
        replayed = self._seconds(lambda: graph(*tensors))
        return graph if plain >= replayed * GAIN else None

    def _seconds(self, call: Callable[[], Tensor]) -> float:
        found = []
        for _ in range(TRIALS):
            self._finish()
            started = self._clock()
            call()
            self._finish()
            found.append(self._clock() - started)
        return min(found)


class Captured:
    """Captures on a CUDA device. All graphs share one pool of memory, as no two are ever replayed at once and no answer
    outlives its replay."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, call: Callable[[], Tensor]) -> Replay:
        beside: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch has no types here
        now = torch.cuda.current_stream()
        beside.wait_stream(now)
        with torch.cuda.stream(beside):
            for _ in range(WARM_UPS):
                call()
        now.wait_stream(beside)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: the other one may allocate meanwhile, staging what comes next.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            answer = call()

        def replay() -> Tensor:
            graph.replay()
            return answer

        return replay
