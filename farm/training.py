"""What a training run of an adapter can be told: names, ranges and defaults. The trainers are in `workers.training`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Format = Literal["kohya", "diffusers", "peft"]
Whole = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, le=2**53 - 1)]
Rank = Annotated[int, Field(ge=1, le=512)]

SCHEDULE = 1000
"""Timesteps of noise that Stable Diffusion 1.x, 2.x and SDXL know."""
LCM_SCHEDULE = 50
"""Timesteps that diffusers' LCMScheduler chooses its steps from, unless a checkpoint says otherwise."""
VARIABLE = "FARM_TRAINING"
"""Where the trainers find their options, as JSON."""
FREE = frozenset(
    {
        "checkpoint", "data", "out", "steps", "minutes", "save_every", "sample_every", "sample_prompt", "sample_seed",
        "sample_steps", "sample_guidance", "format", "loaders", "cpu", "devices",
    }
)  # fmt: skip
"""What may change between the beginning of a run and its resumption; contents of checkpoint and data are compared."""


def flag(field: str) -> str:
    """The option of a field.

    >>> flag("save_every")
    '--save-every'
    """
    return f"--{field.replace('_', '-')}"


def unreached(solver: int, timesteps: int = SCHEDULE) -> str:
    """Why a solver of so many timesteps leaves the noisy end of a schedule unlearnt; empty where it does not.

    As in the reference scripts the timesteps are one whole stride apart, counted from the clean end: what is over at
    the noisy end is left out, which is where every sampler starts. Less than a stride of it is no harm.

    >>> unreached(50), unreached(12), unreached(600)
    ('', '', 'the noisiest of 600 timesteps would be 599 of 999, and samplers start at the last; 500 or 1000 would do')
    """
    if _reaches(solver, timesteps):
        return ""
    below = next((str(near) for near in range(min(solver, timesteps), 0, -1) if _reaches(near, timesteps)), "")
    above = next((str(near) for near in range(solver, timesteps + 1) if _reaches(near, timesteps)), "")
    last = solver * (timesteps // solver) - 1
    found = f"the noisiest of {solver} timesteps would be {last} of {timesteps - 1}, and samplers start at the last"
    return f"{found}; {' or '.join(filter(None, (below, above)))} would do"


def _reaches(solver: int, timesteps: int) -> bool:
    return timesteps % solver < timesteps // solver


class Training(BaseModel):
    """Options that every trainer of adapters has. Sizes in pixels, times as named."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    checkpoint: Path = Field(description="The checkpoint: a diffusers folder of Stable Diffusion 1.x, 2.x or SDXL.")
    data: str = Field(
        min_length=1,
        description="A folder of pictures with captions, WebDataset shards (a folder, *.tar, {000..127}.tar), "
        "or painter[:COUNT] for painted walls.",
    )
    out: Path = Field(description="Where adapter, samples and checkpoint go. The same command again resumes there.")
    size: str = Field(
        default="",
        pattern=r"^(\d+(x\d+)?)?$",
        description="WIDTHxHEIGHT or one number, in pixels; by default what the checkpoint was made for.",
    )
    caption_column: str = Field(default="text", min_length=1, description="Column of metadata that holds the caption.")
    crop: Literal["center", "random"] = Field(default="center", description="What to keep of a picture too long.")
    flip: bool = Field(default=False, description="Mirror every other picture, by chance.")
    drop_captions: Share = Field(default=0.0, description="Share of captions replaced by nothing.")
    cache: bool = Field(
        default=False, description="Encode pictures and captions once, into OUT/cache; needs --crop center."
    )

    rank: Rank = Field(default=16, description="Rank of the adapter.")
    alpha: Positive | None = Field(default=None, description="Strength is alpha / rank; by default the rank.")
    target: tuple[str, ...] = Field(default=(), description="A module to adapt instead of the usual ones; repeatable.")

    steps: Whole = Field(default=1000, description="Optimizer steps, resumed ones included.")
    batch: Whole = Field(default=4, description="Pictures per device and pass.")
    accumulate: Whole = Field(default=1, description="Passes per optimizer step.")
    rate: Positive = Field(default=1e-4, description="Learning rate.")
    warmup: Annotated[int, Field(ge=0)] = Field(default=0, description="Steps until the learning rate is reached.")
    decay: Share = Field(default=0.0, description="Share of the steps, at the end, over which the rate falls.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=1e-2, description="Weight decay of AdamW.")
    clip: Positive = Field(default=1.0, description="Largest norm of the gradient.")
    seed: Seed = Field(default=0, description="Fixes order, crops and noise.")

    precision: Literal["auto", "no", "bf16", "fp16"] = Field(
        default="auto", description="Mixed precision; auto is bf16 where a GPU has it, fp16 on older ones, no on a CPU."
    )
    gradient_checkpointing: bool = Field(default=False, description="Less memory for about a third more time.")
    devices: Whole = Field(default=1, description="Devices of this machine to train on.")
    cpu: bool = Field(default=False, description="Train on the CPU although there is a GPU.")
    loaders: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Extra processes that read pictures, per device."
    )

    save_every: Whole = Field(default=200, description="Steps between checkpoints.")
    minutes: Positive | None = Field(default=None, description="Stop after so many minutes; the same command goes on.")
    sample_every: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Steps between contact sheets; 0 for none."
    )
    sample_prompt: tuple[str, ...] = Field(default=(), description="A prompt of the contact sheets; repeatable.")
    sample_seed: Seed = Field(default=0, description="Seed of the first prompt.")
    # Schedulers that begin one timestep later than 0, as those of SD 1.x, have one less than all.
    sample_steps: Annotated[int, Field(ge=1, lt=SCHEDULE)] = Field(
        default=25, description="Denoising steps of a sample."
    )
    sample_guidance: Annotated[float, Field(ge=1)] = Field(default=5.0, description="Guidance of a sample; 1 is none.")
    format: tuple[Format, ...] = Field(default=("kohya",), description="kohya, diffusers or peft; repeatable.")

    @property
    def strength(self) -> float:
        """Alpha, which is the rank unless it was given."""
        return float(self.rank if self.alpha is None else self.alpha)

    @property
    def pixels(self) -> tuple[int, int] | None:
        """Width and height, if they were given.

        >>> made = Training(checkpoint="a", data="b", out="c", size="768x512")
        >>> made.pixels, made.model_copy(update={"size": "64"}).pixels, made.model_copy(update={"size": ""}).pixels
        ((768, 512), (64, 64), None)
        """
        if not self.size:
            return None
        width, _, height = self.size.partition("x")
        return int(width), int(height or width)

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.cache and self.crop == "random":
            raise ValueError("a cache holds one crop of each picture: leave out cache, or choose crop center")
        if self.sample_every and not self.sample_prompt:
            raise ValueError("contact sheets need a prompt: give sample-prompt, or leave out sample-every")
        if not self.format:
            raise ValueError("choose at least one format")
        return self


class LcmLora(Training):
    """LCM-LoRA distillation: the checkpoint in a few steps without guidance."""

    kind: Literal["lcm-lora"] = "lcm-lora"
    rank: Rank = Field(default=64, description="Rank of the adapter.")
    solver: Annotated[int, Field(ge=4, le=SCHEDULE)] = Field(
        default=50, description="Timesteps of the teacher's DDIM solver."
    )
    guidance_low: Annotated[float, Field(ge=0)] | None = Field(
        default=None,
        description="Least guidance baked in, counted from 0: 3 is a pipeline guidance of 4. By default 5, SDXL 3.",
    )
    guidance_high: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="Most guidance; by default 15."
    )
    loss: Literal["huber", "l2"] = Field(default="huber", description="Pseudo-Huber, or the mean square.")
    huber_c: Positive = Field(default=0.001, description="Where pseudo-Huber turns from square to linear.")
    sample_steps: Annotated[int, Field(ge=1, le=LCM_SCHEDULE)] = Field(
        default=4, description="Denoising steps of a sample."
    )
    sample_guidance: Annotated[float, Field(ge=1)] = Field(default=1.0, description="Guidance of a sample; 1 is none.")

    @model_validator(mode="after")
    def _range(self) -> Self:
        low, high = self.guidance_low, self.guidance_high
        if low is not None and low > (15.0 if high is None else high):
            raise ValueError(f"guidance-low {low:g} is over guidance-high {15.0 if high is None else high:g}")
        if high is not None and low is None:
            raise ValueError("guidance-high needs guidance-low beside it")
        return self

    @model_validator(mode="after")
    def _noise(self) -> Self:
        if wrong := unreached(self.solver):
            raise ValueError(f"solver {self.solver}: {wrong}")
        return self


class StyleLora(Training):
    """Style LoRA training: the loss of diffusers' text-to-image LoRA script."""

    kind: Literal["lora"] = "lora"
    snr_gamma: Positive | None = Field(
        default=None, description="Min-SNR weighting (Hang et al. 2023), usually 5; none unless given."
    )
    noise_offset: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0, description="Noise added to whole channels, such as 0.05: darker and brighter pictures."
    )
    train_text: bool = Field(default=False, description="Adapt the text encoders too.")

    @model_validator(mode="after")
    def _text_moves(self) -> Self:
        if self.cache and self.train_text:
            raise ValueError("captions cannot be cached while text encoders learn: leave out cache or train-text")
        return self
