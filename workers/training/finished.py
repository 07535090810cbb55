"""A finished model's folder, as trainers take it that go on from it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextModel, CLIPTokenizer

from farm.errors import InvalidModel
from farm.modelfiles import read_json
from workers.training import diffusion
from workers.training.errors import TrainingError

PARTS = ("unet", "vae", "text_encoder", "tokenizer")
KINDS = ("epsilon", "v_prediction")
HALVINGS = 3
"""How often the autoencoder halves a picture: trainers paint walls of 8 pixels for each place of the grid."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The parts of a model, float32, the autoencoder and the text encoder frozen."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text: CLIPTextModel
    tokenizer: CLIPTokenizer
    schedule: DDIMScheduler


def check_finished(folder: Path, purpose: str) -> None:
    """Refuse what is not of the family of `crack-tiny`, by its configurations alone: before work that would be lost.

    How wide the networks are is free. Raises TrainingError with the purpose, what was found and what would be right.
    """
    if not (folder / "model_index.json").is_file():
        raise TrainingError(f"{folder} is not a crack-tiny {purpose}: it has no model_index.json")
    size = diffusion.Size()
    right: dict[str, dict[str, Any]] = {
        "model_index.json": {"_class_name": "StableDiffusionPipeline"},
        "unet/config.json": {
            "_class_name": "UNet2DConditionModel",
            "in_channels": size.latent,
            "out_channels": size.latent,
            "sample_size": size.grid,
            # SD 1.x has none here, and SDXL "text_time": what the words say would reach nothing.
            "addition_embed_type": "text",
        },
        "vae/config.json": {"_class_name": "AutoencoderKL", "latent_channels": size.latent},
        "text_encoder/config.json": {"model_type": "clip_text_model"},
        "scheduler/scheduler_config.json": {},
    }
    try:
        found = {name: read_json(folder / name) for name in right}
    except (InvalidModel, OSError) as error:
        raise TrainingError(f"{folder} is not a crack-tiny {purpose}: {error}") from error
    wrong = [
        f"{name}: {entry} is {found[name].get(entry)!r}, not {wanted!r}"
        for name, entries in right.items()
        for entry, wanted in entries.items()
        if found[name].get(entry) != wanted
    ]
    if wrong := wrong or _unfitting(found):
        raise TrainingError(f"{folder} is not a crack-tiny {purpose}: {'; '.join(wrong)}")


def _unfitting(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What of these configurations does not go together."""
    widths = found["vae/config.json"].get("block_out_channels")
    width = found["unet/config.json"].get("cross_attention_dim")
    states = found["text_encoder/config.json"].get("hidden_size")
    kind = found["scheduler/scheduler_config.json"].get("prediction_type", "epsilon")
    wrong = []
    if not isinstance(widths, list) or len(widths) != HALVINGS + 1:
        wrong.append(f"vae/config.json: block_out_channels is {widths!r}, not {HALVINGS + 1} numbers")
    if width != states:
        wrong.append(f"unet/config.json: cross_attention_dim is {width!r}, not the text encoder's {states!r}")
    if kind not in KINDS:
        wrong.append(f"scheduler/scheduler_config.json: prediction_type is {kind!r}, not {' or '.join(KINDS)}")
    return wrong


def open_finished(folder: Path, purpose: str) -> Finished:
    """The model in `folder`. Raises TrainingError, with the purpose in it, when there is none of this family."""
    check_finished(folder, purpose)
    try:
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
        vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
        text = CLIPTextModel.from_pretrained(folder / "text_encoder").float()
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        schedule = DDIMScheduler.from_pretrained(folder / "scheduler")
    except (OSError, ValueError) as error:
        raise TrainingError(f"{folder} is not a crack-tiny {purpose}: {error}") from error
    # As in the base training: the backward pass of torch's fused attention is slow on CPUs.
    unet.set_attn_processor(AttnProcessor())
    unet.to(memory_format=torch.channels_last)
    return Finished(unet, vae.requires_grad_(False).eval(), text.requires_grad_(False).eval(), tokenizer, schedule)


def mark(folder: Path, *also: object, beside: Sequence[str] = ()) -> str:
    """Twelve letters that only these weights have, with files `beside` the parts and what `also` says.

    What is in a working folder is named after it, so that work on another model is never continued by mistake.
    """
    paths = [path for part in PARTS for path in (folder / part).glob("*.*")] + [folder / name for name in beside]
    sums = [f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in sorted(paths)]
    return hashlib.sha256(f"{sums} {also}".encode()).hexdigest()[:12]
