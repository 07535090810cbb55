"""Same recipe, same picture: alone or beside others, in any order, whatever was rendered before."""

import numpy as np
import pytest

from farm.recipe import Recipe
from workers.pipelines.engine import Engine

from .conftest import Fetch, farm_settings, go_on, recipe

SCHEDULERS = ["lcm", "euler-a"]


def render(engine: Engine, recipes: list[Recipe]) -> list[np.ndarray]:
    return [one for one in engine.render(engine.stage(recipes), recipes, go_on) if one is not None]


def apart(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other).max())


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("size", [2, 3, 8])
def test_alone_and_beside_others(engine: Engine, scheduler: str, size: int) -> None:
    recipes = [recipe(number, scheduler=scheduler) for number in range(size)]
    together = render(engine, recipes)
    for one, picture in zip(recipes, together, strict=True):
        assert apart(render(engine, [one])[0], picture) <= 1
    assert apart(together[0], together[1]) > 20, "different recipes, different pictures"


def test_order_within_a_micro_batch(engine: Engine) -> None:
    recipes = [recipe(number, guidance_scale=2.0) for number in range(5)]
    backwards = render(engine, recipes[::-1])[::-1]
    assert all(apart(a, b) <= 1 for a, b in zip(render(engine, recipes), backwards, strict=True))


def test_the_seed_alone_makes_the_noise(engine: Engine) -> None:
    twins = render(engine, [recipe(1), recipe(1), recipe(1, seed=7)])
    assert apart(twins[0], twins[1]) <= 1
    assert apart(twins[0], twins[2]) > 20


def test_a_warm_engine_equals_a_fresh_one_bit_for_bit(engine: Engine, fetch: Fetch) -> None:
    """After twenty swaps of adapters and other checkpoints in between."""
    fast = {"hash": "fast", "weight": 1.0}
    wanted = [recipe(n, acceleration=fast, adapters=[{"hash": "style", "weight": 0.8}]) for n in range(3)]
    for swap in range(20):
        other = [{"hash": ["style", "words"][swap % 2], "weight": 0.1 * swap - 1}]
        render(engine, [recipe(swap, steps=1, adapters=other, acceleration=fast if swap % 3 else None)])
    render(engine, [recipe(checkpoint="sdxl", steps=1)])
    warm = render(engine, wanted)
    fresh = render(Engine(farm_settings(), fetch), wanted)
    assert all(np.array_equal(a, b) for a, b in zip(warm, fresh, strict=True))


def test_a_prompt_has_the_same_embedding_whoever_asked_first(engine: Engine, fetch: Fetch) -> None:
    asked = [recipe(n) for n in range(4)]
    render(engine, asked[::-1])
    assert all(
        np.array_equal(a, b)
        for a, b in zip(render(engine, asked), render(Engine(farm_settings(), fetch), asked), strict=True)
    )
