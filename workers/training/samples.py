"""Contact sheets while a run goes on: fixed prompts and seeds, so that one sheet can be held against another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image

from farm.cli.contact_sheet import draw
from farm.training import Training
from workers.training.base import Base
from workers.training.errors import TrainingError, why


def sheet(path: Path, base: Base, options: Training, size: tuple[int, int], accelerator: Accelerator) -> None:
    """Render the prompts with the adapter as it is now and write them as one PNG. Raises TrainingError."""
    pipeline = _pipeline(base, lcm=options.model_dump().get("kind") == "lcm-lora")
    network = base.network
    made = []
    where = base.vae.device
    base.move_helpers(accelerator.device)
    network.eval()
    with torch.no_grad(), accelerator.autocast():
        for number, prompt in enumerate(options.sample_prompt):
            latents = pipeline(
                prompt,
                width=size[0],
                height=size[1],
                num_inference_steps=options.sample_steps,
                guidance_scale=options.sample_guidance,
                generator=torch.Generator("cpu").manual_seed(options.sample_seed + number),
                output_type="latent",
            ).images
            made.append((_picture(base, latents), prompt))
    network.train()
    base.move_helpers(where)
    half = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(made).save(half, "PNG")
        half.replace(path)
    except OSError as error:
        half.unlink(missing_ok=True)
        raise TrainingError(f"cannot write the contact sheet {path}: {why(error)}") from error


def _picture(base: Base, latents: torch.Tensor) -> Image.Image:
    """Decoded in float32: half precision overflows in the autoencoder of SDXL."""
    with torch.autocast(latents.device.type, enabled=False):
        pixels = base.vae.decode(latents.float() / base.vae.config.scaling_factor).sample[0]
    shown = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().nan_to_num().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(shown.astype(np.uint8))


def _pipeline(base: Base, *, lcm: bool) -> Any:
    """A stock pipeline over the very modules that are trained."""
    schedule = (LCMScheduler if lcm else DDIMScheduler).from_config(base.pipeline.scheduler_config)
    first = base.pipeline.encoders[0]
    common = {
        "vae": base.vae,
        "unet": base.network.unet,
        "scheduler": schedule,
        "tokenizer": first.tokenizer,
        "text_encoder": first.model,
        "feature_extractor": None,
    }
    if base.xl:
        second = base.pipeline.encoders[1]
        made = StableDiffusionXLPipeline(
            **common,
            tokenizer_2=second.tokenizer,
            text_encoder_2=second.model,
            force_zeros_for_empty_prompt=base.pipeline.zero_empty_negative,
            add_watermarker=False,
        )
    else:
        made = StableDiffusionPipeline(**common, safety_checker=None, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made
