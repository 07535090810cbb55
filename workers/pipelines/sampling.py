"""From noise to latents, one step at a time. Every image's noise comes from its own CPU generator, in its own order."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
)
from torch import Tensor

from farm.errors import InvalidModel, InvalidRequest

STOCK: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler-a": (EulerAncestralDiscreteScheduler, {}),
    "dpmpp-2m": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
}
"""diffusers' own schedulers and what makes each the sampler of that name."""

SCHEDULERS = ("lcm", *STOCK)


class Noise:
    """Standard normal numbers for a micro-batch: float32, drawn on the CPU, one generator an image.

    float32 whatever the weights are, so that one seed means one noise on every device and in every number type.
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, int, int], device: torch.device) -> None:
        """`shape` is (channels, height, width) of one image's latents."""
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        self._shape = shape
        self._device = device

    def draw(self, times: int) -> Tensor:
        """The next `times` draws of each image, (times, images, channels, height, width), in one copy to the device."""
        drawn = torch.empty((times, len(self.generators), *self._shape))
        for number, generator in enumerate(self.generators):
            for time in range(times):
                torch.randn((1, *self._shape), generator=generator, out=drawn[time, number : number + 1])
        return drawn.to(self._device)


class Sampler(ABC):
    """One sampler for one micro-batch. `model` is asked with float32 latents and a step number."""

    init_sigma: ClassVar[float] = 1.0

    @property
    @abstractmethod
    def timesteps(self) -> Tensor:
        """What the UNet is told at each step, on the device."""

    @abstractmethod
    def start(self, noise: Noise) -> Tensor:
        """The first latents, float32."""

    @abstractmethod
    def scaled(self, latents: Tensor, step: int) -> Tensor:
        """The latents as the UNet wants to see them at this step (counted from 0)."""

    @abstractmethod
    def advance(self, predicted: Tensor, latents: Tensor, step: int) -> Tensor:
        """The latents after this step, from the UNet's float32 prediction."""


class Lcm(Sampler):
    """diffusers' LCMScheduler with every coefficient computed on the host beforehand.

    The stock step reads CPU tensors with a device timestep, which makes the host wait for the device at every step.
    """

    def __init__(self, config: dict[str, Any], steps: int, device: torch.device) -> None:
        scheduler: Any = LCMScheduler.from_config(config)
        limit = scheduler.config.original_inference_steps
        if not 1 <= steps <= limit:
            raise InvalidRequest(f"the lcm scheduler takes 1 to {limit} steps, not {steps}")
        if scheduler.config.thresholding:
            raise InvalidModel("scheduler_config.json: thresholding is not supported with the lcm scheduler")
        self._kind: str = scheduler.config.prediction_type
        if self._kind not in {"epsilon", "v_prediction", "sample"}:
            raise InvalidModel(f"scheduler_config.json: prediction_type {self._kind!r} is not known")
        self._clip: float | None = scheduler.config.clip_sample_range if scheduler.config.clip_sample else None
        scheduler.set_timesteps(steps)
        times = [int(time) for time in scheduler.timesteps]
        kept = [float(scheduler.alphas_cumprod[time]) for time in times]
        self._signal = [math.sqrt(share) for share in kept]
        self._spread = [math.sqrt(1.0 - share) for share in kept]
        scalings = [scheduler.get_scalings_for_boundary_condition_discrete(time) for time in times]
        self._skip = [float(skip) for skip, _ in scalings]
        self._out = [float(out) for _, out in scalings]
        self._times = torch.tensor(times, device=device)
        self._noise: Tensor | None = None

    @property
    def timesteps(self) -> Tensor:
        return self._times

    def start(self, noise: Noise) -> Tensor:
        drawn = noise.draw(len(self._times))
        self._noise = drawn[1:]
        return drawn[0]

    def scaled(self, latents: Tensor, step: int) -> Tensor:  # noqa: ARG002  # LCM's input is not scaled
        return latents

    def advance(self, predicted: Tensor, latents: Tensor, step: int) -> Tensor:
        signal, spread = self._signal[step], self._spread[step]
        if self._kind == "epsilon":
            clean = (latents - spread * predicted) / signal
        elif self._kind == "v_prediction":
            clean = signal * latents - spread * predicted
        else:
            clean = predicted
        if self._clip is not None:
            clean = clean.clamp(-self._clip, self._clip)
        denoised: Tensor = self._out[step] * clean + self._skip[step] * latents
        if step == len(self._times) - 1 or self._noise is None:
            return denoised
        moved: Tensor = self._signal[step + 1] * denoised + self._spread[step + 1] * self._noise[step]
        return moved


class Stock(Sampler):
    """One of diffusers' schedulers, stepped as its own pipelines do."""

    def __init__(self, name: str, config: dict[str, Any], steps: int, device: torch.device) -> None:
        kind, options = STOCK[name]
        self._scheduler = kind.from_config(config, **options)
        if not 1 <= steps <= self._scheduler.config.num_train_timesteps:
            raise InvalidRequest(f"{name} takes 1 to {self._scheduler.config.num_train_timesteps} steps, not {steps}")
        self._scheduler.set_timesteps(steps, device=device)
        # Schedulers without noise of their own take no generator.
        self._noisy = isinstance(self._scheduler, EulerAncestralDiscreteScheduler)
        self._noise: Noise | None = None

    @property
    def timesteps(self) -> Tensor:
        times: Tensor = self._scheduler.timesteps
        return times

    def start(self, noise: Noise) -> Tensor:
        self._noise = noise
        return noise.draw(1)[0] * float(self._scheduler.init_noise_sigma)

    def scaled(self, latents: Tensor, step: int) -> Tensor:
        scaled: Tensor = self._scheduler.scale_model_input(latents, self.timesteps[step])
        return scaled

    def advance(self, predicted: Tensor, latents: Tensor, step: int) -> Tensor:
        options = {"generator": self._noise.generators} if self._noisy and self._noise else {}
        moved: Tensor = self._scheduler.step(predicted, self.timesteps[step], latents, return_dict=False, **options)[0]
        return moved


def sampler(name: str, config: dict[str, Any], steps: int, device: torch.device) -> Sampler:
    """The sampler of that name for a checkpoint's scheduler configuration. Raises InvalidRequest."""
    if name == "lcm":
        return Lcm(config, steps, device)
    if name in STOCK:
        return Stock(name, config, steps, device)
    raise InvalidRequest(f"scheduler {name!r} is not one of {', '.join(SCHEDULERS)}")


def denoise(
    sampling: Sampler, model: Callable[[Tensor, Tensor], Tensor], noise: Noise, after_step: Callable[[int], bool]
) -> Tensor | None:
    """Run every step. `model(latents, timestep)` answers the float32 prediction; `after_step(done)` answers whether to
    go on, where `done` counts from 1. None when told to stop."""
    latents = sampling.start(noise)
    for step, time in enumerate(sampling.timesteps):
        predicted = model(sampling.scaled(latents, step), time)
        latents = sampling.advance(predicted, latents, step)
        if not after_step(step + 1):
            return None
    return latents
