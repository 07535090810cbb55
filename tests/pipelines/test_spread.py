"""Parts of a micro-batch on several cores: every row once, in order, and the same pictures."""

from collections.abc import Callable
from threading import Event, get_ident

import numpy as np
import pytest
import torch

from workers.pipelines.engine import Engine
from workers.pipelines.render import Pace
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


def test_what_follows_a_part_does_not_wait_for_the_slowest() -> None:
    followed = Event()

    def follow() -> str:
        followed.set()
        return "quick"

    def slow() -> list[Callable[[], str]]:
        assert followed.wait(20), "the other part's further call runs beside this"
        return [lambda: "slow"]

    assert Spread(2).flow([lambda: [follow], slow]) == ["quick", "slow"]
    assert Spread(1).flow([lambda: [follow], slow]) == ["quick", "slow"]


def test_what_a_part_or_what_follows_raises_arrives_when_nothing_runs_any_more() -> None:
    ended = []

    def fails() -> list[Callable[[], None]]:
        raise ValueError("part")

    def late() -> None:
        ended.append(True)
        raise KeyError("follows")

    with pytest.raises(ValueError, match="part"):
        Spread(2).flow([fails, lambda: [late]])
    assert ended
    with pytest.raises(KeyError, match="follows"):
        Spread(2).flow([list, lambda: [late]])


def test_a_part_of_a_part_stays_in_its_thread() -> None:
    spread = Spread(2)

    def part() -> list[object]:
        return [get_ident(), *spread.run([get_ident, get_ident]), spread.parts(8)]

    for here, *there, parts in spread.run([part, part]):
        assert there == [here, here]
        assert parts == [slice(0, 8)]


def test_steps_are_told_once_when_the_slowest_part_has_done_them() -> None:
    told: list[tuple[int, int]] = []

    def on_step(step: int, steps: int) -> set[int]:
        told.append((step, steps))
        return {3} if step == 1 else {0, 1} if step == 2 else set()

    one, other = slice(0, 2), slice(2, 4)
    pace = Pace(on_step, [one, other])
    first, second = pace.of(one), pace.of(other)
    assert first(1, 3)
    assert first(2, 3)
    assert told == []
    assert second(1, 3)
    assert told == [(1, 3)]
    assert pace.kept(other) == [2]
    assert second(2, 3)
    assert not first(3, 3), "all of its rows are dropped"
    assert told == [(1, 3), (2, 3)]
    assert second(3, 3)
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert (pace.kept(one), pace.kept(other)) == ([], [2])


def test_when_one_part_fails_the_others_stop() -> None:
    told: list[int] = []
    pace = Pace(lambda step, _: told.append(step) or (), [slice(0, 2), slice(2, 4)])
    going = pace.of(slice(2, 4))
    assert going(1, 9)
    pace.failed()
    assert not going(2, 9)


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
