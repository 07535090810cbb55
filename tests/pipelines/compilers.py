"""What tests of compiling start from: a network that is traced at once, and backends that need no compiler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from workers.pipelines.compiling import WORTH_CALLS, Compiler
from workers.pipelines.device import Device
from workers.pipelines.load import Pipeline, load

from . import toys

SECONDS = 120.0
"""Far more than any of it takes."""
HERE = Device(torch.device("cpu"), torch.float32, 2**30)


class Backend:
    """Graphs as they are, or what `make` makes of them: counts graphs and calls, and waits to be let go."""

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
