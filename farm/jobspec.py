"""One job as a person asks for it: its fields and their ranges."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from farm.fields import MAX_FIELDS, Labels, Moment, Name, NegativePrompt, Prompt, UploadHash, at_most
from farm.formats import Format
from farm.recipe import MAX_FRAMES, MAX_SEED

MAX_COUNT = 10_000
MAX_STEPS = 100
MAX_CONTROLS = 4
MAX_ADAPTERS = 16
MAX_WEIGHT = 10.0

Scheduler = Literal[
    "lcm",
    "ddim",
    "ddpm",
    "deis",
    "dpmpp-2m",
    "dpmpp-2m-karras",
    "dpmpp-2m-sde",
    "euler",
    "euler-a",
    "heun",
    "pndm",
    "unipc",
]
"""`lcm` goes with LCM-LoRA, the others with acceleration none."""


class AdapterSpec(BaseModel):
    """An adapter by name; `weight` within -10..10, 1 if absent."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Name
    weight: Annotated[float, Field(ge=-MAX_WEIGHT, le=MAX_WEIGHT, allow_inf_nan=False)] = 1.0


class ControlSpec(BaseModel):
    """A ControlNet by name and the picture it follows (the hash of an upload). `weight` within 0..2; it acts from the
    share `start` of the denoising steps to the share `end`, all of them if absent."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Name
    image: UploadHash
    weight: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 1.0
    start: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    end: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 1.0


class JobSpec(BaseModel):
    """One job as a person asks for it. What is absent comes from the batch's defaults, then the profile.

    Pictures are named by the hashes of uploads. `strength` says how much of `image` is drawn anew; `mask` where, white
    for anew; `composite` puts the rest back as it was, pixel by pixel. With `motion`, a motion adapter by name, the
    job is one animation of `frames` frames (16 if absent) at `fps` frames a second (8 if absent). `format` is what the
    picture is stored as, `png` if absent. A `webp` keeps every pixel too unless it has a `quality`; that of a `jpeg` is
    90 if absent.
    """

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={
            "examples": [{"prompt": "A single split crack on a concrete wall", "seed": 7, "labels": {"set": "train"}}]
        },
    )

    prompt: Prompt
    negative_prompt: NegativePrompt = ""
    checkpoint: Name | None = None
    adapters: Annotated[
        list[Annotated[AdapterSpec, at_most(MAX_FIELDS)]], at_most(MAX_ADAPTERS), Field(max_length=MAX_ADAPTERS)
    ] = []
    acceleration: Literal["lcm-lora", "none"] = "lcm-lora"
    vae: Name | None = None
    width: Annotated[int, Field(ge=8, le=8192, multiple_of=8)] | None = None
    height: Annotated[int, Field(ge=8, le=8192, multiple_of=8)] | None = None
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=30, allow_inf_nan=False)] | None = None
    scheduler: Scheduler | None = None
    image: UploadHash | None = None
    strength: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    mask: UploadHash | None = None
    composite: bool | None = None
    controls: Annotated[
        list[Annotated[ControlSpec, at_most(MAX_FIELDS)]], at_most(MAX_CONTROLS), Field(max_length=MAX_CONTROLS)
    ] = []
    motion: Name | None = None
    frames: Annotated[int, Field(ge=2, le=MAX_FRAMES)] | None = None
    fps: Annotated[int, Field(ge=1, le=60)] | None = None
    format: Format | None = None
    quality: Annotated[int, Field(ge=1, le=100)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    count: Annotated[int, Field(ge=1, le=MAX_COUNT)] = 1
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    labels: Labels = {}
    run_at: Moment | None = None
    """When it may start; a moment that is past means at once."""
    metadata: bool = True
    """Whether recipe and prompt are written into the picture file."""
