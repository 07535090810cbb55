"""The default model as it is shipped: trained weights, real files, its own LCM-LoRA."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline

import farm
from benchmarks.analyser import read_wall
from farm.recipe import Recipe
from farm.safefile import read_header
from workers.pipelines.engine import Engine

from .conftest import farm_settings, go_on

MODEL = Path(farm.__file__).parent / "assets" / "crack-tiny"
PROFILE = json.loads((MODEL / "profile.json").read_text())
LORA = MODEL / PROFILE["lcm_lora"]
NIGHT = MODEL / "style-night.safetensors"
SENTENCES = (
    "A single split crack on a concrete wall",
    "Sunlight shining on an outdoor concrete wall with split cracks",
    "Vertically split cracks on an old yellow painted concrete wall",
    "Water draining down next to a cracked concrete wall",
)


def recipe(number: int, **changes: object) -> Recipe:
    body = {
        "prompt": SENTENCES[number],
        "seed": number,
        "width": PROFILE["width"],
        "height": PROFILE["height"],
        "steps": PROFILE["steps"],
        "guidance_scale": PROFILE["guidance_scale"],
        "scheduler": "lcm",
        "checkpoint": "crack-tiny",
        "acceleration": {"hash": "lcm", "weight": 1.0},
    }
    return Recipe.model_validate({**body, **changes})


@pytest.fixture
def engine() -> Engine:
    return Engine(farm_settings(), {"crack-tiny": MODEL, "lcm": LORA, "night": NIGHT}.__getitem__)


def render(engine: Engine, recipes: list[Recipe]) -> list[np.ndarray]:
    return [picture for picture in engine.render(engine.stage(recipes), recipes, go_on) if picture is not None]


def test_four_sentences_as_stock_diffusers_renders_them(engine: Engine) -> None:
    recipes = [recipe(number) for number in range(4)]
    ours = render(engine, recipes)
    stock = StableDiffusionPipeline.from_pretrained(MODEL, safety_checker=None, local_files_only=True)
    stock.scheduler = LCMScheduler.from_config(stock.scheduler.config)
    stock.set_progress_bar_config(disable=True)
    stock.load_lora_weights(str(LORA), local_files_only=True)
    theirs = stock(
        list(SENTENCES),
        num_inference_steps=PROFILE["steps"],
        guidance_scale=PROFILE["guidance_scale"],
        generator=[torch.Generator().manual_seed(one.seed) for one in recipes],
        output_type="pil",
    ).images
    for mine, other in zip(ours, theirs, strict=True):
        assert np.abs(mine.astype(int) - np.asarray(other)).max() <= 1
        assert mine.std() > 5, "a picture, not a flat colour"
    alone = render(engine, [recipes[2]])[0]
    assert np.abs(alone.astype(int) - ours[2]).max() <= 1


@pytest.mark.parametrize("wall", ["grey concrete", "yellow", "white", "red brick", "blue"])
def test_a_wall_has_the_colour_that_was_asked_for(engine: Engine, wall: str) -> None:
    """The weights are trained. The analyser knows pixels, not the model."""
    recipes = [recipe(0, prompt=f"a wide crack in a {wall} wall", seed=seed) for seed in range(8)]
    seen = [read_wall(picture) for picture in render(engine, recipes)]
    assert seen.count(wall.rsplit(maxsplit=1)[-1]) >= 7, seen


def test_night_falls_by_weight_beside_the_lcm_lora(engine: Engine) -> None:
    def brightness(weight: float) -> float:
        night = [{"hash": "night", "weight": weight}] if weight else []
        recipes = [recipe(0, seed=seed, adapters=night) for seed in range(8)]
        return float(np.mean(render(engine, recipes)))

    day, dusk, night = (brightness(weight) for weight in (0.0, 0.5, 1.0))
    assert day > dusk > night
    assert night < 0.8 * day


def test_the_plain_teacher_renders_too(engine: Engine) -> None:
    teacher = {"acceleration": None, "scheduler": "ddim", "guidance_scale": PROFILE["teacher_guidance_scale"]}
    (picture,) = render(engine, [recipe(2, steps=10, **teacher)])
    assert picture.std() > 5


def test_the_lora_is_in_kohya_spelling() -> None:
    keys = read_header(LORA).tensors
    assert all(key.startswith("lora_unet_") for key in keys)
    assert any(key.endswith(".lora_down.weight") for key in keys)
