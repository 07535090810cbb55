"""What is asked about painted walls, and walls put together so that something is wrong about them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from farm.painter import Scene, paint, sample_scene
from farm.painter.scene import DIRECTIONS, FORMS, WALLS
from workers.training import sharpen
from workers.training.errors import TrainingError
from workers.training.pool import Pool
from workers.training.questions import CROSSED, LEANS, bent, crossed, lean


def test_diagonals_lean_one_way_or_the_other() -> None:
    rng = np.random.default_rng(3)
    scenes = [replace(sample_scene(rng), direction=way, form=form) for way in DIRECTIONS[:3] for form in FORMS]
    pixels = np.zeros((len(scenes) + 2, 64, 64, 4), np.uint8)
    for number, scene in enumerate(scenes):
        pixels[number, :, :, 3] = paint(scene, 64, 64, number).mask * np.uint8(255)
    # Drawn by hand: rows are counted downwards.
    pixels[-2, :, :, 3] = 255 * np.eye(64, dtype=np.uint8)
    pixels[-1, :, :, 3] = 255 * np.eye(64, dtype=np.uint8)[::-1]
    told = [*scenes, scenes[-1], scenes[-1]]
    found = lean(Pool(pixels, told))
    assert [LEANS[answer] for answer in found[-2:]] == ["falling", "rising"]
    assert all(
        (answer == sharpen.UNKNOWN) == (one.direction != "diagonal") for one, answer in zip(told, found, strict=True)
    )
    # In a mirror each leans the other way, whatever its form.
    mirrored = lean(Pool(np.ascontiguousarray(pixels[:, :, ::-1]), told))
    assert all(
        here == there == sharpen.UNKNOWN or here == 1 - there for here, there in zip(found, mirrored, strict=True)
    )


def lined(water: bool, *ways: str) -> tuple[np.ndarray, list[Scene]]:
    """Bright walls, one for each way, with a dark line that runs so; "falling" and "rising" are diagonal."""
    ruler = np.zeros((64, 64), np.uint8)
    ruler[:, 31:33] = 255
    slope = np.maximum(np.eye(64, dtype=np.uint8), np.eye(64, k=1, dtype=np.uint8)) * np.uint8(255)
    drawn = {
        "vertical": ruler,
        "horizontal": ruler.T,
        "falling": slope,
        "rising": slope[::-1],
        "none": np.zeros_like(ruler),
    }
    masks = np.stack([drawn[way] for way in ways])
    walls = np.where(masks > 0, 10, 200).astype(np.uint8)
    names = ["diagonal" if way in LEANS else way for way in ways]
    return np.stack([walls, walls, walls, masks], -1), [Scene(direction=name, water=water) for name in names]


def test_cracks_put_together_are_known_for_what_they_are() -> None:
    ways = ("vertical", "horizontal", "falling", "rising", "none")
    (dry, first), (wet, second) = (lined(water, *ways) for water in (False, True))
    odd = replace(first[0], wall="brick", direction="none")  # no cracked wall of bricks to take a crack from
    pool = Pool(np.concatenate((dry, wet, dry[4:])), [*first, *second, odd])
    made, known = crossed(pool, 80, np.random.default_rng(1))
    masks = {way: dry[number, :, :, 3] > 0 for number, way in enumerate(ways)}
    halves, together = 0, 0
    for number, (picture, scene) in enumerate(zip(made.pixels, made.scenes, strict=True)):
        assert scene.water is (number % 2 == 0)
        assert scene.wall == "concrete"
        assert np.array_equal(picture[:, :, 0] < 100, picture[:, :, 3] > 0), "what is dark is in the mask"
        # Lines meet in the middle: away from it, what is there tells which they are.
        share = {way: (picture[:, :, 3] > 0)[mask].mean() for way, mask in masks.items() if mask.any()}
        there = [way for way, lit in share.items() if lit > 0.3]
        halves += any(0.3 < share[way] < 0.9 for way in there)
        together += len(there) == 2
        answer = int(known["direction"][number])
        assert answer == (
            CROSSED if len(there) == 2 else DIRECTIONS.index("diagonal" if there[0] in LEANS else there[0])
        )
        leaning = len(there) == 1 and there[0] in LEANS
        assert known["lean"][number] == (LEANS.index(there[0]) if leaning else sharpen.UNKNOWN)
    assert 20 < together < 75
    assert halves > 10
    assert set(known["width"]) == set(known["form"]) == {sharpen.UNKNOWN}
    again, _ = crossed(pool, 80, np.random.default_rng(1))
    assert np.array_equal(again.pixels, made.pixels)
    with pytest.raises(TrainingError, match="none of 1 walls is cracked"):
        crossed(Pool(dry[4:], [odd]), 4, np.random.default_rng(1))


def test_cracks_of_two_halves_are_known_for_what_they_are() -> None:
    walls, scenes = lined(False, "falling", "rising", "none", "vertical")
    made, known = bent(Pool(walls, scenes), 60, np.random.default_rng(1))
    falling, rising = (walls[number, :, :, 3] > 0 for number in (0, 1))
    found = set()
    for number, (picture, scene) in enumerate(zip(made.pixels, made.scenes, strict=True)):
        assert not scene.cracked, "they are put on whole walls"
        assert np.array_equal(picture[:, :, 0] < 100, picture[:, :, 3] > 0), "what is dark is in the mask"
        shares = [float((picture[:, :, 3] > 0)[mask].mean()) for mask in (falling, rising)]
        assert known["wall"][number] == WALLS.index("concrete")
        if number % 3:
            assert shares == [pytest.approx(0.5, abs=0.1)] * 2, "half of each"
            assert (known["direction"][number], known["lean"][number]) == (CROSSED, sharpen.UNKNOWN)
        else:
            assert max(shares) == 1.0
            assert known["direction"][number] == DIRECTIONS.index("diagonal")
            assert known["lean"][number] == int(shares[1] == 1.0)
        found.add((number % 3 > 0, int(known["lean"][number]), bool(picture[0, 0, 3]), bool(picture[63, 0, 3])))
    assert len(found) >= 6, "every half is left, right, above and below"
    assert set(known["width"]) == set(known["form"]) == {sharpen.UNKNOWN}
    with pytest.raises(TrainingError, match="none of 2 walls is whole and has diagonal cracks of both kinds"):
        bent(Pool(walls[1:3], scenes[1:3]), 4, np.random.default_rng(1))


def test_half_a_crack_that_is_hardly_there_is_not_asked_about() -> None:
    walls, scenes = lined(False, "falling", "rising", "none")
    # All of what rises lies in one corner: in the other halves there is nothing of it.
    walls[1, :, 20:] = walls[2, :, 20:]
    _, known = bent(Pool(walls, scenes), 60, np.random.default_rng(1))
    assert {CROSSED, sharpen.UNKNOWN} <= set(known["direction"])
    assert set(known["lean"][known["direction"] == sharpen.UNKNOWN]) == {sharpen.UNKNOWN}
