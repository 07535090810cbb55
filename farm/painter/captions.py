"""Free English for a scene: many orders, many synonyms, and not every detail every time."""

from __future__ import annotations

from typing import Final

import numpy as np

from farm.painter.scene import Scene

_WALL: Final = {
    "concrete": (
        "concrete wall", "grey concrete wall", "gray concrete wall", "plain concrete wall",
        "cement wall", "bare concrete wall", "grey wall", "wall of concrete", "concrete surface",
        "outdoor concrete wall",
    ),
    "yellow": (
        "yellow wall", "yellow painted wall", "yellow painted concrete wall", "wall painted yellow",
        "ochre yellow wall", "yellow plaster wall", "yellow concrete wall", "mustard yellow wall",
    ),
    "white": (
        "white wall", "white painted wall", "whitewashed wall", "white plaster wall",
        "wall painted white", "white painted concrete wall", "white concrete wall",
    ),
    "brick": (
        "brick wall", "red brick wall", "wall of red bricks", "brickwork wall",
        "wall made of brick", "red brick facade", "masonry wall of bricks",
    ),
    "blue": (
        "blue wall", "blue painted wall", "wall painted blue", "blue plaster wall",
        "blue painted concrete wall", "blue concrete wall", "sky blue wall",
    ),
}  # fmt: skip
_WIDTH: Final = {
    "hairline": ("hairline", "fine", "very thin", "hair-thin", "faint"),
    "thin": ("thin", "narrow", "small", "slim"),
    "wide": ("wide", "deep", "big", "large", "gaping", "broad", "thick"),
}
_DIRECTION: Final = {
    "vertical": ("vertical", "upright"),
    "horizontal": ("horizontal", "level"),
    "diagonal": ("diagonal", "slanting", "oblique"),
}
_ADVERB: Final = {
    "vertical": ("vertically",),
    "horizontal": ("horizontally",),
    "diagonal": ("diagonally",),
}
_RUN: Final = {
    "vertical": ("running from top to bottom", "running down the wall", "going straight up",
                 "from ceiling to floor"),
    "horizontal": ("running from left to right", "running sideways", "from side to side",
                   "running across"),
    "diagonal": ("running at an angle", "from corner to corner", "running diagonally",
                 "sloping across"),
}  # fmt: skip
_FORM: Final = {
    "single": ("single", "lone", "one", ""),
    "branching": ("branching", "branched", "forking tree-like", "spidery"),
    "split": ("split", "forked", "split", "Y-shaped", "splitting"),
    "several": ("several", "multiple", "many", "parallel", "a few"),
}
_LIGHT: Final = {
    "sunlight": (
        "in sunlight", "in bright sunshine", "on a sunny day", "lit by the sun",
        "in the afternoon sun", "with sunlight shining on it", "under strong sun",
        "with sunlight and shadow",
    ),
    "shade": (
        "in the shade", "in shadow", "in dim light", "on a cloudy day", "under a dark sky",
        "in gloomy light",
    ),
    "plain": ("in even light", "in daylight", "in soft light"),
}  # fmt: skip
_LIGHT_FIRST: Final = {
    "sunlight": ("Sunlight shining on", "Sunlight falling on", "Bright sun on", "Sunshine on"),
    "shade": ("Shade over", "Shadow on", "Dim light on"),
}  # fmt: skip
_WATER: Final = (
    "with water running down", "with water draining down", "wet with running water",
    "with water streaks", "with water dripping down", "with streams of water", "soaked by a leak",
    "with rainwater running down",
)  # fmt: skip
_WATER_FIRST: Final = (
    "Water draining down next to", "Water running down", "Water flowing down beside",
    "Water dripping down", "Rainwater streaming down", "A leak of water running down",
)  # fmt: skip
_OLD: Final = ("old", "weathered", "stained", "aged", "dirty", "worn", "ancient")
_NEW: Final = ("new", "clean", "smooth", "")
_NONE: Final = (
    "without cracks", "without any cracks", "with no cracks", "free of cracks", "intact",
    "that is not cracked", "in good condition", "undamaged",
)  # fmt: skip
_OPENING: Final = ("photo of", "a photograph of", "close-up of", "picture of", "an image of",
                   "detail of", "a close view of")  # fmt: skip
# Words that say nothing about the wall teach the text encoder to look past them.
_EXTRA: Final = (
    "in the city", "near the station", "of an old house", "behind the school", "high quality",
    "4k", "sharp focus", "realistic", "building inspection", "for the report", "in Tokyo",
    "of the factory", "on the second floor", "beside the road", "texture", "dataset image 27",
    "urban scene", "detailed", "taken by phone", "under the bridge", "of a garage", "outdoors",
    "seen by a robot", "survey no. 318", "in winter", "this morning", "from up close",
)  # fmt: skip


def _pick(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    return words[int(rng.integers(len(words)))]


def _article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" and not phrase.startswith("one") else "a ") + phrase


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One English phrase or sentence (3 to about 30 words) that is true of the scene.

    The wall is always named. Direction, width, form, light, water and age are each left out now
    and then, so that a model also learns what to do when a detail is not asked for.
    """
    wall = _wall(scene, rng)
    light_first = scene.light != "plain" and rng.random() < 0.3
    water_first = scene.water and not light_first and rng.random() < 0.5
    if not scene.cracked:
        body = f"{_article(wall)} {_pick(rng, _NONE)}"
        if rng.random() < 0.2:
            body = _article(f"crack-free {wall}" if rng.random() < 0.5 else f"undamaged {wall}")
    elif rng.random() < 0.09:
        body = _article(f"cracked {wall}")
    else:
        body = _cracked(scene, wall, light_first or water_first, rng)
    if light_first:
        body = f"{_pick(rng, _LIGHT_FIRST[scene.light])} {body}"
    elif water_first:
        body = f"{_pick(rng, _WATER_FIRST)} {body}"
    elif rng.random() < 0.15:
        body = f"{_pick(rng, _OPENING)} {body}"
    tails = []
    if scene.water and not water_first:
        tails.append(_pick(rng, _WATER))
    if not light_first and rng.random() < (0.92 if scene.light != "plain" else 0.08):
        tails.append(_pick(rng, _LIGHT[scene.light]))
    if rng.random() < 0.16:
        tails.append(_pick(rng, _EXTRA))
    rng.shuffle(tails)
    comma = ", " if rng.random() < 0.45 else " "
    text = comma.join([body, *tails])
    return _dress(text, rng)


def _wall(scene: Scene, rng: np.random.Generator) -> str:
    wall = _pick(rng, _WALL[scene.wall])
    if scene.old and rng.random() < 0.85:
        return f"{_pick(rng, _OLD)} {wall}"
    if not scene.old and rng.random() < 0.1:
        return f"{_pick(rng, _NEW)} {wall}".strip()
    return wall


def _cracked(scene: Scene, wall: str, opened: bool, rng: np.random.Generator) -> str:
    crack = _crack(scene, rng)
    place = _article(wall) if rng.random() < 0.85 else f"the {wall}"
    order = rng.random()
    if order < 0.3 or (opened and order < 0.65):
        return f"{place} with {crack}"
    if order < 0.76:
        word = _pick(rng, ("on", "in", "on", "across"))
        return f"{crack} {'on' if crack.split()[-1] == word else word} {place}"
    if order < 0.88:
        return f"{place} showing {crack}"
    if order < 0.94:
        return f"{place}, {crack}"
    return f"{crack}, {wall}"


def _crack(scene: Scene, rng: np.random.Generator) -> str:
    """The crack with its article: number, width, direction and form in varying order."""
    told = rng.random() < 0.84
    style = rng.random()
    words: list[str] = []
    tail = ""
    form = _pick(rng, _FORM[scene.form])
    if scene.form == "single" and rng.random() < 0.5:
        form = ""
    if scene.form in ("branching", "split") and rng.random() < 0.12:
        form = ""
    if rng.random() < 0.8:
        words.append(_pick(rng, _WIDTH[scene.width]))
    if told and style < 0.2 and scene.form in ("split", "branching"):
        form = f"{_pick(rng, _ADVERB[scene.direction])} {scene.form}"
    elif told and style < 0.75:
        words.append(_pick(rng, _DIRECTION[scene.direction]))
    elif told:
        tail = f" {_pick(rng, _RUN[scene.direction])}"
    rng.shuffle(words)
    many = scene.form == "several" or (scene.form == "split" and rng.random() < 0.45)
    if scene.form in ("several", "single") or rng.random() < 0.5:
        words.insert(0, form)
    else:
        words.append(form)
    phrase = " ".join([*(w for w in words if w), "cracks" if many else "crack"])
    if phrase.startswith(("one ", "a few ")) or many:
        return phrase + tail
    return _article(phrase) + tail


def _dress(text: str, rng: np.random.Generator) -> str:
    style = rng.random()
    if style < 0.5:
        text = text[0].upper() + text[1:]
    elif style < 0.65:
        text = text.lower()
    return text + ("." if rng.random() < 0.12 else "")
