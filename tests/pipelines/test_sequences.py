"""Whatever an engine went through, it ends where a fresh one begins: same weights, same pictures, bit for bit."""

from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from farm.recipe import Recipe
from workers.pipelines.engine import Engine

from .conftest import Fetch, farm_settings, go_on, recipe, with_room_for

FAST = {"hash": "fast", "weight": 1.0}
TURNS = 16


def uses(name: str, weight: float) -> list[dict[str, Any]]:
    return [{"hash": name, "weight": weight}]


def render(engine: Engine, recipes: Sequence[Recipe]) -> list[Any]:
    return engine.render(engine.stage(recipes), recipes, go_on)


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    """Every parameter of the SD checkpoint by name, and nothing that slots left behind among the buffers."""
    (entry,) = [one for one in engine._residents.resident() if one.checkpoint == "sd"]
    pipeline = entry.loaded
    parts = {"unet": pipeline.unet, "text": pipeline.encoders[0].model, "vae": pipeline.vae}
    return {f"{part}.{name}": value for part, module in parts.items() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_any_sequence_ends_where_a_fresh_engine_begins(
    fetch: Fetch, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Swaps, other accelerations, mixed micro-batches, other checkpoints and too little memory, in random order."""
    chance = Random(dtype)
    engine = Engine(farm_settings(dtype=dtype, micro_batch=8), fetch)
    wanted = [recipe(n, steps=2, acceleration=FAST, adapters=uses("words", 0.8)) for n in range(3)]
    first = render(engine, wanted)
    kinds = ["swap", "bare", "mixed", "memory", "other"] * -(-TURNS // 5)
    chance.shuffle(kinds)

    def some(count: int) -> list[Recipe]:
        """Recipes of one lane with adapter sets drawn at random."""
        drawn = [uses(chance.choice(["style", "words"]), chance.choice([1.0, 0.7, -0.5, 2.0])) for _ in range(count)]
        return [recipe(chance.randrange(9), steps=1, acceleration=FAST, adapters=adapters) for adapters in drawn]

    for kind in kinds[:TURNS]:
        if kind == "swap":
            render(engine, some(1))
        elif kind == "bare":
            render(engine, [recipe(steps=1, adapters=chance.choice([[], uses("style", 1.5)]))])
        elif kind == "mixed":
            render(engine, some(chance.randint(2, 5)))
        elif kind == "memory":
            with monkeypatch.context() as tight:
                (entry,) = [one for one in engine._residents.resident() if one.checkpoint == "sd"]
                asked = with_room_for(entry.loaded.unet, 2, tight)
                assert len(render(engine, some(6))) == 6
            assert max(asked) in {1, 2, 3, 4, 6}
            engine._limits.clear()
        else:
            render(engine, [recipe(checkpoint="sdxl", steps=1)])
    again = render(engine, wanted)
    fresh = Engine(farm_settings(dtype=dtype, micro_batch=8), fetch)
    others = render(fresh, wanted)
    assert all(np.array_equal(a, b) for a, b in zip(again, first, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(again, others, strict=True))
    mine, its = weights(engine), weights(fresh)
    assert mine.keys() == its.keys()
    assert [name for name, value in mine.items() if not torch.equal(value, its[name])] == []
