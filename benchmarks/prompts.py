"""What `crack-tiny` is asked for: scenes as often as the painter draws them, in sentences it never trained on.

The words are those of the painter's captions, their order is not: the captions put light and water behind the
crack, or in front of everything, and never an adjective behind its crack. So no prompt can have been a caption.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from farm.painter import Scene, paint, sample_scene
from farm.painter.night import paint_night

DEMO = (
    "A single split crack on a concrete wall",
    "Sunlight shining on an outdoor concrete wall with split cracks",
    "Vertically split cracks on an old yellow painted concrete wall",
    "Water draining down next to a cracked concrete wall",
)
SIDE = 128

_WALL = {
    "concrete": "grey concrete wall",
    "yellow": "yellow painted wall",
    "white": "white painted wall",
    "brick": "red brick wall",
    "blue": "blue painted wall",
}
_LIGHT = {"plain": "in daylight", "sunlight": "in bright sunshine", "shade": "in the shade"}
_FORM = {"single": "crack", "branching": "branching crack", "split": "split crack", "several": "parallel cracks"}


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt, the scene it describes, and the seed of its picture."""

    text: str
    scene: Scene
    seed: int


def prompts(count: int, seed: int) -> list[Asked]:
    """The first `count` prompts of a seed: a longer list begins with the shorter one."""
    rng = np.random.default_rng((seed, 1))
    made = []
    for i in range(count):
        scene = sample_scene(rng)
        made.append(Asked(_sentence(scene, int(rng.integers(4))), scene, seed * 1_000_003 + i))
    return made


def _sentence(scene: Scene, order: int) -> str:
    wall = ("old " if scene.old else "") + _WALL[scene.wall]
    wet = " with water running down" if scene.water else ""
    light = _LIGHT[scene.light]
    place = f"{'an' if wall[0] in 'aeiou' else 'a'} {wall} {light}{wet}"
    if not scene.cracked:
        endings = ("without any cracks", "free of cracks", "with no cracks", "without cracks")
        return _start(f"{place} {endings[order]}")
    article = "" if scene.form == "several" else "a "
    way, width, form = scene.direction, scene.width, _FORM[scene.form]
    return _start(
        (
            f"{place} with {article}{width} {way} {form}",
            f"{article}{way} {form}, {width}, on {place}",
            f"{place}: {article}{width} {way} {form}",
            f"{article}{width} {form}, {way}, across {place}",
        )[order]
    )


def _start(text: str) -> str:
    return text[0].upper() + text[1:]


def painted(asked: list[Asked], number: int) -> NDArray[np.uint8]:
    """The scenes of some prompts as the painter sees them: uint8 (n, 128, 128, 3); `number` chooses other seeds."""
    return np.stack(
        [paint(one.scene, SIDE, SIDE, 7_000_000_000 + number * 1_000_000 + i).picture for i, one in enumerate(asked)]
    )


def painted_nights(asked: list[Asked]) -> NDArray[np.uint8]:
    """The scenes of some prompts by night: uint8 (n, 128, 128, 3)."""
    return np.stack([paint_night(one.scene, SIDE, SIDE, 7_002_000_000 + i).picture for i, one in enumerate(asked)])


def digest(asked: list[Asked]) -> str:
    """What tells one list of prompts from another."""
    text = "\n".join(f"{one.seed} {one.text}" for one in asked)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
