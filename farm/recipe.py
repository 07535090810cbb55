"""The recipe: every input that fixes the pixels of one image, frozen, canonical and hashed.

Names are resolved to content hashes before a recipe exists, adapters are sorted by hash and numbers are normalised, so
two recipes are equal exactly when their canonical bytes are.
"""

import hashlib
from typing import Annotated, Any, Literal, Self

import orjson
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from farm.formats import KINDS, Kind, format_of

MAX_SEED = 2**53 - 1
"""Seeds are 0..2^53-1: every one of them survives JSON readers that keep numbers as doubles."""

MAX_FRAMES = 64
"""Frames of one animation; most motion adapters know no more than 32."""

NOT_IN_LANE = (
    "prompt", "negative_prompt", "seed", "adapters", "image", "mask", "strength", "controls", "fps",
    "format", "quality",
)  # fmt: skip
"""What jobs of one lane may differ in. Everything else a recipe holds, now or later, tells lanes apart. Of a strength
the step at which it begins does count, and of controls everything but their images."""

IN_PIPELINE_KEY = ("checkpoint", "vae", "motion", "acceleration", "adapters")
"""What makes two jobs share a loaded pipeline."""


class AdapterUse(BaseModel):
    """One adapter at one weight. `hash` is the sha256 of its content, 64 hex digits; `weight` is within -10..10."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hash: str
    weight: Annotated[float, Field(ge=-10, le=10, allow_inf_nan=False)]

    @field_validator("weight")
    @classmethod
    def _normal(cls, value: float) -> float:
        return normal(value)


class ControlUse(BaseModel):
    """A ControlNet (content hash) following a picture (hash of an upload) at a weight, from the share `start` of the
    denoising steps to the share `end`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hash: str
    image: str
    weight: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 1.0
    start: Annotated[float, Field(ge=0, le=1)] = 0.0
    end: Annotated[float, Field(ge=0, le=1)] = 1.0

    @field_validator("weight", "start", "end")
    @classmethod
    def _normal(cls, value: float) -> float:
        return normal(value)


class Recipe(BaseModel):
    """Everything that fixes the pixels. Sizes in pixels; `checkpoint` and `vae` are content hashes (sha256, hex).

    `image` and `mask` are hashes of uploads. `strength` (0..1) is how much of the image is drawn anew, `composite`
    whether what the mask leaves alone comes back pixel by pixel. With `motion`, a motion adapter (content hash), it is
    an animation of so many `frames`, shown at `fps` frames a second. `format` is what the picture is stored as where
    that is no PNG; `quality` (1..100) belongs to a JPEG, and to a WebP that does not keep every pixel.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    task: Literal["txt2img", "img2img", "inpaint"] = "txt2img"
    prompt: str
    negative_prompt: str = ""
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)]
    width: int
    height: int
    steps: int
    guidance_scale: float
    scheduler: str
    checkpoint: str
    vae: str | None = None
    acceleration: AdapterUse | None = None
    adapters: tuple[AdapterUse, ...] = ()
    image: str | None = None
    mask: str | None = None
    strength: Annotated[float, Field(gt=0, le=1)] | None = None
    composite: bool | None = None
    controls: tuple[ControlUse, ...] | None = None
    motion: str | None = None
    frames: Annotated[int, Field(ge=2, le=MAX_FRAMES)] | None = None
    fps: Annotated[int, Field(ge=1, le=60)] | None = None
    format: Literal["webp", "jpeg"] | None = None
    quality: Annotated[int, Field(ge=1, le=100)] | None = None

    @field_validator("guidance_scale")
    @classmethod
    def _normal(cls, value: float) -> float:
        return normal(value)

    @field_validator("controls")
    @classmethod
    def _in_order(cls, value: tuple[ControlUse, ...] | None) -> tuple[ControlUse, ...] | None:
        # None for no control at all: recipes from before there were any keep their hashes.
        ordered = sorted(value or (), key=lambda use: (use.hash, use.weight, use.start, use.end, use.image))
        return tuple(ordered) or None

    @field_validator("adapters")
    @classmethod
    def _sorted(cls, value: tuple[AdapterUse, ...]) -> tuple[AdapterUse, ...]:
        return tuple(sorted(value, key=lambda use: (use.hash, use.weight)))

    @model_validator(mode="after")
    def _whole(self) -> Self:
        wanted = {"txt2img": (), "img2img": ("image", "strength"), "inpaint": ("image", "mask", "strength")}[self.task]
        for name in ("image", "mask", "strength"):
            if (getattr(self, name) is None) == (name in wanted):
                raise ValueError(f"{self.task} {'needs' if name in wanted else 'has no'} {name}")
        for name in ("frames", "fps"):
            if (getattr(self, name) is None) != (self.motion is None):
                raise ValueError(f"motion and {name} go together")
        if self.motion is not None and (self.task != "txt2img" or self.controls):
            raise ValueError("motion goes with txt2img alone")
        if self.format is not None and self.motion is not None:
            raise ValueError("an animation has no format: it is a lossless WebP")
        if self.quality is None if self.format == "jpeg" else (self.quality is not None and self.format is None):
            raise ValueError("jpeg needs a quality, webp may have one, png has none")
        return self

    @property
    def first_step(self) -> int:
        """The denoising step it begins at, from 0."""
        return 0 if self.strength is None else first_step(self.steps, self.strength)

    @property
    def lossless(self) -> bool:
        """Whether its file keeps every pixel that was drawn."""
        return self.quality is None

    @property
    def kind(self) -> Kind:
        """What its file is called at its end, and its content type."""
        return KINDS[format_of({"format": self.format, "motion": self.motion})]

    @property
    def pictures(self) -> frozenset[str]:
        """The hashes of every picture it draws from."""
        named = {self.image, self.mask, *(control.image for control in self.controls or ())}
        return frozenset(hash_ for hash_ in named if hash_ is not None)

    def canonical(self) -> bytes:
        """UTF-8 JSON with sorted keys and without absent parts: equal recipes have equal bytes."""
        return canonical_bytes(self.model_dump(mode="json", exclude_none=True))

    @property
    def hash(self) -> str:
        """sha256 of the canonical bytes, 64 hex digits."""
        return hashlib.sha256(self.canonical()).hexdigest()

    @property
    def lane(self) -> str:
        """The lane this recipe belongs to, 32 hex digits."""
        return lane_of(self.model_dump(mode="json", exclude_none=True))

    @property
    def adapter_set(self) -> str:
        """The style adapters with their weights, 32 hex digits; empty for none."""
        return adapter_set_of([use.model_dump() for use in self.adapters])

    @property
    def pipeline_key(self) -> str:
        """What makes two jobs share a loaded pipeline, 32 hex digits."""
        return pipeline_key_of(self.model_dump(mode="json", exclude_none=True))

    @classmethod
    def parse(cls, body: bytes | str | dict[str, Any]) -> Self:
        """The recipe stored as canonical JSON (or its decoded form)."""
        return cls.model_validate(body) if isinstance(body, dict) else cls.model_validate_json(body)


def normal(value: float) -> float:
    """A number as recipes store it: at most six decimals and no negative zero.

    >>> normal(-0.0), normal(0.1 + 0.2), normal(1)
    (0.0, 0.3, 1.0)
    """
    return round(float(value), 6) + 0.0


def canonical_bytes(body: dict[str, Any]) -> bytes:
    """Sorted keys, no spaces, UTF-8."""
    return orjson.dumps(body, option=orjson.OPT_SORT_KEYS)


def lane_of(body: dict[str, Any]) -> str:
    """The lane of a recipe given as a plain dict without absent parts, 32 hex digits."""
    kept = {key: value for key, value in body.items() if key not in NOT_IN_LANE}
    if "strength" in body:
        kept["first_step"] = first_step(body["steps"], body["strength"])
    if body.get("controls"):
        kept["controls"] = [{key: use[key] for key in use if key != "image"} for use in body["controls"]]
    return digest(kept)


def pipeline_key_of(body: dict[str, Any]) -> str:
    """What makes two jobs share a loaded pipeline, of a recipe given as a plain dict, 32 hex digits."""
    key = {name: body[name] for name in IN_PIPELINE_KEY if name in body}
    if body.get("controls"):
        key["controlnets"] = sorted({use["hash"] for use in body["controls"]})
    return digest(key)


def first_step(steps: int, strength: float) -> int:
    """The step at which a picture of this strength begins, as diffusers' image-to-image pipelines have it.

    >>> first_step(4, 1.0), first_step(4, 0.8), first_step(50, 0.3), first_step(4, 0.2)
    (0, 1, 35, 4)
    """
    return steps - min(int(steps * strength), steps)


def adapter_set_of(uses: list[dict[str, Any]]) -> str:
    """The adapter set of style adapters already sorted as a recipe holds them, 32 hex digits; empty for none."""
    return hashlib.sha256(orjson.dumps(uses, option=orjson.OPT_SORT_KEYS)).hexdigest()[:32] if uses else ""


def digest(body: dict[str, Any]) -> str:
    """sha256 of the canonical bytes, shortened to 32 hex digits."""
    return hashlib.sha256(canonical_bytes(body)).hexdigest()[:32]
