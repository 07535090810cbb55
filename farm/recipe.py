"""The recipe: every input that fixes the pixels of one image, frozen, canonical and hashed.

Names are resolved to content hashes before a recipe exists, adapters are sorted by hash and numbers are normalised, so
two recipes are equal exactly when their canonical bytes are.
"""

import hashlib
from typing import Annotated, Any, Literal, Self

import orjson
from pydantic import BaseModel, ConfigDict, Field, field_validator

MAX_SEED = 2**53 - 1
"""Seeds are 0..2^53-1: every one of them survives JSON readers that keep numbers as doubles."""

NOT_IN_LANE = ("prompt", "negative_prompt", "seed", "adapters")
"""What jobs of one lane may differ in. Everything else a recipe holds, now or later, tells lanes apart."""

IN_PIPELINE_KEY = ("checkpoint", "vae", "acceleration", "adapters")
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


class Recipe(BaseModel):
    """Everything that fixes the pixels. Sizes in pixels; `checkpoint` and `vae` are content hashes (sha256, hex)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    task: Literal["txt2img"] = "txt2img"
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

    @field_validator("guidance_scale")
    @classmethod
    def _normal(cls, value: float) -> float:
        return normal(value)

    @field_validator("adapters")
    @classmethod
    def _sorted(cls, value: tuple[AdapterUse, ...]) -> tuple[AdapterUse, ...]:
        return tuple(sorted(value, key=lambda use: (use.hash, use.weight)))

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
        body = self.model_dump(mode="json", exclude_none=True)
        return digest({key: body[key] for key in IN_PIPELINE_KEY if key in body})

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
    return digest({key: value for key, value in body.items() if key not in NOT_IN_LANE})


def adapter_set_of(uses: list[dict[str, Any]]) -> str:
    """The adapter set of style adapters already sorted as a recipe holds them, 32 hex digits; empty for none."""
    return hashlib.sha256(orjson.dumps(uses, option=orjson.OPT_SORT_KEYS)).hexdigest()[:32] if uses else ""


def digest(body: dict[str, Any]) -> str:
    """sha256 of the canonical bytes, shortened to 32 hex digits."""
    return hashlib.sha256(canonical_bytes(body)).hexdigest()[:32]
