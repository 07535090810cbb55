"""Sharpening an LCM-LoRA: a reader who knows real latents says whether what the adapter makes shows what was asked for.

A consistency loss compares the student with itself one jump nearer to clean, on noisy versions of real latents. Two
things are left. It learns the median of what could be there, and of a line a pixel wide the median is no line; and
from the second step on a sampler starts from what the student drew, not from real latents. So the student walks its
own steps, and what one of them ends in is read; the reader's error goes back into the adapter (Li et al. 2024,
"Reward Guided Latent Consistency Distillation", with a classifier of the latents as the reward).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, LCMScheduler, UNet2DConditionModel
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from workers.training.distill import boundary, parts
from workers.training.errors import TrainingError
from workers.training.loop import Average, Plan, Say, train

UNKNOWN = -100
"""The answer to a question that a caption leaves open: no loss."""
ANY = -101
"""The answer to a question of which a caption leaves open how, not whether, it is answered: see Even."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What one step asks the student for: the text states of captions (n, 77, width) and, for each question, the number
    of the answer that each caption gives (n,), UNKNOWN or ANY."""

    told: Tensor
    answers: Mapping[str, Tensor]


Trial = Callable[[np.random.Generator], Asked]


@dataclass(frozen=True, slots=True)
class Sharpening:
    """`walks` are the numbers of steps the student is asked for, one drawn each time; `blur` is the highest timestep
    to which latents are noised before they are read, so that only what stands out counts; `weight` is the reader's
    say beside the loss of distillation, which every `anchored`th step adds; `emphasis` says of a question how many
    times it counts, once unless it is there; `deep` is the number of last steps that answer for what is read: with
    two, a step also learns to leave what the next one can make something of; `remembered` is the number of pictures,
    of those with ANY answer, among which each has to be there: the more, the later it is seen to."""

    walks: tuple[int, ...] = (2, 4, 4, 8)
    blur: int = 250
    weight: float = 0.02
    anchored: int = 2
    emphasis: Mapping[str, float] = field(default_factory=dict)
    deep: int = 1
    remembered: int = 64


class Block(nn.Module):
    """A residual block that is told how noisy its input is."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, before)
        self.first = nn.Conv2d(before, after, 3, padding=1)
        self.level = nn.Linear(1, after)
        self.second = nn.Conv2d(after, after, 3, padding=1)
        self.past = nn.Conv2d(before, after, 1)

    def forward(self, features: Tensor, noise: Tensor) -> Tensor:
        inner = self.first(functional.silu(self.norm(features))) + self.level(noise)[:, :, None, None]
        made: Tensor = self.past(features) + self.second(functional.silu(inner))
        return made


class Reader(nn.Module):
    """Answers questions about latents (n, channels, h, w) with so much noise in them as a share of one (n, 1).

    `kinds` says how many answers each question has; the logits are (n, answers).
    """

    def __init__(self, channels: int, kinds: Mapping[str, int], sizes: tuple[int, ...] = (96, 160, 224)) -> None:
        super().__init__()
        self.kinds = dict(kinds)
        self.enter = nn.Conv2d(channels, sizes[0], 3, padding=1)
        self.blocks = nn.ModuleList(
            Block(before, after) for before, after in zip((sizes[0], *sizes), sizes, strict=False)
        )
        self.norm = nn.GroupNorm(8, sizes[-1])
        # The strongest place beside the mean: a crack is where it is and nowhere else.
        self.heads = nn.ModuleDict({name: nn.Linear(sizes[-1] * 2, count) for name, count in kinds.items()})

    def forward(self, latents: Tensor, noise: Tensor) -> dict[str, Tensor]:
        features = self.enter(latents)
        for number, block in enumerate(self.blocks):
            features = block(functional.avg_pool2d(features, 2) if number else features, noise)
        features = functional.silu(self.norm(features))
        seen = torch.cat((features.mean((2, 3)), features.amax((2, 3))), 1)
        return {name: head(seen) for name, head in self.heads.items()}


Logits = Mapping[str, Tensor]
"""What a reader answers: for each question (n, answers)."""


class Even:
    """Sees to it that ANY of two answers does not become the same one always.

    An adapter that is asked to be sure of something finds one thing easiest, and soon draws nothing else. So where less
    than `LEAST` of what first steps drew lately is one answer, those that were nearest to it are asked for it, as many
    as are missing (pseudo-labels balanced over a queue, after Caron et al. 2020, arXiv 2006.09882). As long as there is
    enough of both, a picture is asked to be what it is: half of all would turn pictures around again and again, and
    what turns is drawn half the one and half the other. Later steps are asked to go on with what the step before drew.
    """

    LEAST = 0.4

    def __init__(self, names: Iterable[str], remembered: int) -> None:
        self.remembered = remembered
        self.values = {name: torch.zeros(0) for name in names}

    def update(self, step: int) -> None:
        """Nothing happens between steps."""

    def settle(self, answers: Mapping[str, Tensor], first: Logits, before: Logits | None) -> dict[str, Tensor]:
        """`answers` (n,) with the right ones where ANY is, of two. `first` was read in what the first step drew,
        `before` in what the step before the last one did; None while the first step itself learns."""
        settled = {}
        for name, wanted in answers.items():
            free = wanted == ANY
            even = self._balanced(name, first[name], free) if free.any() else wanted
            settled[name] = torch.where(free, even if before is None else before[name].argmax(1), wanted)
        return settled

    def shares(self) -> dict[str, float]:
        """Of what first steps drew lately, how much was the second answer (0 to 1)."""
        return {name: float((values > 0.0).float().mean()) for name, values in self.values.items() if len(values)}

    def _balanced(self, name: str, logits: Tensor, asked: Tensor) -> Tensor:
        surer = (logits[:, 1] - logits[:, 0]).detach().float()
        self.values[name] = torch.cat((self.values[name], surer[asked]))[-self.remembered :]
        low, high = (float(torch.quantile(self.values[name], share)) for share in (self.LEAST, 1.0 - self.LEAST))
        return (surer > min(max(0.0, low), high)).long()


def read(reader: Reader, latents: Tensor, alphas: Tensor, blur: int) -> Logits:
    """The reader's logits (n, answers) to each question, of latents that are noised up to the timestep `blur` first."""
    alpha = alphas[torch.randint(0, blur, (len(latents),))].view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * torch.randn_like(latents)
    found: Logits = reader(noisy, (1 - alpha).sqrt().view(-1, 1))
    return found


def misread(logits: Logits, answers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The cross-entropy in each question of which an answer is right."""
    lost = {}
    for name, right in answers.items():
        # A batch whose captions all leave it open has a loss of nothing, not of nothing divided by nothing.
        total = functional.cross_entropy(logits[name], right, ignore_index=UNKNOWN, reduction="sum")
        lost[name] = total / (right != UNKNOWN).sum().clamp(min=1)
    return lost


def _mean(found: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([each[name] for each in found]).mean(0) for name in found[0]}


def content(latents: NDArray[np.float16], labels: Mapping[str, NDArray[np.int64]]) -> str:
    """Twelve letters that only these latents with these answers have."""
    found = sha256(latents.data)
    for name in sorted(labels):
        found.update(name.encode())
        found.update(np.ascontiguousarray(labels[name]).data)
    return found.hexdigest()[:12]


def learn_to_read(
    reader: Reader,
    latents: NDArray[np.float16],
    labels: Mapping[str, NDArray[np.int64]],
    alphas: Tensor,
    *,
    blur: int,
    plan: Plan,
    checkpoint: Path,
    batch: int = 64,
    bf16: bool = True,
    say: Say = print,
) -> None:
    """Teach the reader, in place, real latents (n, c, h, w) and the right answers about them (n,)."""
    if any(len(answers) != len(latents) for answers in labels.values()):
        raise TrainingError(f"{len(latents)} latents need as many answers to each question")

    def step(_: int, rng: np.random.Generator) -> Tensor:
        chosen = rng.integers(0, len(latents), batch)
        clean = torch.from_numpy(latents[chosen].astype(np.float32))
        right = {name: torch.from_numpy(answers[chosen]) for name, answers in labels.items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            lost = misread(read(reader, clean, alphas, blur), right)
        return torch.stack(list(lost.values())).sum()

    average = Average(reader)
    reader.train()
    train(step, {"reader": reader}, plan, checkpoint, averages={"reader": average}, say=say)
    average.settle()
    reader.requires_grad_(False).eval()


class Student:
    """A UNet with its adapter, walking the steps of LCMScheduler on its own."""

    def __init__(self, unet: UNet2DConditionModel, schedule: DDIMScheduler, *, bf16: bool) -> None:
        self.unet, self.bf16 = unet, bf16
        self.alphas: Tensor = schedule.alphas_cumprod
        self.kind: str = schedule.config.prediction_type
        self.sampler = LCMScheduler.from_config(schedule.config)

    def answer(self, latents: Tensor, at: int, told: Tensor) -> Tensor:
        """Clean latents as the student sees them behind latents of timestep `at`."""
        times = torch.full((len(latents),), at)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            guess = self.unet(latents, times, encoder_hidden_states=told).sample.float()
        skip, out = boundary(times)
        alpha = self.alphas[at]
        x0, _ = parts(self.kind, latents, guess, alpha.sqrt(), (1 - alpha).sqrt())
        return skip * latents + out * x0

    def walk(self, told: Tensor, like: Tensor, steps: int, stop: int, deep: int = 1) -> list[Tensor]:
        """Clean latents as seen in steps 0 to `stop` of `steps`; only the last `deep` of them have a gradient."""
        self.sampler.set_timesteps(steps, original_inference_steps=50)
        times = [int(t) for t in self.sampler.timesteps]
        latents, seen = torch.randn_like(like), []
        for number in range(stop + 1):
            with torch.set_grad_enabled(torch.is_grad_enabled() and number > stop - deep):
                seen.append(self.answer(latents, times[number], told))
                if number < stop:
                    alpha = self.alphas[times[number + 1]]
                    latents = alpha.sqrt() * seen[-1] + (1 - alpha).sqrt() * torch.randn_like(latents)
        return seen


def fit(
    unet: UNet2DConditionModel,
    schedule: DDIMScheduler,
    trial: Trial,
    anchor: Callable[[np.random.Generator], Tensor],
    readers: Sequence[Reader],
    *,
    shape: tuple[int, ...],
    recipe: Sharpening,
    plan: Plan,
    checkpoint: Path,
    bf16: bool = True,
    say: Say = print,
) -> None:
    """Train the adapter that `unet` carries, in place, and leave its averaged weights there.

    `shape` (c, h, w) is that of one picture's latents. What several readers find counts alike: one alone is pleased in
    the end with pictures in which others find something else (Coste et al. 2024, "Reward Model Ensembles Help Mitigate
    Overoptimization"). `anchor` is the loss the adapter was distilled with: it holds
    what the reader does not ask for.
    """
    student = Student(unet, schedule, bf16=bf16)
    errors: dict[str, float] = {}
    even = Even(readers[0].kinds, recipe.remembered)

    def found(latents: Tensor) -> list[Logits]:
        return [read(reader, latents, student.alphas, recipe.blur) for reader in readers]

    @torch.no_grad()
    def read_quietly(latents: Tensor) -> Logits:
        return _mean(found(latents))

    def step(number: int, rng: np.random.Generator) -> Tensor:
        asked = trial(rng)
        steps = int(rng.choice(recipe.walks))
        stop = int(rng.integers(steps))
        seen = student.walk(asked.told, torch.empty(len(asked.told), *shape), steps, stop, recipe.deep)
        before = read_quietly(seen[-2]) if stop >= recipe.deep else None
        right = even.settle(asked.answers, read_quietly(seen[0]), before)
        lost = _mean([misread(logits, right) for logits in found(seen[-1])])
        for name, error in lost.items():
            errors[name] = 0.98 * errors.get(name, float(error.detach())) + 0.02 * float(error.detach())
        if number % 100 == 99:
            say("misread: " + ", ".join(f"{name} {error:.3f}" for name, error in errors.items()))
            for name, share in even.shares().items():
                say(f"{name}: {share:.2f} of what first steps drew is the second answer")
        counted = [error * recipe.emphasis.get(name, 1.0) for name, error in lost.items()]
        total = recipe.weight * torch.stack(counted).sum()
        return total + anchor(rng) if number % recipe.anchored == 0 else total

    average = Average(unet)
    unet.train()
    train(step, {"unet": unet}, plan, checkpoint, averages={"unet": average, "even": even}, say=say)
    average.settle()
    unet.eval()
