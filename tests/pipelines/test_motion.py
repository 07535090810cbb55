"""Animations against diffusers' own pipeline, what they share with still pictures, and which motion adapters are
refused."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AnimateDiffPipeline, MotionAdapter, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from farm.errors import InvalidModel
from farm.recipe import Recipe
from farm.views import CheckpointView
from workers.pipelines.engine import Engine
from workers.pipelines.inspecting import inspect

from . import toys
from .conftest import Fetch, farm_settings, go_on, recipe
from .test_against_diffusers import scheduler_of

FRAMES = 3
Places = dict[str, Path]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, sd_folder: Path, adapter_files: Places) -> Places:
    folder = tmp_path_factory.mktemp("motions")
    return {
        "sd": sd_folder,
        "wind": toys.motion(folder / "wind"),
        "rain": toys.motion(folder / "rain", seed=9, use_motion_mid_block=False),
        **adapter_files,
    }


@pytest.fixture
def moving(places: Places) -> Engine:
    fetch: Fetch = places.__getitem__
    return Engine(farm_settings(micro_batch=2 * FRAMES), fetch)


def animated(number: int = 0, **changes: Any) -> Recipe:
    wanted = {"motion": "wind", "frames": FRAMES, "fps": 8, "steps": 2, "acceleration": {"hash": "fast", "weight": 1.0}}
    return recipe(number, **{**wanted, **changes})


def drawn(engine: Engine, recipes: Sequence[Recipe]) -> list[np.ndarray]:
    return [one for one in engine.render(engine.stage(recipes), recipes, go_on) if one is not None]


def by_diffusers(places: Places, wanted: Recipe) -> np.ndarray:
    still = StableDiffusionPipeline.from_pretrained(places["sd"], safety_checker=None, local_files_only=True)
    pipe = AnimateDiffPipeline(
        vae=still.vae,
        text_encoder=still.text_encoder,
        tokenizer=still.tokenizer,
        unet=still.unet,
        motion_adapter=MotionAdapter.from_pretrained(places[str(wanted.motion)], local_files_only=True),
        scheduler=scheduler_of(wanted.scheduler, {**still.scheduler.config, "beta_schedule": "linear"}),
    )
    pipe.set_progress_bar_config(disable=True)
    uses = [use for use in (wanted.acceleration, *wanted.adapters) if use]
    for use in uses:
        pipe.load_lora_weights(str(places[use.hash]), adapter_name=use.hash)
    if uses:
        pipe.set_adapters([use.hash for use in uses], [use.weight for use in uses])
    with torch.inference_mode():
        made = pipe(
            prompt=wanted.prompt,
            negative_prompt=wanted.negative_prompt,
            num_frames=FRAMES,
            num_inference_steps=wanted.steps,
            guidance_scale=wanted.guidance_scale,
            width=wanted.width,
            height=wanted.height,
            generator=[torch.Generator("cpu").manual_seed(wanted.seed)],
            output_type="np",
        ).frames[0]
    return np.asarray((np.asarray(made) * 255).round(), np.uint8)


STYLED = {"adapters": [{"hash": "style", "weight": 0.7}]}
UNTOLD = {"acceleration": None, "guidance_scale": 3.0, "negative_prompt": "moss"}


@pytest.mark.parametrize(
    "changes",
    [STYLED, {"motion": "rain"}, {**UNTOLD, "scheduler": "ddim"}, {**UNTOLD, "scheduler": "euler-a"}],
    ids=["lcm and style", "no middle", "ddim", "euler-a"],
)
def test_animations_are_those_of_diffusers(moving: Engine, places: Places, changes: dict[str, Any]) -> None:
    wanted = animated(**changes)
    (mine,) = drawn(moving, [wanted])
    theirs = by_diffusers(places, wanted)
    assert mine.shape == theirs.shape == (FRAMES, 64, 64, 3)
    assert np.abs(mine.astype(int) - theirs).max() <= 1
    assert np.abs(mine[0].astype(int) - mine[-1]).max() > 1, "it moves"


def test_neighbours_stills_and_swaps_leave_no_trace(moving: Engine) -> None:
    first, second, still = animated(0), animated(1, **STYLED), recipe(2, acceleration={"hash": "fast", "weight": 1.0})
    (alone,), (before,) = drawn(moving, [first]), drawn(moving, [still])
    together = drawn(moving, [first, second])
    assert np.abs(alone.astype(int) - together[0]).max() <= 1
    assert np.abs(together[0].astype(int) - together[1]).max() > 1
    drawn(moving, [animated(0, motion="rain")])
    assert np.array_equal(drawn(moving, [first])[0], alone)
    assert np.array_equal(drawn(moving, [still])[0], before)
    (warm,) = moving.warm()
    assert {one["hash"] for one in warm["motions"]} == {"wind", "rain"}
    assert warm["controlnets"] == []


def test_a_motion_adapter_costs_its_own_bytes_alone(moving: Engine, places: Places) -> None:
    drawn(moving, [recipe(0)])
    without = moving.warm()[0]["bytes"]
    drawn(moving, [animated(0, acceleration=None)])
    own = sum(tensor.nbytes for tensor in load_file(places["wind"] / "diffusion_pytorch_model.safetensors").values())
    assert moving.warm()[0]["bytes"] - without == own


def test_more_frames_than_fit_at_once_are_drawn_one_animation_after_the_other(places: Places) -> None:
    engine = Engine(farm_settings(micro_batch=FRAMES), places.__getitem__)
    steps: list[tuple[int, int]] = []
    wanted = [animated(0), animated(1)]

    def count(done: int, of: int) -> tuple[int, ...]:
        steps.append((done, of))
        return ()

    assert all(one is not None for one in engine.render(engine.stage(wanted), wanted, count))
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]


def checkpoint(places: Places, family: str = "toy") -> CheckpointView:
    return CheckpointView(
        name="sd", hash="sd", family=family, state="available", bytes=1, profile={}, created_at="2030-01-01T00:00:00Z"
    )


def spoil(folder: Path, **entries: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def without_a_weight(folder: Path) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(key for key in tensors if "to_q" in key))
    save_file(tensors, file)


WRONG: list[tuple[Callable[[Path], None], str]] = [
    (lambda folder: spoil(folder, conv_in_channels=9), "made to animate a given picture"),
    (lambda folder: spoil(folder, motion_max_seq_length=1), "a number of frames from 2 is needed"),
    (lambda folder: spoil(folder, block_out_channels=[16, 64]), "the configuration asks for"),
    (without_a_weight, "this weight is missing"),
    (lambda folder: (folder / "diffusion_pytorch_model.safetensors").unlink(), r"no \.safetensors file"),
]


def test_what_cannot_move_is_refused_with_the_reason(places: Places, tmp_path: Path) -> None:
    def look(folder: Path, **wanted: Any) -> Any:
        return inspect(folder, "motion", wanted, tmp_path / "scratch", [checkpoint(places)], places.__getitem__)

    found = look(places["wind"], profile={"acceleration": "fast"})
    assert (found.family, found.profile) == ("toy", {"max_frames": 8, "acceleration": "fast"})
    for number, (wrong, said) in enumerate(WRONG):
        folder = toys.motion(tmp_path / str(number))
        wrong(folder)
        with pytest.raises(InvalidModel, match=said):
            look(folder)
    with pytest.raises(InvalidModel, match=r"block_out_channels is \[16, 32\], the UNet's block_out_channels"):
        look(places["wind"], family="sd15")
    with pytest.raises(InvalidModel, match="told sizes"):
        look(places["wind"], family="sdxl")
    with pytest.raises(InvalidModel, match="this is a motion adapter; register it as one"):
        inspect(places["wind"], "style", {}, tmp_path, [], places.__getitem__)
