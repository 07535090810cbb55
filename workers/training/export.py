"""Writes what was trained as files that stock diffusers reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from workers.training.errors import TrainingError
from workers.training.formats import kohya


def export_pipeline(
    folder: Path,
    *,
    vae: AutoencoderKL,
    text: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
    schedule: DDIMScheduler,
) -> None:
    """Write an unmodified StableDiffusionPipeline folder, without a safety checker.

    All weights are stored in fp16. transformers 5 loads a text encoder in the type that its config names, diffusers all
    else in float32, and a pipeline of both types does not run: so the config says float32.
    """
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=schedule,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    unet.to(torch.float16)
    vae.to(torch.float16)
    text.to(torch.float32)
    try:
        pipeline.save_pretrained(folder, safe_serialization=True)
        weights = folder / "text_encoder" / "model.safetensors"
        halves = {name: value.half() for name, value in load_file(weights).items()}
        save_file(halves, weights, metadata={"format": "pt"})
        # The slow-format pair beside tokenizer.json: readers without `tokenizers` need it.
        state = json.loads((folder / "tokenizer" / "tokenizer.json").read_text("utf-8"))
        pairs = [" ".join(p) if isinstance(p, list) else p for p in state["model"]["merges"]]
        vocabulary = json.dumps(state["model"]["vocab"], ensure_ascii=False)
        (folder / "tokenizer" / "vocab.json").write_text(vocabulary, "utf-8")
        lines = "\n".join(["#version: 0.2", *pairs])
        (folder / "tokenizer" / "merges.txt").write_text(lines + "\n", "utf-8")
    # safetensors says "I/O error" with an exception of its own.
    except Exception as error:
        raise TrainingError(f"cannot write the pipeline to {folder}: {error}") from error


def export_lora(path: Path, unet: UNet2DConditionModel, notes: Mapping[str, str]) -> None:
    """Write the adapter of `unet` as one safetensors file that `load_lora_weights` reads.

    What stood there before is replaced only by something whole. Raises TrainingError when it cannot be written.
    """
    tensors = kohya({"lora_unet": unet})
    half = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, half, metadata={"format": "pt", **notes})
        whole = load_file(half).keys() == tensors.keys()
        if whole:
            half.replace(path)
    except Exception as error:
        half.unlink(missing_ok=True)
        raise TrainingError(f"cannot write the adapter to {path}: {error}") from error
    if not whole:
        raise TrainingError(f"{half} did not survive writing")


def export_profile(path: Path, profile: Mapping[str, Any]) -> None:
    """Write how the model wants to be used: family, sizes, steps, guidance."""
    path.write_text(json.dumps(dict(profile), indent=2) + "\n", "utf-8")
