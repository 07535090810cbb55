"""The analyser on painted pictures: what it sees, what it does not take for a crack, and that it stops when weak."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks import analyser
from benchmarks.analyser import Seen
from farm.painter import Scene, paint, sample_scene
from farm.painter.scene import DIRECTIONS, WALLS, WIDTHS


def test_it_reads_painted_pictures_as_well_as_it_must() -> None:
    found = analyser.check(count=100, seeds=(99,))
    assert all((found[name] or 0) >= least for name, least in analyser.NEEDED.items())
    assert found == analyser.check(count=100, seeds=(99,)), "the same pictures, the same figures"


@pytest.mark.parametrize("wall", WALLS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_each_wall_with_each_direction(wall: str, direction: str) -> None:
    for seed, width in enumerate(WIDTHS):
        picture = paint(Scene(wall=wall, direction=direction, width=width), 128, 128, seed).picture
        seen = analyser.read(picture)
        assert (seen.wall, seen.direction) == (wall, direction)


def test_running_water_is_no_crack() -> None:
    scenes = [Scene(wall=wall, direction="none", water=True) for wall in WALLS] * 3
    seen = [analyser.read_direction(paint(one, 128, 128, seed).picture) for seed, one in enumerate(scenes)]
    assert seen.count("none") >= len(scenes) - 1


def test_lines_are_read_from_any_picture() -> None:
    """It has not learned the painter's strokes: a drawn line is a crack, a flat wall is none."""
    wall = np.full((96, 96, 3), 150, np.uint8)
    assert analyser.read(wall) == Seen("concrete", "none")
    wall[:, 50:52] = 20
    assert analyser.read_direction(wall) == "vertical"
    assert analyser.read_direction(wall.transpose(1, 0, 2)) == "horizontal"


def test_diagonals_rise_or_fall() -> None:
    wall = np.full((96, 96, 3), 150, np.uint8)
    for row in range(96):
        wall[row, max(0, row - 1) : row + 1] = 20
    falling, rising = analyser.read(wall), analyser.read(wall[:, ::-1])
    assert (falling.direction, falling.rising) == ("diagonal", False)
    assert (rising.direction, rising.rising) == ("diagonal", True)
    assert analyser.read_angle(np.full((96, 96, 3), 150, np.uint8)) is None
    diagonal, other = Scene("concrete", "diagonal"), Scene("concrete", "vertical")
    meant = [diagonal, diagonal, diagonal, diagonal, other]
    seen = [rising, rising, falling, Seen("concrete", "vertical", rising=True), rising]
    assert analyser.rising(seen, meant) == 0.6667, "neither what was not meant nor what was not read"
    assert analyser.rising(seen[3:], meant[3:]) is None


def test_a_diagonal_that_turns_around_is_bent() -> None:
    wall = np.full((96, 96, 3), 150, np.uint8)
    for row in range(96):
        wall[row, max(0, row - 1) : row + 1] = 20
    turned = wall.copy()
    turned[:, 48:] = turned[:, 47::-1]
    straight, bent = analyser.read(wall), analyser.read(turned)
    assert (straight.bent, bent.bent) == (False, True)
    assert not analyser.read(wall[:, ::-1]).bent
    single, split = Scene("concrete", "diagonal"), Scene("concrete", "diagonal", form="split")
    assert single.form == "single"
    none = Seen("concrete", "none", bent=True)
    assert analyser.bent([straight, bent, bent, none], [single, single, split, single]) == 0.5
    assert analyser.bent([bent], [split]) is None


def test_painted_diagonals_are_straight() -> None:
    rng = np.random.default_rng(12)
    scenes = [replace(sample_scene(rng), direction="diagonal", form="single") for _ in range(40)]
    seen = [analyser.read(paint(scene, 128, 128, number).picture) for number, scene in enumerate(scenes)]
    assert (analyser.bent(seen, scenes) or 0.0) <= 0.05


def test_rates_count_what_was_meant() -> None:
    bare, cracked = Scene("blue", "none"), [Scene("blue", "vertical", "hairline"), Scene("brick", "diagonal", "wide")]
    meant = [bare, *cracked, bare]
    seen = [Seen("blue", "vertical"), Seen("white", "none"), Seen("brick", "diagonal"), Seen("blue", "none")]
    found = analyser.rates(seen, meant)
    assert found == {"wall": 0.75, "crack": 0.5, "whole": 0.5, "direction": 0.5, "hairlines": 0.0}
    assert analyser.rates(seen[:1], meant[:1])["direction"] is None
    assert analyser.rates(seen[1:2], meant[1:2])["whole"] is None


def test_a_weak_analyser_stops_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analyser, "read_wall", lambda _: "concrete")
    with pytest.raises(analyser.WeakAnalyser, match=r"wall 0\.\d+, needed 0\.99"):
        analyser.check(count=20, seeds=(99,))


def test_the_worst_seed_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blind to colour on the pictures of one seed, whichever that is."""
    right, rates = analyser.read_wall, []
    for worst in (0, 1):
        pictures = iter(range(40))
        monkeypatch.setattr(
            analyser, "read_wall", lambda one, p=pictures, w=worst: "blue" if next(p) // 20 == w else right(one)
        )
        with pytest.raises(analyser.WeakAnalyser) as raised:
            analyser.check(count=20, seeds=(99, 7))
        rates.append(str(raised.value))
    assert all("wall 0." in text and "crack" not in text for text in rates)
