"""The gate of every release: the same recipe gives the same picture, whatever else was rendered, with it or before it.

How far apart pictures may be is what docs/engine.md promises for the class of device and the number type; not a bit
where the micro-batch has the same size and one adapter set, and nothing is compiled. On a CPU unless `GATE_DEVICE`
says otherwise (`cuda:0`), in every number type unless `GATE_DTYPE` names one. Without either, each half type has one
of the two models, as every run of the tests comes by here.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from farm.recipe import Recipe
from farm.settings import Settings
from tests.workers.conftest import ROOT
from workers.pipelines import structure
from workers.pipelines.engine import Engine

from . import toys
from .conftest import Fetch, farm_settings, go_on, recipe


class Bound(NamedTuple):
    """Levels of 255 that two pictures of one recipe may be apart: at most, and on average over a picture."""

    most: int
    mean: float


HALF = Bound(24, 1.0)
PROMISED = {
    ("cpu", "float32"): Bound(1, 1.0),
    ("cpu", "float16"): HALF,
    ("cpu", "bfloat16"): HALF,
    # Convolutions in float32 round to TF32 there, unless torch is told otherwise: as many bits as float16 has.
    ("cuda", "float32"): HALF,
    ("cuda", "float16"): HALF,
    ("cuda", "bfloat16"): HALF,
}
"""By class of device and number type; the table in docs/engine.md says the same."""
COUNT = 8
DEVICE = os.environ.get("GATE_DEVICE", "cpu")
KIND = DEVICE.partition(":")[0]
DTYPES = [dtype for kind, dtype in PROMISED if kind == KIND and os.environ.get("GATE_DTYPE", dtype) == dtype]
if not DTYPES:
    raise ValueError(
        f"GATE_DEVICE={DEVICE}, GATE_DTYPE={os.environ.get('GATE_DTYPE')}: nothing is promised for these, only for "
        + ", ".join(map(" ".join, PROMISED))
    )
CASES = [(model, dtype) for dtype in DTYPES for model in ("sd", "sdxl")]
if not {"GATE_DEVICE", "GATE_DTYPE"} & os.environ.keys():
    CASES = [("sd", "float32"), ("sdxl", "float32"), ("sd", "float16"), ("sdxl", "bfloat16")]
COMPILES = [False, True] if KIND == "cuda" else [False]
"""On a GPU a picture before networks are compiled, and one after, are the same within the same bound."""
COMPILING_SECONDS = 1800.0


def gated(dtype: str, **changes: object) -> Settings:
    return farm_settings(device=DEVICE, dtype=dtype, **{"compile": "off", **changes})


def render(engine: Engine, recipes: Sequence[Recipe]) -> list[np.ndarray]:
    return [one for one in engine.render(engine.stage(recipes), recipes, go_on) if one is not None]


def apart(some: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> int:
    return max(int(np.abs(a.astype(int) - b).max()) for a, b in zip(some, others, strict=True))


def within(bound: Bound, some: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> bool:
    means = [float(np.abs(a.astype(int) - b).mean()) for a, b in zip(some, others, strict=True)]
    return apart(some, others) <= bound.most and max(means) <= bound.mean


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


@pytest.mark.parametrize("compiles", COMPILES)
@pytest.mark.parametrize(("model", "dtype"), CASES)
def test_the_same_recipe_gives_the_same_picture(fetch: Fetch, model: str, dtype: str, compiles: bool) -> None:
    bound = PROMISED[KIND, dtype]
    same = bound if compiles else Bound(0, 0.0)
    recipes = [wanted(model, number=number) for number in range(COUNT)]
    others = [wanted(model, "words", number=100 + number) for number in range(COUNT)]
    engine = Engine(gated(dtype, micro_batch=2 * COUNT, compile="on" if compiles else "off"), fetch)
    alone = [render(engine, [one])[0] for one in recipes]
    assert apart(alone[:1], alone[1:2]) > 20, "different recipes, different pictures"
    bare = render(engine, [wanted(model, adapters=[])])
    assert apart(alone[:1], bare) > 1, "the style is seen"
    together: dict[int, list[np.ndarray]] = {}
    for _ in range(1 + compiles):
        for size in (2, 3, COUNT):
            parts = [recipes[start : start + size] for start in range(0, COUNT, size)]
            together[size] = [picture for part in parts for picture in render(engine, part)]
            assert within(bound, alone, together[size]), f"in micro-batches of {size}"
        assert engine.compiler.settled(COMPILING_SECONDS)
    assert within(bound, alone, render(engine, recipes[::-1])[::-1]), "in another order"
    mixed = render(engine, [one for pair in zip(recipes, others, strict=True) for one in pair])
    assert engine.warm()[-1]["slots"], "slots were used"
    assert within(bound, alone, mixed[::2]), "with other adapters beside it"
    assert within(bound, [render(engine, [one])[0] for one in others], mixed[1::2])
    for swap in range(20):
        style, weight = ("style", "words")[swap % 2], 0.15 * swap - 1
        mark = "xl-" if model == "sdxl" else ""
        render(engine, [wanted(model, steps=1, adapters=[{"hash": f"{mark}{style}", "weight": weight}])])
    assert within(same, alone, [render(engine, [one])[0] for one in recipes]), "after 20 swaps"
    assert within(same, together[3][:3], render(engine, recipes[:3]))
    assert (engine.compiler.told()["ready"] > 0) == compiles


def test_the_pruned_unet_gives_the_same_picture(tmp_path: Path) -> None:
    """SSD-1B's: three pictures alone, together, in another order, beside other adapters (in slots), and after swaps."""
    folder = toys.ssd1b(tmp_path)
    layers = {name.removesuffix(".weight"): shape for name, shape in structure.folder_shapes(folder).items()}
    attention = {name: shape for name, shape in layers.items() if name.startswith("unet.") and ".attn" in name}
    places = {"ssd-1b": folder}
    for seed, name in enumerate(("fast", "style", "words"), 1):
        places[name] = toys.kohya(tmp_path / f"{name}.safetensors", toys.changes(attention, seed=seed))
    bound = PROMISED[KIND, DTYPES[0]]
    engine = Engine(gated(DTYPES[0], micro_batch=8), places.__getitem__)
    recipes = [wanted("ssd-1b", number=number) for number in range(3)]
    others = [wanted("ssd-1b", "words", number=100 + number) for number in range(3)]
    alone = [render(engine, [one])[0] for one in recipes]
    assert apart(alone[:1], alone[1:2]) > 20, "different recipes, different pictures"
    assert apart(alone[:1], render(engine, [wanted("ssd-1b", adapters=[])])) > 1, "the style is seen"
    mixed = render(engine, [*recipes, *others])
    assert engine.warm()[-1]["slots"], "slots were used"
    for beside in (render(engine, recipes), render(engine, recipes[::-1])[::-1], mixed[:3]):
        assert within(bound, alone, beside)
    for other in others:
        render(engine, [other])
    assert apart(alone, [render(engine, [one])[0] for one in recipes]) == 0, "after swaps, bit for bit"


def test_a_fresh_process_gives_the_same_picture_as_a_warm_one(fetch: Fetch, tmp_path: Path) -> None:
    """Bit for bit at the same size of micro-batch: one process for both models, as starting one costs more than all."""
    engine = Engine(gated(DTYPES[0]), fetch)
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
                "settings": {"device": DEVICE, "dtype": DTYPES[0], "compile": "off"},
                "places": {one: str(fetch(one)) for one in hashes},
                "parts": [[one.model_dump(mode="json") for one in part] for part in parts],
            }
        )
    )
    command = [sys.executable, "-m", "tests.pipelines.fresh", str(asked)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    answer: list[str] = json.loads(done.stdout.splitlines()[-1])
    return answer
