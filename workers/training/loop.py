"""One loop for every stage: step, log, checkpoint, stop, resume.

Resuming gives the weights of a run that never stopped, because every random number of a step comes
from (seed, step) and the checkpoint holds everything else: weights, averages, optimizer, step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from workers.training.errors import TrainingError, UnfinishedError

Step = Callable[[int, np.random.Generator], Tensor]
Say = Callable[[str], None]


@dataclass(slots=True)
class Plan:
    """How long and how fast to train.

    `steps` counts optimizer steps from the very beginning, resumed ones included. The learning
    rate warms up, stays, and falls to a twentieth over the last `decay` share of the steps. `settings` are what else
    decides the result: a checkpoint that was made with others is not gone on with.
    """

    steps: int
    rate: float
    seed: int = 0
    warmup: int = 100
    decay: float = 0.3
    clip: float = 1.0
    save_every: int = 200
    say_every: int = 50
    minutes: float = math.inf
    settings: Mapping[str, Any] = field(default_factory=dict)

    def rate_at(self, step: int) -> float:
        """The learning rate of a step.

        >>> plan = Plan(steps=1000, rate=1.0, warmup=10, decay=0.5)
        >>> [round(plan.rate_at(s), 3) for s in (0, 100, 500, 750, 999)]
        [0.1, 1.0, 1.0, 0.525, 0.052]
        """
        rise = min(1.0, (step + 1) / max(self.warmup, 1))
        left = (self.steps - step) / max(self.steps * self.decay, 1e-9)
        return self.rate * min(rise, max(0.05, min(1.0, 0.05 + 0.95 * left)))


class Kept(Protocol):
    """What a checkpoint keeps beside the weights; `update` is called after every step."""

    values: dict[str, Tensor]

    def update(self, step: int) -> None: ...


@dataclass(slots=True)
class Average:
    """Exponential moving average of the weights that a module learns: what is shipped is smoother than a step."""

    module: nn.Module
    decay: float = 0.999
    values: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.values = {name: value.clone() for name, value in _trained(self.module).items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        # A short memory at first, or the random start would linger in the average.
        keep = min(self.decay, (step + 1) / (step + 10))
        for name, value in _trained(self.module).items():
            self.values[name].lerp_(value, 1.0 - keep)

    def settle(self) -> None:
        """Leave the average in the module."""
        self.module.load_state_dict(self.values, strict=False)


def seed_step(seed: int, step: int) -> np.random.Generator:
    """Seed torch for one step and return numpy's generator for the same step."""
    mixed = np.random.SeedSequence((seed, step))
    torch.manual_seed(int(mixed.generate_state(1, np.uint64)[0] >> np.uint64(1)))
    return np.random.default_rng(mixed.spawn(1)[0])


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint so that a kill at any moment leaves the old or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".part")
    try:
        torch.save(dict(state), half)
        half.replace(path)
    except (OSError, RuntimeError) as error:
        half.unlink(missing_ok=True)
        raise TrainingError(f"cannot write checkpoint {path}: {error}") from error


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint: tensors and plain values only, never code."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise TrainingError(f"cannot read checkpoint {path}: {error}") from error
    return state


def train(
    step: Step,
    modules: Mapping[str, nn.Module],
    plan: Plan,
    checkpoint: Path,
    *,
    averages: Mapping[str, Kept] | None = None,
    say: Say = print,
) -> None:
    """Train `modules` with AdamW until the plan ends.

    `step(number, rng)` returns the loss. Raises TrainingError when a loss or gradient is not
    finite or a checkpoint cannot be written; the previous checkpoint then stays as it was. Raises
    UnfinishedError, with everything in the checkpoint, when the plan's minutes are over first.
    """
    averages = averages or {}
    weights = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
    if not weights:
        raise TrainingError("nothing to train: no weight requires a gradient")
    optimizer = torch.optim.AdamW(weights, lr=plan.rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    done = _resume(checkpoint, modules, averages, optimizer, plan)
    first, started, smooth = done, time.monotonic(), math.nan
    lap, lap_step = started, first
    while done < plan.steps and time.monotonic() - started < plan.minutes * 60:
        for group in optimizer.param_groups:
            group["lr"] = plan.rate_at(done)
        loss = step(done, seed_step(plan.seed, done))
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingError(f"loss is {value} at step {done}; last checkpoint: {checkpoint}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = float(nn.utils.clip_grad_norm_(weights, plan.clip))
        if not math.isfinite(norm):
            raise TrainingError(f"gradient is {norm} at step {done}; last checkpoint: {checkpoint}")
        optimizer.step()
        for average in averages.values():
            average.update(done)
        done += 1
        smooth = value if math.isnan(smooth) else 0.98 * smooth + 0.02 * value
        if done % plan.say_every == 0 or done == plan.steps:
            # The pace of the last lap: a machine that slept or was shared is forgotten at once.
            now = time.monotonic()
            pace = (now - lap) / (done - lap_step)
            lap, lap_step = now, done
            left = pace * (plan.steps - done) / 60
            say(f"{checkpoint.stem} {done}/{plan.steps} loss {smooth:.4f} "
                f"{pace:.3f} s/step {left:.1f} min left")  # fmt: skip
        if done % plan.save_every == 0 or done == plan.steps:
            save(checkpoint, _state(done, modules, averages, optimizer, plan))
    if done < plan.steps:
        if done > first and done % plan.save_every:
            save(checkpoint, _state(done, modules, averages, optimizer, plan))
        raise UnfinishedError(f"{checkpoint.stem}: {done} of {plan.steps} steps are done; the same command goes on")


def _trained(module: nn.Module) -> dict[str, Tensor]:
    """The weights that training changes: frozen ones are not worth a place in the checkpoint."""
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


def _state(
    done: int,
    modules: Mapping[str, nn.Module],
    averages: Mapping[str, Kept],
    optimizer: torch.optim.Optimizer,
    plan: Plan,
) -> dict[str, Any]:
    return {
        "step": done,
        "seed": plan.seed,
        "settings": dict(plan.settings),
        "modules": {name: _trained(module) for name, module in modules.items()},
        "averages": {name: average.values for name, average in averages.items()},
        "optimizer": optimizer.state_dict(),
    }


def _resume(
    checkpoint: Path,
    modules: Mapping[str, nn.Module],
    averages: Mapping[str, Kept],
    optimizer: torch.optim.Optimizer,
    plan: Plan,
) -> int:
    if not checkpoint.exists():
        return 0
    state = load(checkpoint)
    # A checkpoint of a release that did not keep a setting says nothing of it.
    was = {"seed": state.get("seed", plan.seed), **state.get("settings", {})}
    for name, mine in {"seed": plan.seed, **plan.settings}.items():
        if (other := was.get(name, mine)) != mine:
            raise TrainingError(
                f"{checkpoint} was made with {name} {other}, not {mine}: "
                "use another working folder, or delete this file to learn that stage anew"
            )
    if (done := int(state["step"])) > plan.steps:
        raise TrainingError(f"{checkpoint} has gone {done} steps, more than {plan.steps}: use another working folder")
    try:
        for name, module in modules.items():
            own = _trained(module)
            if own.keys() != state["modules"][name].keys():
                raise TrainingError(f"{checkpoint} was made for other modules than {name}")
            module.load_state_dict(state["modules"][name], strict=False)
        for name, average in averages.items():
            average.values = state["averages"][name]
        optimizer.load_state_dict(state["optimizer"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise TrainingError(f"{checkpoint} does not fit this model: {error}") from error
    return done
