"""From noise to latents, one step at a time. Every image's noise comes from its own CPU generator, in its own order."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from farm.errors import InvalidModel, InvalidRequest

DPMPP = {"algorithm_type": "dpmsolver++", "solver_order": 2}

STOCK: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {}),
    "ddpm": (DDPMScheduler, {}),
    "deis": (DEISMultistepScheduler, {}),
    "dpmpp-2m": (DPMSolverMultistepScheduler, DPMPP),
    "dpmpp-2m-karras": (DPMSolverMultistepScheduler, {**DPMPP, "use_karras_sigmas": True}),
    "dpmpp-2m-sde": (DPMSolverMultistepScheduler, {**DPMPP, "algorithm_type": "sde-dpmsolver++"}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler-a": (EulerAncestralDiscreteScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
    "pndm": (PNDMScheduler, {"skip_prk_steps": True}),
    "unipc": (UniPCMultistepScheduler, {}),
}
"""diffusers' own schedulers and what makes each the sampler of that name."""

NOISY = ("ddpm", "dpmpp-2m-sde", "euler-a")
"""Those that add noise at every step: each image's comes from its own generator."""

SCHEDULERS = ("lcm", *STOCK)


class Noise:
    """Standard normal numbers for a micro-batch: float32, drawn on the CPU, one generator an image.

    float32 whatever the weights are, so that one seed means one noise on every device and in every number type.
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, ...], device: torch.device) -> None:
        """`shape` is (channels, height, width) of one image's latents; an animation has frames before its height."""
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        self._shape = shape
        self._device = device

    def draw(self, times: int) -> Tensor:
        """The next `times` draws of each image, (times, images, *shape), in one copy to the device."""
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
    def start(self, noise: Noise, clean: Tensor | None = None, spare: int = 0) -> Tensor:
        """The first latents, float32: noise, or the latents `clean` under the noise of the step it begins at.

        `spare` draws of noise are passed over after the first: stock pipelines use them up for what is not used here.
        """

    @abstractmethod
    def noised(self, clean: Tensor, step: int) -> Tensor:
        """The latents `clean` under their first noise, as noisy as what `advance` answers at this step."""

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

    def __init__(self, config: dict[str, Any], steps: int, device: torch.device, first: int = 0) -> None:
        """`first` is the step to begin at, from 0."""
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
        times = [int(time) for time in scheduler.timesteps][first:]
        kept = [float(scheduler.alphas_cumprod[time]) for time in times]
        self._signal = [math.sqrt(share) for share in kept]
        self._spread = [math.sqrt(1.0 - share) for share in kept]
        scalings = [scheduler.get_scalings_for_boundary_condition_discrete(time) for time in times]
        self._skip = [float(skip) for skip, _ in scalings]
        self._out = [float(out) for _, out in scalings]
        self._times = torch.tensor(times, device=device)
        self._first: Tensor | None = None
        self._noise: Tensor | None = None

    @property
    def timesteps(self) -> Tensor:
        return self._times

    def start(self, noise: Noise, clean: Tensor | None = None, spare: int = 0) -> Tensor:
        drawn = noise.draw(spare + len(self._times))
        self._first, self._noise = drawn[0], drawn[1 + spare :]
        return drawn[0] if clean is None else self._signal[0] * clean + self._spread[0] * drawn[0]

    def noised(self, clean: Tensor, step: int) -> Tensor:
        if step == len(self._times) - 1 or self._first is None:
            return clean
        return self._signal[step + 1] * clean + self._spread[step + 1] * self._first

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

    def __init__(self, name: str, config: dict[str, Any], steps: int, device: torch.device, first: int = 0) -> None:
        """`first` is the step to begin at, from 0."""
        kind, options = STOCK[name]
        self._scheduler = kind.from_config(config, **options)
        if not 1 <= steps <= self._scheduler.config.num_train_timesteps:
            raise InvalidRequest(f"{name} takes 1 to {self._scheduler.config.num_train_timesteps} steps, not {steps}")
        # All its numbers stay on the host: a coefficient that is looked up there makes nobody wait for the device.
        self._scheduler.set_timesteps(steps, device="cpu")
        begin = first * self._scheduler.order
        self._host_times = self._scheduler.timesteps[begin:]
        self._times: Tensor = self._host_times.to(device)
        if hasattr(self._scheduler, "set_begin_index"):
            self._scheduler.set_begin_index(begin)
        # Schedulers without noise of their own take no generator.
        self._noisy = name in NOISY
        self._noise: Noise | None = None
        self._first: Tensor | None = None

    @property
    def timesteps(self) -> Tensor:
        return self._times

    def start(self, noise: Noise, clean: Tensor | None = None, spare: int = 0) -> Tensor:
        self._noise = noise
        self._first = noise.draw(1 + spare)[0]
        if clean is None:
            return self._first * float(self._scheduler.init_noise_sigma)
        started: Tensor = self._scheduler.add_noise(clean, self._first, self._host_times[:1].repeat(len(clean)))
        return started

    def noised(self, clean: Tensor, step: int) -> Tensor:
        if step == len(self._host_times) - 1 or self._first is None:
            return clean
        noisy: Tensor = self._scheduler.add_noise(clean, self._first, self._host_times[step + 1 : step + 2])
        return noisy

    def scaled(self, latents: Tensor, step: int) -> Tensor:
        scaled: Tensor = self._scheduler.scale_model_input(latents, self._host_times[step])
        return scaled

    def advance(self, predicted: Tensor, latents: Tensor, step: int) -> Tensor:
        options = {"generator": self._noise.generators} if self._noisy and self._noise else {}
        time = self._host_times[step]
        moved: Tensor = self._scheduler.step(predicted, time, latents, return_dict=False, **options)[0]
        return moved


def sampler(name: str, config: dict[str, Any], steps: int, device: torch.device, first: int = 0) -> Sampler:
    """The sampler of that name for a checkpoint's scheduler configuration, beginning at step `first` (from 0).

    Raises InvalidRequest.
    """
    if name == "lcm":
        return Lcm(config, steps, device, first)
    if name in STOCK:
        return Stock(name, config, steps, device, first)
    raise InvalidRequest(f"scheduler {name!r} is not one of {', '.join(SCHEDULERS)}")


def evaluations(name: str, steps: int, first: int = 0) -> int:
    """How often the UNet is asked by a sampler of that name which begins at step `first`."""
    asked = steps - first
    return {"heun": 2 * asked - 1, "pndm": asked + 1}.get(name, asked)


@dataclass(frozen=True, eq=False)
class Kept:
    """What is not to be drawn anew: the latents of the picture it is taken from, (n, channels, height, width), and 1.0
    where something else may come, (n, 1, height, width)."""

    clean: Tensor
    mask: Tensor


def denoise(
    sampling: Sampler,
    model: Callable[[Tensor, Tensor, int], Tensor],
    latents: Tensor,
    after_step: Callable[[int], bool],
    kept: Kept | None = None,
) -> Tensor | None:
    """Run every step from the first `latents`. `model(latents, timestep, step)` answers the float32 prediction, `step`
    counting from 0; `after_step(done)` answers whether to go on, `done` counting from 1. What is `kept` is put back
    after each step, as noisy as the rest. None when told to stop."""
    for step, time in enumerate(sampling.timesteps):
        predicted = model(sampling.scaled(latents, step), time, step)
        latents = sampling.advance(predicted, latents, step)
        if kept is not None:
            latents = (1.0 - kept.mask) * sampling.noised(kept.clean, step) + kept.mask * latents
        if not after_step(step + 1):
            return None
    return latents
