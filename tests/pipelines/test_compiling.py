"""Networks compiled beside the serving thread: what serves when, what a swap costs, and that nothing of it fails a job.

The backends are torch's that need no compiler, or our own: what a compiler makes of a graph is torch's matter.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor, nn
from torch._dynamo.utils import counters

from farm.recipe import Recipe
from workers.pipelines import compiling, programs
from workers.pipelines.compiling import MOST_FAILURES, TRIES, WORTH_CALLS, Compiler, compiler_for, inductor
from workers.pipelines.device import Device
from workers.pipelines.engine import Engine
from workers.pipelines.graphs import Capture, Graphs
from workers.pipelines.load import Pipeline, load
from workers.pipelines.programs import Program, Shape, twin

from . import toys
from .conftest import farm_settings, go_on, recipe
from .test_slots import adapter, slotted

SECONDS = 120.0
"""Far more than any of it takes."""
HERE = Device(torch.device("cpu"), torch.float32, 2**30)


class Backend:
    """torch's `aot_eager`, or another: counts graphs and what they are called with, and waits to be let go."""

    def __init__(self, make: Callable[..., Any] | None = None) -> None:
        self.graphs = self.calls = 0
        self.go_on = Event()
        self.go_on.set()
        self._make = make or (lambda graph, _examples: graph.forward)

    def __call__(self, graph: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
        assert self.go_on.wait(SECONDS)
        made = self._make(graph, examples)
        self.graphs += 1

        def run(*flat: Any) -> Any:
            self.calls += 1
            return made(*flat)

        return run


class Net(nn.Module):
    """Small enough to be traced at once."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, *, twice: bool = False) -> tuple[Tensor]:
        return (self.layer(x) * (2 if twice else 1),)

    decode = forward


@pytest.fixture
def pipeline(tiny: Path) -> Pipeline:
    """With a UNet that is traced at once."""
    loaded = load(tiny, "sd", torch.float32, torch.float32)
    loaded.unet = Net().requires_grad_(False)
    return loaded


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose UNet has one block: tracing it takes a second."""
    narrow = {"layers_per_block": 1, "block_out_channels": (8,), "down_block_types": ("CrossAttnDownBlock2D",)}
    return toys.sd(tmp_path_factory.mktemp("tiny"), **narrow, up_block_types=("CrossAttnUpBlock2D",))


@torch.inference_mode()
def ask(compiler: Compiler, pipeline: Pipeline, x: Tensor, times: int = 1, **options: Any) -> Tensor:
    """What the network answers, through the compiler, so often; it must be right each time."""
    expected = pipeline.unet(x, **options)[0]
    for _ in range(times):
        answer = compiler.ask(pipeline, pipeline.unet, "__call__", x, **options)
        assert torch.allclose(answer, expected, atol=1e-5)
    return answer


def compiled(compiler: Compiler, pipeline: Pipeline, x: Tensor, **options: Any) -> None:
    """Have calls of this kind compiled, and tried out."""
    ask(compiler, pipeline, x, WORTH_CALLS, **options)
    assert compiler.settled(SECONDS)
    ask(compiler, pipeline, x, **options)


@pytest.fixture(scope="module")
def files(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("styles")
    shapes = load(tiny, "sd", torch.float32, torch.float32).merger.shapes
    layers = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if ".attn" in name}
    unet = {name: shape for name, shape in layers.items() if name.startswith("unet.")}
    styles = {f"style{n}": toys.changes(unet, seed=n) for n in range(3)}
    made = {name: toys.diffusers_file(folder / f"{name}.safetensors", of) for name, of in styles.items()}
    return {"sd": tiny, **made}


def style(number: int, weight: float = 1.0) -> dict[str, Any]:
    return {"adapters": [{"hash": f"style{number}", "weight": weight}]}


def test_swaps_and_slots_after_the_switch_compile_nothing(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the engine: eager while the compiler works, then compiled; then other adapters, merged and in slots."""
    monkeypatch.setattr(compiling, "WORTH_CALLS", 1)
    plain, engine = (Engine(farm_settings(), files.__getitem__) for _ in range(2))
    backend = Backend()
    engine.compiler = Compiler(engine._device, backend)

    def same(recipes: list[Recipe]) -> None:
        found, expected = (one.render(one.stage(recipes), recipes, go_on) for one in (engine, plain))
        for mine, theirs in zip(found, expected, strict=True):
            assert mine is not None
            assert theirs is not None
            assert np.abs(mine.astype(int) - theirs).max() <= 1

    def ways(way: str) -> None:
        for one in (engine, plain):
            monkeypatch.setattr(one.costs, "choose", lambda _lane, _groups: way)

    two = [recipe(n) for n in range(2)]
    backend.go_on.clear()
    same(two)
    assert engine.compiler.told() | {"seconds": 0} == {"ready": 0, "graphs": 0, "waiting": 2, "failed": 0, "seconds": 0}
    same(two)
    assert backend.calls == 0, "eager serves, and waits for nothing"
    backend.go_on.set()
    assert engine.compiler.settled(SECONDS)
    same(two)
    told = engine.cache()["compiled"]
    assert (told["ready"], told["waiting"], told["failed"]) == (2, 0, 0), "UNet and VAE"
    traced, calls = {name: dict(found) for name, found in counters.items()}, backend.calls
    for number in (0, 1, 0, 2):
        same([recipe(n, **style(number, 0.5 + number)) for n in range(2)])
    same(two)
    assert backend.calls == calls + 5 * 5, "four steps and a decode each"
    assert {name: dict(found) for name, found in counters.items()} == traced, "torch.compile was not even asked"

    ways("slots")
    mixed = [recipe(0, **style(0)), recipe(1, **style(1, -0.5))]
    same(mixed)
    assert engine.compiler.settled(SECONDS)
    same(mixed)
    assert (backend.graphs, engine.compiler.told()["ready"]) == (3, 3), "a UNet with slots"
    traced, calls = {name: dict(found) for name, found in counters.items()}, backend.calls
    same([recipe(2, **style(2, 1.5)), recipe(3, **style(1))])
    same([recipe(0, **style(1)), recipe(1)])
    assert backend.calls == calls + 2 * 5
    assert {name: dict(found) for name, found in counters.items()} == traced
    # Nothing new is wanted from here on.
    monkeypatch.setattr(compiling, "WORTH_CALLS", 1000)
    ways("merged")
    same(mixed)
    # A process that ends by leaving its threads behind, as tests do, must not leave one in the middle of tracing.
    engine.compiler.close()
    assert engine.compiler.settled(SECONDS)


def test_only_what_is_asked_for_again_is_compiled(pipeline: Pipeline) -> None:
    backend = Backend()
    compiler = Compiler(HERE, backend)
    ask(compiler, pipeline, torch.ones(2, 4), WORTH_CALLS - 1)
    assert compiler.told()["waiting"] == 0
    compiled(compiler, pipeline, torch.ones(2, 4))
    for other in (torch.ones(3, 4), torch.ones(1, 2, 4)):
        ask(compiler, pipeline, other)
    ask(compiler, pipeline, torch.ones(2, 4), twice=True)
    assert (backend.graphs, len(pipeline.programs)) == (1, 1), "other shapes and flags are other kinds"
    before = backend.calls
    ask(compiler, pipeline, torch.arange(8.0).view(4, 2).t())
    assert backend.calls == before + 1, "other strides are copied to the graph's"
    compiled(compiler, pipeline, torch.ones(2, 4), twice=True)
    assert len(pipeline.programs) == 2


def test_what_torch_offers_without_a_compiler_serves_too(pipeline: Pipeline) -> None:
    from torch._dynamo import lookup_backend

    compiler = Compiler(HERE, lookup_backend("aot_eager"))
    compiled(compiler, pipeline, torch.randn(2, 4))
    assert compiler.told()["ready"] == 1
    with torch.no_grad():
        for weight in pipeline.unet.parameters():
            weight.copy_(torch.randn_like(weight))
    ask(compiler, pipeline, torch.randn(2, 4), 2)


def test_no_model_is_read_while_one_is_traced(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading patches what is everybody's in torch; the backend, which takes minutes, holds nobody up."""
    happened: list[str] = []

    class Reading:
        def __enter__(self) -> None:
            happened.append("held")

        def __exit__(self, *_: object) -> None:
            happened.append("free")

    def make(graph: torch.fx.GraphModule, _examples: Any) -> Callable[..., Any]:
        happened.append("backend")
        return graph.forward

    monkeypatch.setattr(programs, "LOADING", Reading())
    compiler = Compiler(HERE, Backend(make))
    compiled(compiler, pipeline, torch.ones(2, 4))
    assert happened == ["held", "free", "backend"]

    def untraceable(_x: Tensor) -> Any:
        raise ValueError("nothing to be had from this")

    with pytest.raises(Exception, match="nothing to be had"):
        programs.compiled(untraceable, programs.flat((torch.ones(1),), {})[0], Backend(make))
    assert happened[3:] == ["held", "free"]


def test_a_backend_that_fails_fails_no_call(pipeline: Pipeline) -> None:
    def broken(_graph: Any, _examples: Any) -> Any:
        raise RuntimeError("no compiler is here")

    backend = Backend(broken)
    compiler = Compiler(HERE, backend)
    with capture_logs() as logs:
        for rows in range(1, MOST_FAILURES + 2):
            for _ in range(TRIES + 1):
                compiled(compiler, pipeline, torch.ones(rows, 4))
    told = [one["event"] for one in logs if one["log_level"] == "warning"]
    assert told == ["not compiled: served as it is"] * MOST_FAILURES + ["nothing is compiled any more"]
    assert len(logs) == TRIES * MOST_FAILURES + 1
    assert all("no compiler is here" in one["error"] for one in logs[:-1])
    assert (compiler.told()["failed"], compiler.told()["ready"]) == (MOST_FAILURES, 0)


@pytest.mark.parametrize("wrong", ["another answer", "an error"])
def test_a_program_that_answers_wrongly_never_serves(pipeline: Pipeline, wrong: str) -> None:
    def make(graph: torch.fx.GraphModule, _examples: Any) -> Callable[..., Any]:
        calls = iter(range(100))

        def run(*flat: Any) -> Any:
            # The first call is the compiler's own.
            if wrong == "an error" and next(calls):
                raise AssertionError("expected size 4, stride 1")
            return [one * 1.01 for one in graph.forward(*flat)]

        return run

    compiler = Compiler(HERE, Backend(make))
    x = torch.randn(2, 4)
    with capture_logs() as logs:
        for _ in range(TRIES + 1):
            compiled(compiler, pipeline, x)
    assert [one["event"] for one in logs] == [
        "compiled", "not compiled: will be tried once more", "compiled", "not compiled: served as it is",
    ]  # fmt: skip
    assert ("0.01 of the greatest" if wrong == "another answer" else "stride 1") in logs[-1]["error"]
    assert not pipeline.programs


def test_a_program_that_fails_later_is_given_up(pipeline: Pipeline) -> None:
    broken = Event()

    def make(graph: torch.fx.GraphModule, _examples: Any) -> Callable[..., Any]:
        def run(*flat: Any) -> Any:
            if broken.is_set():
                raise RuntimeError("illegal launch")
            return graph.forward(*flat)

        return run

    compiler = Compiler(HERE, Backend(make))
    x = torch.randn(2, 4)
    compiled(compiler, pipeline, x)
    ask(compiler, pipeline, x)
    broken.set()
    ask(compiler, pipeline, x, 2)
    assert compiler.told() | {"seconds": 0} == {"ready": 0, "graphs": 0, "waiting": 0, "failed": 0, "seconds": 0}
    compiled(compiler, pipeline, x)
    compiled(compiler, pipeline, x)
    assert (compiler.told()["ready"], compiler.told()["failed"], len(pipeline.programs)) == (0, 1, 0)


def test_memory_that_runs_out_is_left_to_the_engine(pipeline: Pipeline) -> None:
    def make(graph: torch.fx.GraphModule, _examples: Any) -> Callable[..., Any]:
        calls = iter(range(100))

        def run(*flat: Any) -> Any:
            if next(calls) > 1:
                raise torch.OutOfMemoryError("no room")
            return graph.forward(*flat)

        return run

    compiler = Compiler(HERE, Backend(make))
    compiled(compiler, pipeline, torch.ones(2, 4))
    with pytest.raises(torch.OutOfMemoryError):
        compiler.ask(pipeline, pipeline.unet, "__call__", torch.ones(2, 4))
    assert len(pipeline.programs) == 1, "with fewer rows it is another kind, and this one is as good as before"


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
    pipeline.park()
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


def test_the_setting_decides() -> None:
    cuda = Device(torch.device("cuda:0"), torch.float16, 1)
    backends = {(how, one.place.type): compiler_for(how, one) for how in ("auto", "on", "off") for one in (HERE, cuda)}
    compiles = {key for key, one in backends.items() if one._backend is inductor}
    assert compiles == {("auto", "cuda"), ("on", "cpu"), ("on", "cuda")}
    assert {key for key, one in backends.items() if one._graphs} == {("auto", "cuda"), ("on", "cuda")}
    assert all(one._backend is None for key, one in backends.items() if key not in compiles)


def test_a_process_ends_while_something_compiles() -> None:
    program = """
import sys
from threading import Event
import torch
from workers.pipelines import compiling
from workers.pipelines.device import Device

class Pipeline:
    pass

begun = Event()
compiling.compiled = lambda *_: (begun.set(), Event().wait())
compiler = compiling.Compiler(Device(torch.device("cpu"), torch.float32, 1), lambda *_: None)
pipeline = Pipeline()
pipeline.unet, pipeline.programs, layer = None, {}, torch.nn.Flatten()
for _ in range(compiling.WORTH_CALLS):
    compiler.ask(pipeline, layer, "__call__", torch.ones(1, 1))
assert begun.wait(60)
compiler.close()
print("left")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "left\n"), done.stderr


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
