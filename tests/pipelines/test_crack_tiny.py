"""The default model as it is shipped: trained weights, real files, its own LCM-LoRA."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline

import farm
from benchmarks.analyser import read
from benchmarks.control import net_key
from benchmarks.stock import PARTS, model_key
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
WALLS = ("grey concrete", "yellow", "white", "red brick", "blue")


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


def test_walls_and_cracks_are_those_that_were_asked_for(engine: Engine) -> None:
    """The weights are trained. The analyser knows pixels, not the model."""
    asked, found = [], []
    for first, wall in enumerate(WALLS):
        directions = ("vertical", "horizontal", "diagonal", "none") * 2
        prompts = [
            f"an undamaged {wall} wall" if way == "none" else f"a wide {way} crack in a {wall} wall"
            for way in directions
        ]
        recipes = [recipe(0, prompt=prompt, seed=8 * first + number) for number, prompt in enumerate(prompts)]
        seen = [read(picture) for picture in render(engine, recipes)]
        assert [one.wall for one in seen].count(wall.rsplit(maxsplit=1)[-1]) >= 7, (wall, seen)
        asked += directions
        found += [one.direction for one in seen]
    pairs = list(zip(asked, found, strict=True))
    assert sum((one == "none") == (other == "none") for one, other in pairs) >= 36, pairs
    assert sum(one == other for one, other in pairs) >= 34, pairs


@pytest.mark.parametrize(("width", "first"), [("thin", 100), ("wide", 101)])
def test_diagonals_lean_both_ways(engine: Engine, width: str, first: int) -> None:
    """Captions leave it open which, of thin cracks and of wide ones."""
    recipes = [
        recipe(0, prompt=f"a {width} diagonal crack in a {wall} wall", seed=first + 2 * number)
        for number, wall in enumerate(WALLS * 6)
    ]
    seen = [read(picture) for picture in render(engine, recipes)]
    rising = [one.rising for one in seen if one.direction == "diagonal"]
    assert len(rising) >= 25
    assert 0.2 <= np.mean(rising) <= 0.8, np.mean(rising)


def test_night_falls_on_every_wall_by_weight_beside_the_lcm_lora(engine: Engine) -> None:
    def brightness(weight: float) -> np.ndarray:
        night = [{"hash": "night", "weight": weight}] if weight else []
        prompts = [f"a single crack on a {wall} wall" for wall in WALLS]
        recipes = [recipe(0, prompt=prompt, seed=seed, adapters=night) for seed, prompt in enumerate(prompts)]
        return np.array([picture.mean() for picture in render(engine, recipes)])

    day, dusk, night = (brightness(weight) for weight in (0.0, 0.5, 1.0))
    assert day.mean() > dusk.mean() > night.mean()
    assert (night < 0.9 * day).all(), dict(zip(WALLS, night / day, strict=True))
    assert (night / day).mean() < 0.7


def test_the_plain_teacher_renders_too(engine: Engine) -> None:
    teacher = {"acceleration": None, "scheduler": "ddim", "guidance_scale": PROFILE["teacher_guidance_scale"]}
    (picture,) = render(engine, [recipe(2, steps=10, **teacher)])
    assert picture.std() > 5


def test_the_lora_is_in_kohya_spelling() -> None:
    keys = read_header(LORA).tensors
    assert all(key.startswith("lora_unet_") for key in keys)
    assert any(key.endswith(".lora_down.weight") for key in keys)


def test_the_files_are_as_small_and_as_whole_as_the_card_says() -> None:
    rank = {
        key: tensor.shape[0] for key, tensor in read_header(LORA).tensors.items() if key.endswith("lora_down.weight")
    }
    assert 1 <= max(rank.values()) <= 32
    parts = [path for part in PARTS for path in (MODEL / part).iterdir()] + [MODEL / "model_index.json", LORA]
    assert sum(path.stat().st_size for path in parts) <= 40_000_000
    assert NIGHT.stat().st_size <= 5_000_000
    files = {str(path.relative_to(MODEL)): path for path in MODEL.rglob("*.safetensors")}
    types = {name: {tensor.dtype for tensor in read_header(path).tensors.values()} for name, path in files.items()}
    assert types == {name: {"F16"} for name in files}
    card = (MODEL / "README.md").read_text()
    assert dict(re.findall(r"(?m)^\| (\S+\.safetensors) \|.*, (\d+\.\d) MB \|$", card)) == {
        name: f"{path.stat().st_size / 1e6:.1f}" for name, path in files.items()
    }
    measured = re.findall(r"\b(model|ControlNet) ([0-9a-f]{16})\b", card)
    assert set(measured) == {("model", model_key(MODEL)), ("ControlNet", net_key(MODEL / "control-mask"))}
