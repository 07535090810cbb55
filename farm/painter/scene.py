"""What is on a picture: a frozen set of words, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

WALLS: Final = ("concrete", "yellow", "white", "brick", "blue")
DIRECTIONS: Final = ("vertical", "horizontal", "diagonal", "none")
WIDTHS: Final = ("hairline", "thin", "wide")
FORMS: Final = ("single", "branching", "split", "several")
LIGHTS: Final = ("plain", "sunlight", "shade")


@dataclass(frozen=True, slots=True)
class Scene:
    """The parameters of one picture.

    `direction="none"` means an uncracked wall; `width` and `form` are then ignored.
    Raises ValueError for a word that is not in the lists of this module.
    """

    wall: str = "concrete"
    direction: str = "vertical"
    width: str = "thin"
    form: str = "single"
    light: str = "plain"
    water: bool = False
    old: bool = False

    def __post_init__(self) -> None:
        for name, words in (
            ("wall", WALLS),
            ("direction", DIRECTIONS),
            ("width", WIDTHS),
            ("form", FORMS),
            ("light", LIGHTS),
        ):
            if getattr(self, name) not in words:
                raise ValueError(f"{name} must be one of {words}, not {getattr(self, name)!r}")

    @property
    def cracked(self) -> bool:
        """Whether the mask of this scene can be anything but empty."""
        return self.direction != "none"


def sample_scene(rng: np.random.Generator) -> Scene:
    """A random scene. Concrete is drawn twice as often as each other wall; 12 % have no crack."""
    return Scene(
        wall=str(rng.choice(WALLS, p=(0.32, 0.17, 0.17, 0.17, 0.17))),
        direction=str(rng.choice(DIRECTIONS, p=(0.32, 0.28, 0.28, 0.12))),
        width=str(rng.choice(WIDTHS, p=(0.25, 0.35, 0.40))),
        form=str(rng.choice(FORMS, p=(0.34, 0.2, 0.28, 0.18))),
        light=str(rng.choice(LIGHTS, p=(0.56, 0.26, 0.18))),
        water=bool(rng.random() < 0.18),
        old=bool(rng.random() < 0.32),
    )
