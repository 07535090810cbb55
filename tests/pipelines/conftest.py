"""Toy checkpoints, one engine to share, and what tests ask of both."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import SecretStr

from farm.recipe import Recipe
from farm.settings import Settings
from workers.pipelines.engine import Engine
from workers.pipelines.load import Pipeline, load

from . import toys

Fetch = Callable[[str], Path]


def farm_settings(**changes: object) -> Settings:
    """Settings of a worker that talks to no server."""
    base = Settings(
        environment="development",
        database_url=SecretStr("postgresql://farm:farm@nowhere/farm"),
        redis_url=SecretStr("redis://:farm@nowhere/0"),
        device="cpu",
    )
    return base.model_copy(update=changes)


@pytest.fixture(scope="session", autouse=True)
def _frozen() -> None:
    """Collecting garbage, which every out-of-memory does, need not look at the libraries' own objects each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.sd(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture
def pipeline(sd_folder: Path) -> Pipeline:
    """The toy SD checkpoint, freshly loaded."""
    return load(sd_folder, "sd", torch.float32, torch.float32)


@pytest.fixture(scope="session")
def sd_shapes(sd_folder: Path) -> dict[str, tuple[int, ...]]:
    return load(sd_folder, "sd", torch.float32, torch.float32).merger.shapes


@pytest.fixture(scope="session")
def sdxl_shapes(sdxl_folder: Path) -> dict[str, tuple[int, ...]]:
    return load(sdxl_folder, "sdxl", torch.float32, torch.float32).merger.shapes


@pytest.fixture(scope="session")
def adapter_files(
    tmp_path_factory: pytest.TempPathFactory,
    sd_shapes: dict[str, tuple[int, ...]],
    sdxl_shapes: dict[str, tuple[int, ...]],
) -> dict[str, Path]:
    """By hash: an acceleration adapter over most of the UNet, two styles, one of them in the text encoder too; with
    `xl-` in front the same for SDXL."""
    folder = tmp_path_factory.mktemp("adapters")
    layers = {name.removesuffix(".weight"): shape for name, shape in sd_shapes.items()}
    whole = {name: shape for name, shape in layers.items() if name.startswith("unet.") and "conv_" not in name}
    attention = {name: shape for name, shape in whole.items() if ".attn1." in name}
    text = {name: shape for name, shape in layers.items() if name.startswith("text_encoder.") and "self_attn" in name}
    wide = {name.removesuffix(".weight"): shape for name, shape in sdxl_shapes.items()}
    wide_unet = {name: shape for name, shape in wide.items() if name.startswith("unet.") and "conv_" not in name}
    wide_style = {name: shape for name, shape in wide_unet.items() if ".attn" in name}
    wide_text = {name: shape for name, shape in wide.items() if name.startswith("text_encoder") and "self_attn" in name}
    return {
        "xl-fast": toys.kohya(folder / "xl-fast.safetensors", toys.changes(wide_unet, seed=4, strength=0.15)),
        "xl-style": toys.diffusers_file(folder / "xl-style.safetensors", toys.changes(wide_style, seed=5)),
        "xl-words": toys.kohya(
            folder / "xl-words.safetensors", toys.changes({**wide_style, **wide_text}, seed=6), toys.KOHYA_XL
        ),
        "fast": toys.kohya(folder / "fast.safetensors", toys.changes(whole, seed=1, strength=0.15)),
        "style": toys.diffusers_file(folder / "style.safetensors", toys.changes(attention, seed=2)),
        "words": toys.kohya(folder / "words.safetensors", toys.changes({**attention, **text}, seed=3)),
    }


@pytest.fixture(scope="session")
def fetch(sd_folder: Path, sdxl_folder: Path, adapter_files: dict[str, Path]) -> Fetch:
    places = {"sd": sd_folder, "sdxl": sdxl_folder, **adapter_files}
    return places.__getitem__


@pytest.fixture
def engine(fetch: Fetch) -> Engine:
    return Engine(farm_settings(), fetch)


def recipe(number: int = 0, **changes: object) -> Recipe:
    """Recipe `number` of a small LCM lane, with its own prompt and seed."""
    body = {
        "prompt": f"crack {number} on a wall",
        "seed": 1000 + number,
        "width": 64,
        "height": 64,
        "steps": 4,
        "guidance_scale": 1.0,
        "scheduler": "lcm",
        "checkpoint": "sd",
    }
    return Recipe.model_validate({**body, **changes})


def go_on(_step: int, _steps: int) -> tuple[int, ...]:
    """An `on_step` that drops nothing."""
    return ()


def with_room_for(unet: Any, rows: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make the UNet run out of memory above this many rows; answers the sizes it was asked for."""
    asked: list[int] = []
    forward = unet.forward

    def limited(latents: torch.Tensor, *args: Any, **options: Any) -> Any:
        asked.append(len(latents))
        if len(latents) > rows:
            raise torch.OutOfMemoryError("no room")
        return forward(latents, *args, **options)

    monkeypatch.setattr(unet, "forward", limited)
    return asked
