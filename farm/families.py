"""Model families: how a checkpoint's is told from its configuration, and the profile each starts from. No torch.

A family is what adapters are made for: checkpoints of one family have the same layers at the same sizes.
"""

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field

TEMPLATES = Path(__file__).parent / "assets" / "families"
"""The configuration of each known family, as its first publisher's diffusers folder has it, and CLIP's merges."""

KNOWN = ("sd15", "sdxl", "ssd-1b")

PIPELINES = {"StableDiffusionPipeline": "sd", "StableDiffusionXLPipeline": "sdxl"}
"""Pipeline classes that are rendered, and what a family of theirs is called that is none of the known ones."""

GEOMETRY: dict[str, Any] = {
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 1280,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "transformer_layers_per_block": 1,
    "reverse_transformer_layers_per_block": None,
    "in_channels": 4,
    "out_channels": 4,
    "use_linear_projection": False,
    "addition_embed_type": None,
    "projection_class_embeddings_input_dim": None,
}
"""The entries of a UNet's configuration that decide its layers, with diffusers' defaults for absent ones."""

LATENTS = {"sd15": "sd15", "sdxl": "sdxl", "ssd-1b": "sdxl"}
"""Whose latents a family's VAE decodes: SSD-1B is a pruned SDXL and shares its VAEs."""

VAE_SCALES = {0.18215: "sd15", 0.13025: "sdxl"}
"""An AutoencoderKL's scaling_factor tells whose latents it decodes."""

WELL_KNOWN: dict[str, tuple[Literal["vae", "acceleration"], str]] = {
    "latent-consistency/lcm-lora-sdv1-5": ("acceleration", "sd15"),
    "latent-consistency/lcm-lora-sdxl": ("acceleration", "sdxl"),
    "latent-consistency/lcm-lora-ssd-1b": ("acceleration", "ssd-1b"),
    "madebyollin/taesd": ("vae", "sd15"),
    "madebyollin/taesdxl": ("vae", "sdxl"),
    "madebyollin/sdxl-vae-fp16-fix": ("vae", "sdxl"),
    "stabilityai/sd-vae-ft-mse": ("vae", "sd15"),
}
"""Hub repositories whose files do not say what they are for: kind and family."""

Side = Annotated[int, Field(ge=8, le=8192, multiple_of=8)]


class Profile(BaseModel):
    """What a checkpoint is rendered with unless a job says otherwise. Sizes in pixels.

    `acceleration` and `vae` are names; `dtype` is what a GPU whose worker leaves the choice open renders it in.
    """

    model_config = ConfigDict(extra="forbid")

    width: Side | None = None
    height: Side | None = None
    min_size: Side | None = None
    max_size: Side | None = None
    size_multiple: Annotated[int, Field(ge=8, le=512, multiple_of=8)] | None = None
    steps: Annotated[int, Field(ge=1, le=100)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=30, allow_inf_nan=False)] | None = None
    teacher_steps: Annotated[int, Field(ge=1, le=100)] | None = None
    teacher_guidance_scale: Annotated[float, Field(ge=0, le=30, allow_inf_nan=False)] | None = None
    acceleration: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    vae: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    dtype: Literal["float32", "float16", "bfloat16"] | None = None


def _profile(size: int, low: int, high: int, acceleration: str, **more: Any) -> dict[str, Any]:
    return {
        "width": size, "height": size, "min_size": low, "max_size": high, "size_multiple": 8, "steps": 4,
        "guidance_scale": 1.0, "teacher_steps": 25, "teacher_guidance_scale": 7.5, "acceleration": acceleration,
        "dtype": "float16", **more,
    }  # fmt: skip


PROFILES: dict[str, dict[str, Any]] = {
    "sd15": _profile(512, 256, 1024, "lcm-lora-sdv1-5"),
    "sdxl": _profile(1024, 512, 2048, "lcm-lora-sdxl", teacher_guidance_scale=5.0),
    "ssd-1b": _profile(1024, 512, 2048, "lcm-lora-ssd-1b", teacher_guidance_scale=9.0),
}
"""What each known family starts from. The acceleration is the name its LCM-LoRA is expected under."""


def template(family: str) -> dict[str, Any]:
    """The configuration files of a known family, by the folder they stand in; `model_index` is the pipeline's own."""
    found: dict[str, Any] = orjson.loads((TEMPLATES / f"{family}.json").read_bytes())
    return found


def family_of(pipeline: str, unet: Mapping[str, Any]) -> str:
    """The family of a checkpoint by its pipeline class and its UNet's configuration.

    A geometry that is none of the known ones is a family of its own, named after a hash of that geometry.
    """
    geometry = _geometry(unet)
    for known, (kind, expected) in _known().items():
        if kind == pipeline and expected == geometry:
            return known
    mark = hashlib.sha256(orjson.dumps(geometry, option=orjson.OPT_SORT_KEYS)).hexdigest()[:8]
    return f"{PIPELINES[pipeline]}-{mark}"


def profile_of(family: str, pipeline: str, *changes: Mapping[str, Any]) -> dict[str, Any]:
    """The profile of a family, changed by what the folder and then the person who registers it say."""
    base = PROFILES.get(family) or {**PROFILES[{"sd": "sd15", "sdxl": "sdxl"}[PIPELINES[pipeline]]]}
    if family not in PROFILES:
        base = {key: value for key, value in base.items() if key not in {"acceleration", "dtype"}}
    for change in changes:
        base = {**base, **{key: value for key, value in change.items() if value is not None}}
    return base


def latents_of(family: str) -> str:
    """Whose latents a checkpoint of this family makes: the family that its VAEs are registered for."""
    return LATENTS.get(family, family)


def _geometry(unet: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the layers, in one spelling: `2` and `[2, 2]` transformers in a block's two layers are the same,
    and in a block without attention any number is."""
    found = {key: unet.get(key, default) for key, default in GEOMETRY.items()}
    down, up = found["down_block_types"], found["up_block_types"]
    depths = found.pop("transformer_layers_per_block")
    depths = [depths] * len(down) if isinstance(depths, int) else list(depths)
    back = found.pop("reverse_transformer_layers_per_block") or depths[::-1]
    layers = found["layers_per_block"] if isinstance(found["layers_per_block"], int) else max(found["layers_per_block"])

    def spelled(kinds: list[str], numbers: list[Any], count: int) -> list[Any]:
        each = [[one] * count if isinstance(one, int) else one for one in numbers]
        return [numbers if "CrossAttn" in kind else None for kind, numbers in zip(kinds, each, strict=False)]

    return {**found, "down": spelled(down, depths, layers), "up": spelled(up, back, layers + 1)}


@cache
def _known() -> dict[str, tuple[str, dict[str, Any]]]:
    templates = {family: template(family) for family in KNOWN}
    return {
        family: (found["model_index"]["_class_name"], _geometry(found["unet"])) for family, found in templates.items()
    }
