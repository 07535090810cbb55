"""Toy checkpoints and pictures for the trainers of adapters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

from tests.pipelines import toys
from workers.training import loop

FEW = {"target": ("to_q", "conv1"), "rank": 2, "batch": 2, "size": "32", "cpu": True}
Folders = dict[str, Path]


def hush(_: str) -> None:
    """Say nothing."""


def weights(path: Path) -> dict[str, torch.Tensor]:
    adapter: dict[str, torch.Tensor] = loop.load(path / "checkpoint.pt")["adapter"]
    return adapter


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return {"sd": toys.sd(tmp_path_factory.mktemp("sd")), "sdxl": toys.sdxl(tmp_path_factory.mktemp("sdxl"))}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(5):
        shape = (20 + 4 * number, 24, 3)
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"wall {number}")
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Equal sums every time, and accelerate's process-wide state gone afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
