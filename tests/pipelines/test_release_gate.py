"""The gate of every release: the same recipe gives the same picture, whatever else was rendered, with it or before it.

In float32 on a CPU: at most one level of 255 apart, and not a bit where the micro-batch has the same size and one
adapter set. In half precision within what docs/engine.md states.
"""

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from farm.recipe import Recipe
from tests.workers.conftest import ROOT
from workers.pipelines import structure
from workers.pipelines.engine import Engine

from . import toys
from .conftest import Fetch, farm_settings, go_on, recipe

LEVELS = 1
HALF_LEVELS, HALF_MEAN = 24, 1.0
"""The stated tolerance of float16 and bfloat16 on a CPU: at most, and on average over a picture."""
COUNT = 8


def render(engine: Engine, recipes: Sequence[Recipe]) -> list[np.ndarray]:
    return [one for one in engine.render(engine.stage(recipes), recipes, go_on) if one is not None]


def apart(some: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> int:
    return max(int(np.abs(a.astype(int) - b).max()) for a, b in zip(some, others, strict=True))


def wanted(model: str, style: str = "style", number: int = 0, **changes: Any) -> Recipe:
    """A recipe of the one lane of this model, guided, with acceleration and style."""
    mark = "xl-" if model == "sdxl" else ""
    return recipe(
        number,
        **{
            "checkpoint": model,
            "steps": 2,
            "guidance_scale": 1.5,
            "negative_prompt": "moss",
            "acceleration": {"hash": f"{mark}fast", "weight": 1.0},
            "adapters": [{"hash": f"{mark}{style}", "weight": 0.8 if style == "style" else -0.6}],
            **changes,
        },
    )


@pytest.mark.parametrize("model", ["sd", "sdxl"])
def test_the_same_recipe_gives_the_same_picture(fetch: Fetch, model: str) -> None:
    recipes = [wanted(model, number=number) for number in range(COUNT)]
    others = [wanted(model, "words", number=100 + number) for number in range(COUNT)]
    engine = Engine(farm_settings(micro_batch=2 * COUNT), fetch)
    alone = [render(engine, [one])[0] for one in recipes]
    assert apart(alone[:1], alone[1:2]) > 20, "different recipes, different pictures"
    bare = render(engine, [wanted(model, adapters=[])])
    assert apart(alone[:1], bare) > LEVELS, "the style is seen"
    together: dict[int, list[np.ndarray]] = {}
    for size in (2, 3, COUNT):
        parts = [recipes[start : start + size] for start in range(0, COUNT, size)]
        together[size] = [picture for part in parts for picture in render(engine, part)]
        assert apart(alone, together[size]) <= LEVELS, f"in micro-batches of {size}"
    assert apart(alone, render(engine, recipes[::-1])[::-1]) <= LEVELS, "in another order"
    mixed = render(engine, [one for pair in zip(recipes, others, strict=True) for one in pair])
    assert engine.warm()[-1]["slots"], "slots were used"
    assert apart(alone, mixed[::2]) <= LEVELS, "with other adapters beside it"
    assert apart([render(engine, [one])[0] for one in others], mixed[1::2]) <= LEVELS
    for swap in range(20):
        style, weight = ("style", "words")[swap % 2], 0.15 * swap - 1
        mark = "xl-" if model == "sdxl" else ""
        render(engine, [wanted(model, steps=1, adapters=[{"hash": f"{mark}{style}", "weight": weight}])])
    assert apart(alone, [render(engine, [one])[0] for one in recipes]) == 0, "after 20 swaps, bit for bit"
    assert apart(together[3][:3], render(engine, recipes[:3])) == 0


def test_the_pruned_unet_gives_the_same_picture(tmp_path: Path) -> None:
    """SSD-1B's: three pictures alone, together, in another order, beside other adapters (in slots), and after swaps."""
    folder = toys.ssd1b(tmp_path)
    layers = {name.removesuffix(".weight"): shape for name, shape in structure.folder_shapes(folder).items()}
    attention = {name: shape for name, shape in layers.items() if name.startswith("unet.") and ".attn" in name}
    places = {"ssd-1b": folder}
    for seed, name in enumerate(("fast", "style", "words"), 1):
        places[name] = toys.kohya(tmp_path / f"{name}.safetensors", toys.changes(attention, seed=seed))
    engine = Engine(farm_settings(micro_batch=8), places.__getitem__)
    recipes = [wanted("ssd-1b", number=number) for number in range(3)]
    others = [wanted("ssd-1b", "words", number=100 + number) for number in range(3)]
    alone = [render(engine, [one])[0] for one in recipes]
    assert apart(alone[:1], alone[1:2]) > 20, "different recipes, different pictures"
    assert apart(alone[:1], render(engine, [wanted("ssd-1b", adapters=[])])) > LEVELS, "the style is seen"
    mixed = render(engine, [*recipes, *others])
    assert engine.warm()[-1]["slots"], "slots were used"
    for beside in (render(engine, recipes), render(engine, recipes[::-1])[::-1], mixed[:3]):
        assert apart(alone, beside) <= LEVELS
    for other in others:
        render(engine, [other])
    assert apart(alone, [render(engine, [one])[0] for one in recipes]) == 0, "after swaps, bit for bit"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("model", ["sd", "sdxl"])
def test_the_same_in_half_precision(fetch: Fetch, model: str, dtype: str) -> None:
    """Three pictures with adapters: alone, together, beside other adapters (in slots), and after swaps."""
    recipes = [wanted(model, number=number) for number in range(3)]
    others = [wanted(model, "words", number=100 + number) for number in range(3)]
    engine = Engine(farm_settings(dtype=dtype, micro_batch=8), fetch)
    alone = [render(engine, [one])[0] for one in recipes]
    assert apart(alone, render(engine, [wanted(model, number=number, adapters=[]) for number in range(3)])) > 1
    mixed = render(engine, [*recipes, *others])
    assert engine.warm()[-1]["slots"], "slots were used"
    for beside in (render(engine, recipes), render(engine, recipes[::-1])[::-1], mixed[:3]):
        assert apart(alone, beside) <= HALF_LEVELS
        assert max(np.abs(a.astype(int) - b).mean() for a, b in zip(alone, beside, strict=True)) <= HALF_MEAN
    for other in others:
        render(engine, [other])
    assert apart(alone, [render(engine, [one])[0] for one in recipes]) == 0, "after swaps, bit for bit"


def test_a_fresh_process_gives_the_same_picture_as_a_warm_one(fetch: Fetch, tmp_path: Path) -> None:
    """Bit for bit at the same size of micro-batch: one process for both models, as starting one costs more than all."""
    engine = Engine(farm_settings(), fetch)
    parts = [[wanted(model, number=number) for number in range(3)] for model in ("sd", "sdxl")]
    for part in parts:
        render(engine, [wanted(part[0].checkpoint, "words", number=9)])
    warm = [hashlib.sha256(picture.tobytes()).hexdigest() for part in parts for picture in render(engine, part)]
    assert in_a_fresh_process(fetch, parts, tmp_path) == warm


def in_a_fresh_process(fetch: Fetch, parts: Sequence[Sequence[Recipe]], folder: Path) -> list[str]:
    """sha256 of each picture of these micro-batches as a process renders them that did nothing before."""
    recipes = [one for part in parts for one in part]
    hashes = {one.checkpoint for one in recipes} | {use.hash for one in recipes for use in one.adapters}
    hashes |= {one.acceleration.hash for one in recipes if one.acceleration}
    asked = folder / "asked.json"
    asked.write_text(
        json.dumps(
            {
                "places": {one: str(fetch(one)) for one in hashes},
                "parts": [[one.model_dump(mode="json") for one in part] for part in parts],
            }
        )
    )
    command = [sys.executable, "-m", "tests.pipelines.fresh", str(asked)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    answer: list[str] = json.loads(done.stdout.splitlines()[-1])
    return answer
