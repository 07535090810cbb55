"""The night: another light on the same wall, from a random stream of its own."""

import numpy as np
import pytest

from farm.painter import Scene, paint, sample_scene
from farm.painter.night import night_caption, paint_night


def test_same_arguments_same_night_and_other_seed_another() -> None:
    scene = Scene(wall="yellow", form="branching", water=True, old=True, light="sunlight")
    one, two, other = (paint_night(scene, 96, 80, seed) for seed in (7, 7, 8))
    assert np.array_equal(one.picture, two.picture)
    assert one.caption == two.caption
    assert not np.array_equal(one.picture, other.picture)


def test_crack_and_mask_are_those_of_the_day() -> None:
    scene = Scene(width="wide")
    day, night = paint(scene, 128, 128, 5), paint_night(scene, 128, 128, 5)
    assert np.array_equal(day.mask, night.mask)
    grey = night.picture.mean(axis=2)
    assert grey[night.mask].mean() < 0.6 * grey[~night.mask].mean()


def test_painting_by_night_changes_no_day() -> None:
    scene = Scene(wall="brick", light="shade")
    before = paint(scene, 96, 96, 4).picture
    paint_night(scene, 96, 96, 4)
    assert np.array_equal(paint(scene, 96, 96, 4).picture, before)


@pytest.mark.parametrize("wall", ["concrete", "white", "yellow", "brick"])
def test_dark_blue_around_a_warm_lamp(wall: str) -> None:
    for seed in range(6):
        scene = Scene(wall=wall, direction="none")
        day, night = (p(scene, 128, 128, seed).picture.astype(float) for p in (paint, paint_night))
        assert night.mean() < 0.75 * day.mean()
        bright = night.mean(axis=2)
        lamp, dark = (night[m].mean(axis=0) for m in (bright > np.quantile(bright, 0.9), bright < np.median(bright)))
        assert lamp[0] > 1.3 * lamp[2], "red over blue in the light"
        warmth = day.reshape(-1, 3).mean(axis=0)
        assert dark[2] / dark[0] > 1.5 * warmth[2] / warmth[0], "bluer than by day in the dark"


def test_half_of_the_captions_say_so() -> None:
    rng = np.random.default_rng(0)
    words = ("night", "lamp", "after dark", "in the dark", "street light")
    texts = [night_caption(sample_scene(rng), rng).lower() for _ in range(400)]
    told = sum(any(word in text for word in words) for text in texts)
    assert 160 < told < 280
    assert len(set(texts)) > 390
