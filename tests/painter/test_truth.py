"""Masks and captions are labels: what a crack changes is where its mask is, and no word denies the scene."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from farm.painter import Scene, caption, paint, sample_scene
from farm.painter.scene import WALLS

CLAIMS: dict[str, dict[object, str]] = {
    "wall": {
        "concrete": r"gr[ea]y|cement|of concrete",
        "yellow": r"yellow|ochre|mustard",
        "white": r"white|whitewashed",
        "brick": r"bricks?|brickwork|masonry",
        "blue": r"blue",
    },
    "direction": {
        "vertical": r"vertical|vertically|upright|from top|(?<!water )running down the wall|straight up|from ceiling",
        "horizontal": r"horizontal(ly)?|level|left to right|sideways|side to side|running across",
        "diagonal": r"diagonal(ly)?|slanting|oblique|at an angle|corner to corner|sloping",
        "none": r"(without|without any|with no|free of) cracks|intact|not cracked|good condition|undamaged|crack-free",
    },
    "width": {
        "hairline": r"hairline|fine|very thin|hair-thin|faint",
        "thin": r"(?<!very )(?<!hair-)thin|narrow|small|slim",
        "wide": r"wide|deep|big|large|gaping|broad|thick",
    },
    "form": {
        "single": r"single|lone|one",
        "branching": r"branching|branched|tree-like|spidery",
        "split": r"split|splitting|forked|y-shaped",
        "several": r"several|multiple|many|parallel|a few",
    },
    "light": {
        "sunlight": r"sun|sunny|sunlight|sunshine",
        "shade": r"shade|(?<!and )shadow|dim light|cloudy|dark sky|gloomy",
        "plain": r"daylight|even light|soft light",
    },
    "water": {True: r"water|rainwater|leak|wet|soaked"},
    # There is an old house behind some walls.
    "old": {True: r"old(?! house)|weathered|stained|aged|dirty|worn|ancient", False: r"new|clean|smooth"},
}


def claims(text: str, name: str) -> set[object]:
    """What a caption says of one property of the scene."""
    return {value for value, words in CLAIMS[name].items() if re.search(rf"\b({words})\b", text.lower())}


def test_no_word_of_a_caption_denies_the_scene() -> None:
    rng, told = np.random.default_rng(4), Counter[tuple[str, object]]()
    for _ in range(300):
        scene = sample_scene(rng)
        for text in {caption(scene, rng) for _ in range(4)}:
            for name in CLAIMS:
                said = claims(text, name)
                assert said <= {getattr(scene, name)}, (text, scene)
                told.update((name, value) for value in said)
            if not scene.cracked:
                assert claims(text, "direction"), text
                assert not claims(text, "width") | claims(text, "form"), text
            elif scene.form == "several":
                assert not re.search(r"\bcrack\b", text), (text, scene)
            elif scene.form != "split":
                assert "cracks" not in text, (text, scene)
    assert all(told[name, value] >= 5 for name, words in CLAIMS.items() for value in words), "each is told of"


def near(mask: np.ndarray, reach: int) -> np.ndarray:
    """The mask with everything within so many pixels of it."""
    padded = np.pad(mask, reach)
    height, width = mask.shape
    places = np.ndindex(2 * reach + 1, 2 * reach + 1)
    return np.any([padded[y : y + height, x : x + width] for y, x in places], axis=0)


def test_a_crack_changes_the_wall_where_its_mask_is_and_nowhere_else() -> None:
    rng = np.random.default_rng(0)
    for seed in range(60):
        scene = sample_scene(rng)
        cracked, whole = (paint(one, 96, 80, seed) for one in (scene, replace(scene, direction="none")))
        change = cracked.picture.sum(axis=2, dtype=int) - whole.picture.sum(axis=2, dtype=int)
        assert (change[cracked.mask] < 0).all(), "dark where it is"
        changed = (cracked.picture != whole.picture).any(axis=2)
        # Its crumbled edge and the lit lip are less than three tenths of a pixel of crack.
        assert not (changed & ~near(cracked.mask, 3)).any(), (seed, scene)
        dark = change < -0.3 * whole.picture.sum(axis=2, dtype=int)
        assert not (dark & ~cracked.mask).any(), "what is dark of it is in the mask, to the pixel"


def test_captions_say_things_in_many_orders() -> None:
    """Of a wall, its crack, light and water each may come before each other."""
    rng = np.random.default_rng(5)
    scene = Scene("blue", "vertical", "wide", light="shade", water=True)
    places = {
        "wall": r"\b(wall|facade|plaster)",
        "crack": r"crack",
        "light": r"shad|sky|cloud|overcast",
        "water": r"water|leak",
    }
    orders = Counter[tuple[str, ...]]()
    for _ in range(600):
        text = caption(scene, rng).lower()
        found = {name: match.start() for name, words in places.items() if (match := re.search(words, text))}
        if len(found) == len(places):
            orders[tuple(sorted(found, key=found.__getitem__))] += 1
    before = {(first, second) for order in orders for at, first in enumerate(order) for second in order[at + 1 :]}
    assert len(orders) >= 6, orders
    assert {("wall", "crack"), ("crack", "wall"), ("light", "wall"), ("water", "wall")} <= before


def test_no_word_stands_twice_beside_itself() -> None:
    rng = np.random.default_rng(9)
    texts = [caption(replace(sample_scene(rng), direction="diagonal"), rng) for _ in range(3_000)]
    assert [text for text in texts if re.search(r"\b(\w+) \1\b", text.lower())] == []


@pytest.mark.parametrize("wall", WALLS)
def test_every_word_changes_the_picture(wall: str) -> None:
    scene = Scene(wall=wall)
    before = paint(scene, 96, 96, 6)
    for name, value, moves in (
        ("direction", "horizontal", True),
        ("width", "wide", True),
        ("form", "branching", True),
        ("form", "split", True),
        ("form", "several", True),
        ("light", "sunlight", False),
        ("light", "shade", False),
        ("water", True, False),
        ("old", True, False),
    ):
        after = paint(replace(scene, **{name: value}), 96, 96, 6)
        assert np.mean((before.picture != after.picture).any(axis=2)) > 0.02, (name, value)
        assert (before.mask != after.mask).any() == moves, (name, value)
    lit, plain, dark = (paint(replace(scene, light=light), 96, 96, 6) for light in ("sunlight", "plain", "shade"))
    assert np.quantile(lit.picture[..., 0], 0.9) > np.quantile(plain.picture[..., 0], 0.9), "the sun is warm"
    assert dark.picture.mean() < 0.8 * plain.picture.mean()
