"""Networks compiled beside the serving thread: what serves when, what a swap costs, and that nothing of it fails a job.

The backends are torch's that need no compiler, or our own: what a compiler makes of a graph is torch's matter.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor
from torch._dynamo.utils import counters

from farm.recipe import Recipe
from workers.pipelines import compiling, programs
from workers.pipelines.compiling import MOST_FAILURES, TRIES, WORTH_CALLS, Compiler, compiler_for, inductor
from workers.pipelines.device import Device
from workers.pipelines.engine import Engine
from workers.pipelines.load import Pipeline, load

from . import toys
from .compilers import HERE, SECONDS, Backend, ask, compiled, pipeline, tiny
from .conftest import farm_settings, go_on, recipe

__all__ = ["pipeline", "tiny"]


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
    """Through the engine: eager while the compiler works, then compiled; then other adapters, merged and in slots.
    Three images are computed as four, and four by the same programs."""
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

    three = [recipe(n) for n in range(3)]
    backend.go_on.clear()
    same(three)
    assert engine.compiler.told() | {"seconds": 0} == {"ready": 0, "graphs": 0, "waiting": 2, "failed": 0, "seconds": 0}
    same(three)
    assert backend.calls == 0, "eager serves, and waits for nothing"
    backend.go_on.set()
    assert engine.compiler.settled(SECONDS)
    same(three)
    told = engine.cache()["compiled"]
    assert (told["ready"], told["waiting"], told["failed"]) == (2, 0, 0), "UNet and VAE"
    traced, calls = {name: dict(found) for name, found in counters.items()}, backend.calls
    for number in (0, 1, 0, 2):
        same([recipe(n, **style(number, 0.5 + number)) for n in range(3 + number // 2)])
    same(three)
    assert backend.calls == calls + 5 * 5, "four steps and a decode each"
    assert {name: dict(found) for name, found in counters.items()} == traced, "torch.compile was not even asked"

    ways("slots")
    mixed = [recipe(0, **style(0)), recipe(1, **style(1, -0.5)), recipe(2)]
    same(mixed)
    assert engine.compiler.settled(SECONDS)
    same(mixed)
    assert (backend.graphs, engine.compiler.told()["ready"]) == (3, 3), "a UNet with slots"
    traced, calls = {name: dict(found) for name, found in counters.items()}, backend.calls
    same([recipe(2, **style(2, 1.5)), recipe(3, **style(1)), recipe(4, **style(0, 0.3)), recipe(5)])
    same([recipe(0, **style(1)), recipe(1), recipe(3, **style(2))])
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
