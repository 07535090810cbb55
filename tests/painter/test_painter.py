"""The painter: equal arguments give equal pixels, masks lie on cracks, captions are true."""

import time

import numpy as np
import pytest

from farm.painter import Scene, caption, paint, sample_scene
from farm.painter.scene import DIRECTIONS, FORMS, LIGHTS, WALLS, WIDTHS


def test_same_arguments_same_picture_and_other_seed_another() -> None:
    scene = Scene(wall="brick", form="branching", water=True, old=True, light="sunlight")
    one, two, other = (paint(scene, 96, 80, seed) for seed in (7, 7, 8))
    assert np.array_equal(one.picture, two.picture)
    assert np.array_equal(one.mask, two.mask)
    assert one.caption == two.caption
    assert not np.array_equal(one.picture, other.picture)


@pytest.mark.parametrize(("width", "height"), [(32, 32), (128, 128), (200, 64), (600, 530)])
def test_any_size(width: int, height: int) -> None:
    painted = paint(Scene(form="several", width="wide"), width, height, 3)
    assert painted.picture.shape == (height, width, 3)
    assert painted.picture.dtype == np.uint8
    assert painted.mask.shape == (height, width)
    assert painted.mask.dtype == np.bool_
    assert painted.mask.any()


def test_the_mask_is_dark_and_an_uncracked_wall_has_none() -> None:
    for wall in WALLS:
        painted = paint(Scene(wall=wall, width="wide"), 128, 128, 5)
        grey = painted.picture.mean(axis=2)
        assert grey[painted.mask].mean() < 0.6 * grey[~painted.mask].mean()
        assert not paint(Scene(wall=wall, direction="none"), 128, 128, 5).mask.any()


@pytest.mark.parametrize(("direction", "tall"), [("vertical", True), ("horizontal", False)])
def test_cracks_run_where_the_scene_says(direction: str, tall: bool) -> None:
    for seed in range(10):
        rows, columns = np.nonzero(paint(Scene(direction=direction), 128, 128, seed).mask)
        assert (np.ptp(rows) > np.ptp(columns)) == tall


def test_wider_words_make_wider_cracks() -> None:
    areas = [np.mean([paint(Scene(width=width), 128, 128, seed).mask.sum() for seed in range(12)]) for width in WIDTHS]
    assert areas == sorted(areas)
    assert areas[0] * 2 < areas[2]


def test_captions_name_what_is_there() -> None:
    rng = np.random.default_rng(0)
    colours = {"yellow": ("yellow",), "blue": ("blue",), "brick": ("brick",), "white": ("white",)}
    for _ in range(400):
        scene = sample_scene(rng)
        text = caption(scene, rng).lower()
        assert 2 < len(text.split()) < 40
        for wall, words in colours.items():
            assert any(w in text for w in words) == (scene.wall == wall), (scene, text)
        assert "crack" in text or not scene.cracked
        if scene.water:
            assert any(w in text for w in ("water", "leak", "wet"))


def test_captions_vary() -> None:
    rng = np.random.default_rng(1)
    assert len({caption(Scene(form="split"), rng) for _ in range(300)}) > 200


def test_every_word_can_be_sampled() -> None:
    rng = np.random.default_rng(2)
    scenes = [sample_scene(rng) for _ in range(500)]
    for name, words in (
        ("wall", WALLS),
        ("direction", DIRECTIONS),
        ("width", WIDTHS),
        ("form", FORMS),
        ("light", LIGHTS),
    ):
        assert {getattr(s, name) for s in scenes} == set(words)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="wall must be one of"):
        Scene(wall="glass")
    with pytest.raises(ValueError, match="sides must be"):
        paint(Scene(), 16, 128, 0)
    with pytest.raises(ValueError, match="seed"):
        paint(Scene(), 128, 128, -1)


def test_painting_is_fast() -> None:
    rng = np.random.default_rng(3)
    paint(Scene(), 128, 128, 0)  # the first call makes the noise tiles
    times = []
    for seed in range(40):
        scene = sample_scene(rng)
        start = time.process_time()
        paint(scene, 128, 128, seed)
        times.append(time.process_time() - start)
    assert float(np.median(times)) < 0.03
