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

from farm.training import unreached
from workers.training.errors import TrainingError
from workers.training.loop import Plan, Say, train

TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Lesson:
    """What one step learns from: latents (n, c, h, w), the text states of captions and of none (n, 77, width),
    and how much each place counts (n, 1, h, w); without it all count alike."""

    clean: Tensor
    told: Tensor
    untold: Tensor
    importance: Tensor | None = None


Batch = Callable[[np.random.Generator], Lesson]


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is distilled: `solver` teacher timesteps, guidance `low`..`high` baked in.

    `low` and `high` count from zero as in the paper: w = 2 is a pipeline guidance of 3. `skip` is how many of the
    solver's timesteps the teacher jumps at once. What is right near the clean end reaches the noisy one jump by jump,
    so a teacher that is as good in a dozen steps teaches four times as fast in jumps of four.
    """

    rank: int = 16
    solver: int = 50
    skip: int = 1
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


@dataclass(frozen=True, slots=True)
class Solver:
    """A DDIM solver that skips: `steps` of the schedule's timesteps, evenly spaced, `skip` of them a jump.

    `alphas` (timesteps,) are cumulative products in host memory, `kind` is the prediction type. Raises TrainingError
    for so many steps that the noisy end of the schedule would be left out.
    """

    alphas: Tensor
    kind: str
    steps: int
    skip: int = 1

    def __post_init__(self) -> None:
        if wrong := unreached(self.steps, len(self.alphas)):
            raise TrainingError(f"solver {self.steps}: {wrong}")

    def starts(self, count: int) -> Tensor:
        """So many of its timesteps (count,) by chance, by torch's host generator: where a step begins."""
        return torch.randint(1, self.steps + 1, (count,)) * self.stride - 1

    @property
    def stride(self) -> int:
        return len(self.alphas) // self.steps

    def roots(self, times: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise levels at host timesteps (n,), shaped to multiply latents, on the device of `like`."""
        alpha = self.alphas[times].view(-1, 1, 1, 1)
        return alpha.sqrt().to(like.device), (1 - alpha).sqrt().to(like.device)


@dataclass(frozen=True, slots=True)
class Draw:
    """What is random in a step: host timesteps `start` (n,), `noise` like the latents, `guidance` (n, 1, 1, 1)."""

    start: Tensor
    noise: Tensor
    guidance: Tensor


def consistency(
    solver: Solver,
    clean: Tensor,
    draw: Draw,
    student: Callable[[Tensor, Tensor], Tensor],
    teacher: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """What the student makes of noisy latents, and what it should: its own answer one solver step nearer to clean.

    LCM-LoRA (Luo et al. 2023). `student(latents, times)` predicts, and is asked for the target without a gradient;
    `teacher` predicts with and without the prompt. Times are host tensors.
    """

    def consistent(latents: Tensor, times: Tensor) -> Tensor:
        signal, sigma = solver.roots(times, latents)
        skip, out = (each.to(latents.device) for each in boundary(times))
        x0, _ = parts(solver.kind, latents, student(latents, times), signal, sigma)
        return skip * latents + out * x0

    end = (draw.start - solver.skip * solver.stride).clamp(min=0)
    signal, sigma = solver.roots(draw.start, clean)
    noisy = signal * clean + sigma * draw.noise
    with torch.no_grad():
        asked, free = teacher(noisy, draw.start)
        # Guiding the prediction guides clean latents and noise by the same amount: both are linear in it.
        x0, noise = parts(solver.kind, noisy, asked + draw.guidance * (asked - free), signal, sigma)
        nearer, left = solver.roots(end, clean)
        target = consistent(nearer * x0 + left * noise, end)
    return consistent(noisy, draw.start), target


def huber(made: Tensor, target: Tensor, turn: float, weight: Tensor | None = None) -> Tensor:
    """Pseudo-Huber loss: square below `turn`, linear above. `weight` is broadcast to what was made."""
    off = made - target
    each = (off.square() + turn**2).sqrt() - turn
    return (each if weight is None else each * weight).mean()


def attach(unet: UNet2DConditionModel, rank: int) -> None:
    """Freeze the UNet and give it an untrained adapter of this rank."""
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS)))


def learning(
    unet: UNet2DConditionModel, schedule: DDIMScheduler, batch: Batch, recipe: Recipe, *, bf16: bool = True
) -> Callable[[np.random.Generator], Tensor]:
    """The loss of one step, for a UNet that carries an adapter.

    A loss that is linear in the error learns the median, and of a line a pixel wide that may lie here or there the
    median is no line. So places that count more do so by how little noise there is, as they did for the teacher.
    """
    solver = Solver(schedule.alphas_cumprod, schedule.config.prediction_type, recipe.solver, recipe.skip)

    def guess_of(latents: Tensor, times: Tensor, states: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            guess: Tensor = unet(latents, times, encoder_hidden_states=states).sample
        return guess.float()

    def loss(rng: np.random.Generator) -> Tensor:
        lesson = batch(rng)
        clean = lesson.clean

        def student(latents: Tensor, times: Tensor) -> Tensor:
            return guess_of(latents, times, lesson.told)

        def teacher(latents: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
            unet.disable_adapters()
            both = guess_of(latents.repeat(2, 1, 1, 1), times.repeat(2), torch.cat((lesson.told, lesson.untold)))
            unet.enable_adapters()
            asked, free = both.chunk(2)
            return asked, free

        draw = Draw(
            start=solver.starts(len(clean)),
            noise=torch.randn_like(clean),
            guidance=torch.empty(len(clean), 1, 1, 1).uniform_(recipe.low, recipe.high),
        )
        made, target = consistency(solver, clean, draw, student, teacher)
        if lesson.importance is None:
            return huber(made, target, recipe.huber)
        alpha = solver.alphas[draw.start].view(-1, 1, 1, 1)
        return huber(made, target, recipe.huber, 1 + (lesson.importance - 1) * alpha.square())

    return loss


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
    loss = learning(unet, schedule, batch, recipe, bf16=bf16)
    unet.train()
    train(lambda _, rng: loss(rng), {"unet": unet}, plan, checkpoint, say=say)
    unet.eval()
