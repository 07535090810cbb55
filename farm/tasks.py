"""What a job draws from besides its prompt: a picture to start from, a mask, control images. Pure.

Which task it is follows from what is given: `img2img` with an image, `inpaint` with an image and a mask, `txt2img`
else. Control images may go with each of them. With a motion adapter, `txt2img` draws frames instead of one picture.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from farm.errors import Problem
from farm.recipe import first_step, normal

Kind = Literal["txt2img", "img2img", "inpaint"]

STRENGTH = {"img2img": 0.8, "inpaint": 1.0}
"""How much of a picture is drawn anew unless a job says so."""
FRAMES, FPS = 16, 8
"""How long an animation is unless a job says so: what the first motion adapters were trained on, two seconds."""


class Control(Protocol):
    """One control as a person asks for it; `name` is that of a ControlNet, `image` the hash of an upload."""

    @property
    def name(self) -> str: ...
    @property
    def image(self) -> str: ...
    @property
    def weight(self) -> float: ...
    @property
    def start(self) -> float: ...
    @property
    def end(self) -> float: ...


class Asked(Protocol):
    """The part of a job that says what it draws from."""

    @property
    def image(self) -> str | None: ...
    @property
    def mask(self) -> str | None: ...
    @property
    def strength(self) -> float | None: ...
    @property
    def composite(self) -> bool | None: ...
    @property
    def controls(self) -> Sequence[Control]: ...
    @property
    def motion(self) -> str | None: ...
    @property
    def frames(self) -> int | None: ...
    @property
    def fps(self) -> int | None: ...


@dataclass(frozen=True, slots=True)
class Use:
    """A ControlNet by name at a weight, from the share `start` of the denoising to the share `end`."""

    name: str
    weight: float
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Task:
    """What a job draws from, without the pictures' contents: what jobs of one lane have in common."""

    kind: Kind = "txt2img"
    strength: float | None = None
    composite: bool | None = None
    controls: tuple[Use, ...] = ()
    motion: str | None = None
    """A motion adapter by name."""
    frames: int | None = None
    fps: int | None = None

    @classmethod
    def of(cls, asked: Asked) -> "Task":
        kind: Kind = "inpaint" if asked.mask else "img2img" if asked.image else "txt2img"
        strength = asked.strength
        if kind != "txt2img" and strength is None:
            strength = STRENGTH[kind]
        composite = None if kind != "inpaint" else asked.composite is not False
        uses = tuple(Use(one.name, one.weight, one.start, one.end) for one in asked.controls)
        if asked.motion is None:
            return cls(kind, strength, composite, uses)
        return cls(kind, strength, composite, uses, asked.motion, asked.frames or FRAMES, asked.fps or FPS)

    def body(self, steps: int, problems: list[Problem]) -> dict[str, Any]:
        """The recipe's fields, without the pictures. Adds a problem for a strength that leaves no step to do."""
        body: dict[str, Any] = {"task": self.kind}
        if self.strength is not None:
            body["strength"] = normal(self.strength)
            if first_step(steps, body["strength"]) >= steps:
                problem = f"{self.strength:g} of {steps} step(s) leaves none to do; give at least {1 / steps:.3g}"
                problems.append({"field": "strength", "problem": problem})
        if self.composite is not None:
            body["composite"] = self.composite
        if self.motion is not None:
            body |= {"frames": self.frames, "fps": self.fps}
        return body


def problems_of(asked: Asked) -> Iterator[Problem]:
    """What does not go together."""
    if asked.image is None:
        given = {"mask": asked.mask, "strength": asked.strength}
        for name in [name for name, value in given.items() if value is not None]:
            yield {"field": name, "problem": "needs an image to start from"}
    if asked.mask is None and asked.composite is not None:
        yield {"field": "composite", "problem": "needs a mask"}
    if asked.motion is None:
        lengths = {"frames": asked.frames, "fps": asked.fps}
        for name in [name for name, value in lengths.items() if value is not None]:
            yield {"field": name, "problem": "needs a motion adapter: name one as motion"}
    else:
        for name in [name for name in ("image", "mask", "controls") if getattr(asked, name)]:
            yield {"field": name, "problem": "does not go with motion: an animation is drawn from its prompt alone"}
    for index, control in enumerate(asked.controls):
        if control.start >= control.end:
            problem = f"must lie below end: it would act from {control.start:g} to {control.end:g}"
            yield {"field": f"controls.{index}.start", "problem": problem}


def pictures_of(asked: Asked) -> Iterator[tuple[str, str]]:
    """Every upload that is named: field and hash. The first one decides the size of a job that says none."""
    if asked.image is not None:
        yield "image", asked.image
    if asked.mask is not None:
        yield "mask", asked.mask
    for index, control in enumerate(asked.controls):
        yield f"controls.{index}.image", control.image


def with_pictures(body: dict[str, Any], asked: Asked) -> dict[str, Any]:
    """The recipe's body with the pictures of this job in it."""
    filled = {**body, **{name: value for name, value in (("image", asked.image), ("mask", asked.mask)) if value}}
    if asked.controls:
        each = zip(body["controls"], asked.controls, strict=True)
        filled["controls"] = in_order([{**use, "image": control.image} for use, control in each])
    return filled


def in_order(controls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Controls as a recipe holds them: adding them up in another order would round another way."""
    shares = ("hash", "weight", "start", "end", "image")
    return sorted(controls, key=lambda use: tuple(use.get(name, "") for name in shares))
