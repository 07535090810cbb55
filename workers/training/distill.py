"""LCM-LoRA distillation: a low-rank adapter that makes a diffusion model finish in a few steps.

The teacher is the same UNet with its adapter switched off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor

from workers.training.errors import TrainingError
from workers.training.loop import Plan, Say, train

TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip

# Clean latents, their text states and the text states of an empty prompt, for one step.
Batch = Callable[[np.random.Generator], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is distilled: `solver` teacher timesteps, guidance `low`..`high` baked in.

    `low` and `high` count from zero as in the paper: w = 2 is a pipeline guidance of 3.
    """

    rank: int = 16
    solver: int = 50
    low: float = 1.0
    high: float = 3.0
    huber: float = 0.001


def boundary(times: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip and c_out of LCMScheduler, shaped to multiply latents.

    >>> skip, out = boundary(torch.tensor([0, 999]))
    >>> skip.flatten().tolist()[0], round(out.flatten().tolist()[1], 4)
    (1.0, 1.0)
    """
    scaled = times.double().view(-1, 1, 1, 1) * 10.0
    spread = scaled.square() + 0.25
    return (0.25 / spread).float(), (scaled / spread.sqrt()).float()


def parts(kind: str, latents: Tensor, guess: Tensor, signal: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Clean latents and noise from what a model of this prediction type says about noisy latents."""
    if kind == "epsilon":
        return (latents - sigma * guess) / signal, guess
    if kind == "v_prediction":
        return signal * latents - sigma * guess, sigma * latents + signal * guess
    raise TrainingError(f"prediction_type {kind!r} cannot be distilled; epsilon and v_prediction can")


def attach(unet: UNet2DConditionModel, rank: int) -> None:
    """Freeze the UNet and give it an untrained adapter of this rank."""
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS)))


def fit(
    unet: UNet2DConditionModel,
    schedule: DDIMScheduler,
    batch: Batch,
    *,
    recipe: Recipe,
    plan: Plan,
    checkpoint: Path,
    bf16: bool = True,
    say: Say = print,
) -> None:
    """Train an adapter on `unet`, in place; the UNet's own weights stay as they are."""
    torch.manual_seed(plan.seed)
    attach(unet, recipe.rank)
    alphas = schedule.alphas_cumprod
    kind = schedule.config.prediction_type
    stride = 1000 // recipe.solver

    def guess_of(latents: Tensor, times: Tensor, states: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            guess: Tensor = unet(latents, times, encoder_hidden_states=states).sample
        return guess.float()

    def roots(times: Tensor) -> tuple[Tensor, Tensor]:
        alpha = alphas[times].view(-1, 1, 1, 1)
        return alpha.sqrt(), (1 - alpha).sqrt()

    def consistent(latents: Tensor, times: Tensor, states: Tensor) -> Tensor:
        signal, sigma = roots(times)
        skip, out = boundary(times)
        clean, _ = parts(kind, latents, guess_of(latents, times, states), signal, sigma)
        return skip * latents + out * clean

    def teach(noisy: Tensor, start: Tensor, end: Tensor, states: Tensor, empty: Tensor) -> Tensor:
        unet.disable_adapters()
        both = guess_of(noisy.repeat(2, 1, 1, 1), start.repeat(2), torch.cat((states, empty)))
        unet.enable_adapters()
        asked, free = both.chunk(2)
        w = torch.empty(len(noisy), 1, 1, 1).uniform_(recipe.low, recipe.high)
        # Guiding the prediction guides clean latents and noise by the same amount: both are linear in it.
        clean, noise = parts(kind, noisy, asked + w * (asked - free), *roots(start))
        signal, sigma = roots(end)
        return signal * clean + sigma * noise

    def step(_: int, rng: np.random.Generator) -> Tensor:
        clean, states, empty = batch(rng)
        start = torch.randint(1, recipe.solver + 1, (len(clean),)) * stride - 1
        end = (start - stride).clamp(min=0)
        signal, sigma = roots(start)
        noisy = signal * clean + sigma * torch.randn_like(clean)
        with torch.no_grad():
            near = teach(noisy, start, end, states, empty)
            target = consistent(near, end, states)
        off = consistent(noisy, start, states) - target
        return ((off.square() + recipe.huber**2).sqrt() - recipe.huber).mean()

    unet.train()
    train(step, {"unet": unet}, plan, checkpoint, say=say)
    unet.eval()
