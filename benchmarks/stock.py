"""A model folder as stock diffusers runs it: its LCM-LoRA and style fused in, or the plain teacher with DDIM."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline
from numpy.typing import NDArray

TOGETHER = 8
"""Pictures in one micro-batch."""
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
LCM = "lcm-lora.safetensors"


@dataclass(frozen=True, slots=True)
class Way:
    """One way to make a picture. `style` is the weight of the folder's style adapter, 0 for none."""

    lcm: bool
    steps: int
    guidance: float = 1.0
    style: float = 0.0

    @property
    def passes(self) -> int:
        """How often the UNet sees a picture: guidance asks it twice a step."""
        return self.steps * (2 if self.guidance > 1 else 1)

    @property
    def name(self) -> str:
        """Short, unlike any other, and fit for a file name.

        >>> Way(False, 50, 3.0).name, Way(True, 4, style=0.5).name
        ('ddim-50-guided', 'lcm-4-style-0.5')
        """
        name = f"{'lcm' if self.lcm else 'ddim'}-{self.steps}"
        return name + ("-guided" if self.guidance > 1 else "") + (f"-style-{self.style:g}" if self.style else "")


def model_key(folder: Path, lcm: bool = True) -> str:
    """A hash over everything in the folder that decides pixels without a style; without LCM-LoRA too, if not `lcm`."""
    paths = [path for part in PARTS for path in (folder / part).glob("*.*")] + ([folder / LCM] if lcm else [])
    sums = [f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in sorted(paths)]
    return hashlib.sha256("\n".join(sums).encode()).hexdigest()[:16]


def style_of(folder: Path) -> Path | None:
    """The style adapter of a model folder, if it has one."""
    return next(iter(sorted(folder.glob("style-*.safetensors"))), None)


class Renderer:
    """Renders prompts with a model folder on one device, in float32."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.folder, self.device = folder, device
        # Their bars and remarks about parts that are not needed would bury what this program says.
        for library in (diffusers, transformers):
            library.utils.logging.set_verbosity_error()
            library.utils.logging.disable_progress_bar()
        self._pipes: dict[tuple[bool, float], Any] = {}

    def _pipe(self, way: Way) -> Any:
        kind = (way.lcm, way.style)
        if kind not in self._pipes:
            pipe = StableDiffusionPipeline.from_pretrained(self.folder, safety_checker=None, local_files_only=True)
            pipe.set_progress_bar_config(disable=True)
            weights = {"lcm": 1.0} if way.lcm else {}
            if way.lcm:
                pipe.load_lora_weights(self.folder, weight_name=LCM, adapter_name="lcm")
            if way.style:
                style = style_of(self.folder)
                assert style is not None, f"{self.folder} has no style adapter"
                with warnings.catch_warnings():
                    # peft wonders at a second adapter; two at once is what is wanted here.
                    warnings.filterwarnings("ignore", message="Already found a `peft_config`")
                    pipe.load_lora_weights(self.folder, weight_name=style.name, adapter_name="style")
                weights["style"] = way.style
            if weights:
                pipe.set_adapters(list(weights), list(weights.values()))
                pipe.fuse_lora(adapter_names=list(weights))
                pipe.unload_lora_weights()
            scheduler = LCMScheduler if way.lcm else DDIMScheduler
            pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
            self._pipes[kind] = pipe.to(self.device)
        return self._pipes[kind]

    @torch.no_grad()
    def reconstruct(self, pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Pictures (n, h, w, 3) through the autoencoder and back: what the model could draw at best."""
        vae = self._pipe(Way(True, 4)).vae
        parts = []
        for start in range(0, len(pictures), TOGETHER):
            part = torch.from_numpy(pictures[start : start + TOGETHER]).permute(0, 3, 1, 2).to(self.device)
            made = vae.decode(vae.encode(part.float() / 127.5 - 1).latent_dist.mean).sample
            parts.append(((made.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy())
        return np.concatenate(parts)

    def render(self, texts: Sequence[str], seeds: Sequence[int], way: Way) -> tuple[NDArray[np.uint8], list[float]]:
        """Pictures uint8 (n, h, w, 3) and, for each micro-batch, the seconds one picture of it took.

        Every picture has a generator of its own, on the CPU, so neighbours do not change it.
        """
        pipe = self._pipe(way)
        parts, took = [], []
        for at in range(0, len(texts), TOGETHER):
            part = list(texts[at : at + TOGETHER])
            started = time.perf_counter()
            made = pipe(
                part,
                num_inference_steps=way.steps,
                guidance_scale=way.guidance,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[at : at + TOGETHER]],
                output_type="np",
            ).images
            took.append((time.perf_counter() - started) / len(part))
            parts.append((made * 255).round().astype(np.uint8))
        return np.concatenate(parts), took
