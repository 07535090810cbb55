"""A finished model's folder, as trainers take it that go on from it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextModel, CLIPTokenizer

from workers.training.errors import TrainingError

PARTS = ("unet", "vae", "text_encoder", "tokenizer")


@dataclass(frozen=True, slots=True)
class Finished:
    """The parts of a model, float32, the autoencoder and the text encoder frozen."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text: CLIPTextModel
    tokenizer: CLIPTokenizer
    schedule: DDIMScheduler


def open_finished(folder: Path, purpose: str) -> Finished:
    """The model in `folder`. Raises TrainingError, with the purpose in it, when there is none."""
    if not (folder / "model_index.json").is_file():
        raise TrainingError(f"{folder} is not a model {purpose}: it has no model_index.json")
    try:
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
        vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
        text = CLIPTextModel.from_pretrained(folder / "text_encoder").float()
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        schedule = DDIMScheduler.from_pretrained(folder / "scheduler")
    except (OSError, ValueError) as error:
        raise TrainingError(f"{folder} is not a model {purpose}: {error}") from error
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
