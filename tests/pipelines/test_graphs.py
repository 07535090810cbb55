"""Compiled programs and what they hold of the device: CUDA graphs, slots, weights, and what takes them away.

Capturing is played without a device; what it is played with reads and writes the same memory at every replay.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor, nn

from workers.pipelines.compiling import WORTH_CALLS, Compiler
from workers.pipelines.graphs import Capture, Graphs
from workers.pipelines.load import Pipeline, load
from workers.pipelines.programs import Program, Shape, twin

from .compilers import HERE, SECONDS, Backend, Net, ask, compiled, pipeline, tiny
from .test_slots import adapter, slotted

__all__ = ["pipeline", "tiny"]


def test_slots_that_are_let_go_take_their_programs_along(tiny: Path) -> None:
    pipeline = load(tiny, "sd", torch.float32, torch.float32)
    one = adapter("a", pipeline.merger.shapes, 1, only="attn1")
    slotted(pipeline, [[(one, 1.0)]])
    before = pipeline.slots.engaged
    program = Program(lambda: None, [], [], (), slotted=True)
    other = Program(lambda: None, [], [], ())
    pipeline.programs |= {"slots": program, "plain": other}
    pipeline.clear_slots()
    assert (pipeline.programs, pipeline.slots.engaged) == ({"plain": other}, None)
    slotted(pipeline, [[(one, 1.0)]])
    again = pipeline.slots.engaged
    assert again != before, "other stacks of the same layers"
    slotted(pipeline, [[(one, 0.5)]])
    assert pipeline.slots.engaged == again
    slotted(pipeline, [[(adapter("b", pipeline.merger.shapes, 2, rank=8, only="attn1"), 1.0)]])
    assert pipeline.slots.engaged != again, "a higher rank makes others too"


def fake(seen: list[Any]) -> Capture:
    """What capturing does, without a device: the same memory is read and written at every replay."""

    def capture(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        kept = call().clone()

        def replay() -> Tensor:
            seen.append(kept)
            return kept.copy_(call())

        return replay

    return capture


def clock_of(*seconds: float) -> Callable[[], float]:
    """A clock by which calls take so long, one after the other, five of each."""
    marks = [mark for taken in seconds for _ in range(5) for mark in (0.0, taken)]
    left = iter(marks)
    return lambda: next(left)


def test_a_graph_reads_its_own_memory_and_answers_copies(pipeline: Pipeline) -> None:
    replays: list[Any] = []
    compiler = Compiler(HERE, Backend(), Graphs(HERE.finish, fake(replays), clock_of(1.0, 0.5)))
    x = torch.randn(2, 4)
    compiled(compiler, pipeline, x)
    one = ask(compiler, pipeline, x)
    assert compiler.told()["graphs"] == 1
    kept = one.clone()
    other = ask(compiler, pipeline, torch.randn(2, 4))
    assert torch.equal(one, kept), "the next replay overwrites no earlier answer"
    assert not torch.equal(one, other)
    before = len(replays)
    ask(compiler, pipeline, x, 3)
    assert len(replays) == before + 3
    assert compiler.free(pipeline)
    ask(compiler, pipeline, x, 3)
    assert (len(replays), compiler.told()["graphs"]) == (before + 3, 0), "memory ran out once: not captured again"
    assert not compiler.free(pipeline)


def test_a_graph_that_gains_nothing_is_not_kept(pipeline: Pipeline) -> None:
    compiler = Compiler(HERE, Backend(), Graphs(HERE.finish, fake([]), clock_of(1.0, 0.99)))
    compiled(compiler, pipeline, torch.ones(2, 4))
    ask(compiler, pipeline, torch.ones(2, 4), 3)
    assert (compiler.told()["ready"], compiler.told()["graphs"]) == (1, 0)


def test_nothing_is_captured_while_something_compiles(pipeline: Pipeline) -> None:
    backend, replays = Backend(), list[Any]()
    compiler = Compiler(HERE, backend, Graphs(HERE.finish, fake(replays), clock_of(1.0, 0.5)))
    compiled(compiler, pipeline, torch.ones(2, 4))
    backend.go_on.clear()
    ask(compiler, pipeline, torch.ones(3, 4), WORTH_CALLS)
    # The compiling thread has it in hand once nothing but that is left.
    with compiler._changed:
        assert compiler._changed.wait_for(lambda: not compiler._wanted, SECONDS)
    while not compiler._quiet.locked():
        Event().wait(0.001)
    ask(compiler, pipeline, torch.ones(2, 4), 3)
    assert not replays
    backend.go_on.set()
    assert compiler.settled(SECONDS)
    ask(compiler, pipeline, torch.ones(2, 4))
    assert compiler.told()["graphs"] == 1


def test_what_leaves_the_device_takes_its_graphs_along(pipeline: Pipeline) -> None:
    compiler = Compiler(HERE, Backend(), Graphs(HERE.finish, fake([]), clock_of(1.0, 0.5, 1.0, 0.5)))
    x = torch.randn(2, 4)
    compiled(compiler, pipeline, x)
    ask(compiler, pipeline, x)
    pipeline.park(0)
    assert (compiler.told()["ready"], compiler.told()["graphs"]) == (1, 0), "what is compiled finds its weights again"
    ask(compiler, pipeline, x)
    assert compiler.told()["graphs"] == 1


def test_what_is_forgotten_takes_everything_along(pipeline: Pipeline, tiny: Path) -> None:
    backend = Backend()
    compiler = Compiler(HERE, backend)
    compiled(compiler, pipeline, torch.ones(2, 4))
    second = load(tiny, "sd", torch.float32, torch.float32)
    second.unet = Net().requires_grad_(False)
    backend.go_on.clear()
    ask(compiler, pipeline, torch.ones(3, 4), WORTH_CALLS)
    ask(compiler, second, torch.ones(2, 4), WORTH_CALLS)
    with compiler._changed:
        assert compiler._changed.wait_for(lambda: len(compiler._wanted) == 1, SECONDS)
    gone = [weakref.ref(one) for one in (second, second.unet, second.unet.layer.weight)]
    del second
    gc.collect()
    assert gone[0]() is None, "waiting keeps no checkpoint"
    ask(compiler, pipeline, torch.ones(4, 4))
    gc.collect()
    assert [one() for one in gone] == [None] * 3
    assert compiler.told()["waiting"] == 1
    backend.go_on.set()
    assert compiler.settled(SECONDS)


def test_a_twin_shares_weights_and_nothing_else() -> None:
    shared = nn.Linear(2, 2)
    one = nn.Sequential(shared, nn.BatchNorm1d(2), nn.ModuleList([shared]))
    other = twin(one)
    assert isinstance(other, nn.Sequential)
    assert list(map(id, other.parameters())) == list(map(id, one.parameters()))
    assert list(map(id, other.buffers())) == list(map(id, one.buffers()))
    assert other[0] is other[2][0]
    assert not {id(module) for module in other.modules()} & {id(module) for module in one.modules()}
    one[0] = nn.Identity()
    assert type(other[0]) is nn.Linear
    assert Shape.of(torch.ones(2, 3).t()).empty().stride() == (1, 3)
