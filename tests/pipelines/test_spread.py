"""Parts of a micro-batch on several cores: every row once, in order, and the same pictures."""

import numpy as np
import pytest
import torch

from workers.pipelines.engine import Engine
from workers.pipelines.spread import Spread

from .conftest import Fetch, farm_settings, go_on, recipe


@pytest.mark.parametrize("cores", [1, 2, 3, 8])
@pytest.mark.parametrize("rows", [1, 2, 5, 8])
def test_every_row_is_in_one_part(cores: int, rows: int) -> None:
    parts = Spread(cores).parts(rows)
    assert [row for part in parts for row in range(rows)[part]] == list(range(rows))
    assert len(parts) <= min(cores, rows)


def test_answers_are_put_together_in_order() -> None:
    rows = torch.arange(6.0)
    assert torch.equal(Spread(3).along(lambda part: rows[part] * 2, 6), rows * 2)


def test_what_a_part_raises_arrives() -> None:
    def part(number: int) -> None:
        raise ValueError(f"part {number}")

    with pytest.raises(ValueError, match="part 0"):
        Spread(2).run([lambda: part(0), lambda: part(1)])


@pytest.mark.parametrize(("model", "guidance"), [("sd", 1.0), ("sd", 3.0), ("sdxl", 3.0)])
def test_the_same_pictures_on_one_core_and_on_two(fetch: Fetch, model: str, guidance: float) -> None:
    recipes = [recipe(checkpoint=model, seed=seed, guidance_scale=guidance) for seed in range(3)]
    threads = torch.get_num_threads()
    try:
        pictures = []
        for cores in (1, 2):
            engine = Engine(farm_settings(threads=cores), fetch)
            pictures.append(engine.render(engine.stage(recipes), recipes, go_on))
    finally:
        torch.set_num_threads(threads)
    for left, right in zip(*pictures, strict=True):
        assert left is not None
        assert right is not None
        assert np.abs(left.astype(int) - right).max() <= 1
