"""The lean loop against diffusers' own pipelines, schedulers and LoRA loaders: at most one level of 255 apart."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
)

from farm.recipe import Recipe
from workers.pipelines.engine import Engine

from .conftest import go_on, recipe

DPMPP = {"algorithm_type": "dpmsolver++", "solver_order": 2}
STOCK: dict[str, tuple[Any, dict[str, Any]]] = {
    "lcm": (LCMScheduler, {}),
    "ddim": (DDIMScheduler, {}),
    "ddpm": (DDPMScheduler, {}),
    "deis": (DEISMultistepScheduler, {}),
    "dpmpp-2m": (DPMSolverMultistepScheduler, DPMPP),
    "dpmpp-2m-karras": (DPMSolverMultistepScheduler, {**DPMPP, "use_karras_sigmas": True}),
    "dpmpp-2m-sde": (DPMSolverMultistepScheduler, {**DPMPP, "algorithm_type": "sde-dpmsolver++"}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler-a": (EulerAncestralDiscreteScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
    "pndm": (PNDMScheduler, {"skip_prk_steps": True}),
    "unipc": (UniPCMultistepScheduler, {}),
}
"""What a person would write with diffusers alone, by the farm's name."""
PLAIN = sorted(STOCK.keys() - {"lcm"})


def scheduler_of(name: str, config: Any) -> Any:
    kind, options = STOCK[name]
    return kind.from_config(config, **options)


@pytest.fixture
def stock(sd_folder: Path) -> Any:
    made = StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None, local_files_only=True)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def stock_xl(sdxl_folder: Path) -> Any:
    made = StableDiffusionXLPipeline.from_pretrained(sdxl_folder, add_watermarker=False, local_files_only=True)
    made.set_progress_bar_config(disable=True)
    return made


def by_diffusers(pipe: Any, recipes: Sequence[Recipe], **options: Any) -> list[np.ndarray]:
    first = recipes[0]
    pipe.scheduler = scheduler_of(first.scheduler, pipe.scheduler.config)
    answer = pipe(
        [one.prompt for one in recipes],
        width=first.width,
        height=first.height,
        num_inference_steps=first.steps,
        guidance_scale=first.guidance_scale,
        generator=[torch.Generator().manual_seed(one.seed) for one in recipes],
        output_type="pil",
        **options,
    )
    return [np.asarray(image) for image in answer.images]


def by_farm(engine: Engine, recipes: Sequence[Recipe]) -> list[np.ndarray]:
    pictures = engine.render(engine.stage(recipes), recipes, go_on)
    assert all(picture is not None and picture.dtype == np.uint8 for picture in pictures)
    return [picture for picture in pictures if picture is not None]


def same(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == other.shape
        assert mine.std() > 1, "a flat picture compares nothing"
        assert np.abs(mine.astype(int) - other).max() <= 1


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_lcm(engine: Engine, stock: Any, steps: int) -> None:
    recipes = [recipe(number, steps=steps) for number in range(3)]
    same(by_farm(engine, recipes), by_diffusers(stock, recipes))


def test_lcm_with_guidance_and_negative_prompts(engine: Engine, stock: Any) -> None:
    negative = ["blurry", "", "red brick"]
    recipes = [recipe(n, guidance_scale=2.0, negative_prompt=text) for n, text in enumerate(negative)]
    same(by_farm(engine, recipes), by_diffusers(stock, recipes, negative_prompt=negative))


@pytest.mark.parametrize("scheduler", PLAIN)
def test_plain_samplers(engine: Engine, stock: Any, scheduler: str) -> None:
    recipes = [recipe(n, scheduler=scheduler, steps=6, guidance_scale=3.0, width=96) for n in range(2)]
    same(by_farm(engine, recipes), by_diffusers(stock, recipes))
    same(by_farm(engine, recipes[:1]), by_diffusers(stock, recipes[:1]))
    heard: list[tuple[int, int]] = []
    engine.render(engine.stage(recipes), recipes, lambda *counted: heard.append(counted) or ())
    assert heard == [(done + 1, len(heard)) for done in range(len(heard))], "as many steps as were told"


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_lcm_of_other_predictions(engine: Engine, stock: Any, prediction: str) -> None:
    recipes = [recipe()]
    staged = engine.stage(recipes)
    staged.entry.loaded.scheduler_config.update(prediction_type=prediction, clip_sample=True, clip_sample_range=1.0)
    stock.scheduler.register_to_config(prediction_type=prediction, clip_sample=True, clip_sample_range=1.0)
    ours = [picture for picture in engine.render(staged, recipes, go_on) if picture is not None]
    same(ours, by_diffusers(stock, recipes))


@pytest.mark.parametrize(("scheduler", "guidance"), [("lcm", 1.0), ("euler", 4.0)])
def test_sdxl(engine: Engine, stock_xl: Any, scheduler: str, guidance: float) -> None:
    recipes = [recipe(n, checkpoint="sdxl", scheduler=scheduler, guidance_scale=guidance, height=96) for n in range(2)]
    same(by_farm(engine, recipes), by_diffusers(stock_xl, recipes))


def test_sdxl_negative_prompts(engine: Engine, stock_xl: Any) -> None:
    recipes = [recipe(n, checkpoint="sdxl", guidance_scale=2.0, negative_prompt="blurry") for n in range(2)]
    same(by_farm(engine, recipes), by_diffusers(stock_xl, recipes, negative_prompt=["blurry"] * 2))


def test_a_prompt_longer_than_the_encoder_reads_is_cut(engine: Engine, stock: Any) -> None:
    recipes = [recipe(prompt="crack " * 40), recipe(1)]
    same(by_farm(engine, recipes), by_diffusers(stock, recipes))


def test_adapters_at_weights(engine: Engine, stock: Any, adapter_files: dict[str, Path]) -> None:
    """Acceleration at 1.0 with a style at 0.7 and one that changes the text encoder at -0.5."""
    recipes = [
        recipe(
            n,
            acceleration={"hash": "fast", "weight": 1.0},
            adapters=[{"hash": "style", "weight": 0.7}, {"hash": "words", "weight": -0.5}],
        )
        for n in range(2)
    ]
    for name in ("fast", "style", "words"):
        stock.load_lora_weights(str(adapter_files[name]), adapter_name=name, local_files_only=True)
    stock.set_adapters(["fast", "style", "words"], [1.0, 0.7, -0.5])
    theirs = by_diffusers(stock, recipes)
    same(by_farm(engine, recipes), theirs)
    bare = by_farm(engine, [recipe(n) for n in range(2)])
    assert np.abs(bare[0].astype(int) - theirs[0]).max() > 20, "the adapters change the picture"
