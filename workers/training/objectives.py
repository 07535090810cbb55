"""What an adapter learns by: the loss of one pass. Random numbers come from torch's host generator, on any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from farm.training import LcmLora, StyleLora
from workers.training.base import Base, Condition
from workers.training.distill import Draw, Solver, consistency, huber

Loss = Callable[[Any, Tensor, Condition, Condition], Tensor]
"""(network, clean latents, what is told, the same with no caption) -> loss. The network may be wrapped for several
devices; what needs no gradient goes to the base's own."""


def distillation(options: LcmLora, base: Base) -> Loss:
    """LCM-LoRA: the teacher is the same network with its adapter switched off."""
    solver = Solver(base.alphas, base.kind, options.solver)
    low, high = guidance(options, xl=base.xl)

    def loss(network: Any, clean: Tensor, told: Condition, untold: Condition) -> Tensor:
        own = base.network
        count, device = len(clean), clean.device

        def student(latents: Tensor, times: Tensor) -> Tensor:
            asked = network if torch.is_grad_enabled() else own
            guess: Tensor = asked(latents, times.to(device), told)
            return guess

        def teacher(latents: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
            own.unet.disable_adapters()
            try:
                return own(latents, times.to(device), told), own(latents, times.to(device), untold)
            finally:
                own.unet.enable_adapters()

        draw = Draw(
            start=solver.starts(count),
            noise=torch.randn(clean.shape).to(device),
            guidance=torch.empty(count, 1, 1, 1).uniform_(low, high).to(device),
        )
        made, target = consistency(solver, clean, draw, student, teacher)
        return huber(made, target, options.huber_c) if options.loss == "huber" else functional.mse_loss(made, target)

    return loss


def guidance(options: LcmLora, *, xl: bool) -> tuple[float, float]:
    """The range of guidance that is baked in. The defaults are those of the LCM-LoRA of each family."""
    low = options.guidance_low if options.guidance_low is not None else (3.0 if xl else 5.0)
    return low, 15.0 if options.guidance_high is None else options.guidance_high


def denoising(options: StyleLora, base: Base) -> Loss:
    """Style: mean square of noise or velocity, as diffusers' text-to-image LoRA script has it."""

    def loss(network: Any, clean: Tensor, told: Condition, untold: Condition) -> Tensor:
        del untold
        count, device = len(clean), clean.device
        noise = torch.randn(clean.shape)
        shift = torch.randn(count, clean.shape[1], 1, 1)
        noise = (noise + options.noise_offset * shift).to(device)
        times = torch.randint(0, len(base.alphas), (count,))
        alpha = base.alphas[times]
        signal, sigma = (each.sqrt().view(-1, 1, 1, 1).to(device) for each in (alpha, 1 - alpha))
        guess = network(signal * clean + sigma * noise, times.to(device), told)
        target = noise if base.kind == "epsilon" else signal * noise - sigma * clean
        each = (guess - target).square().mean((1, 2, 3))
        if options.snr_gamma is not None:
            each = each * certainty(alpha, base.kind, options.snr_gamma).to(device)
        mean: Tensor = each.mean()
        return mean

    return loss


def certainty(alpha: Tensor, kind: str, gamma: float) -> Tensor:
    """Min-SNR weights (n,), Hang et al. 2023: nearly clean pictures teach little and would drown the rest.

    >>> [round(w, 3) for w in certainty(torch.tensor([0.5, 0.96]), "epsilon", 5.0).tolist()]
    [1.0, 0.208]
    """
    ratio = alpha / (1 - alpha)
    return ratio.clamp(max=gamma) / (ratio if kind == "epsilon" else ratio + 1)
