"""The autoencoder: 128x128 pixels to 16x16 latents and back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from workers.training.loop import Average, Plan, Say, train
from workers.training.pool import Pool

FACTOR = 8


def build(channels: tuple[int, ...] = (24, 48, 96, 128), latent: int = 8) -> AutoencoderKL:
    """An untrained AutoencoderKL of factor 8 without attention: it has to run on a CPU."""
    count = len(channels)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * count,
        up_block_types=("UpDecoderBlock2D",) * count,
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=latent,
        norm_num_groups=8,
        sample_size=128,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def fingerprint(model: AutoencoderKL) -> str:
    """Twelve letters that only these weights have."""
    found = hashlib.sha256()
    for value in model.state_dict().values():
        found.update(value.detach().numpy().tobytes())
    return found.hexdigest()[:12]


def to_tensor(pixels: NDArray[np.uint8]) -> Tensor:
    """uint8 (n, h, w, c) to float (n, c, h, w) in -1..1."""
    tensor = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2)
    return (tensor.float() / 127.5 - 1.0).contiguous(memory_format=torch.channels_last)


def loss(made: Tensor, real: Tensor, mask: Tensor) -> Tensor:
    """L1, heavier on cracks, plus averages for colour and differences for edges.

    Plain L1 learns grey first and never finds hairlines, which cover a hundredth of the picture.
    """
    off = made - real
    weight = 1.0 + 3.0 * functional.max_pool2d(mask, 3, 1, 1)
    total = (off.abs() * weight).mean()
    total = total + 1.5 * functional.avg_pool2d(off, 16).abs().mean()
    total = total + 0.5 * functional.avg_pool2d(off, 4).abs().mean()
    edge_x = off[..., :, 1:] - off[..., :, :-1]
    edge_y = off[..., 1:, :] - off[..., :-1, :]
    near = weight[..., :, 1:], weight[..., 1:, :]
    return total + 0.5 * ((edge_x.abs() * near[0]).mean() + (edge_y.abs() * near[1]).mean())


def crops(pool: Pool, rng: np.random.Generator, count: int, side: int) -> tuple[Tensor, Tensor]:
    """Random squares of the pool, mirrored half of the time: pictures and masks (n, 1, h, w)."""
    full = pool.pixels.shape[1]
    out = np.empty((count, side, side, 4), np.uint8)
    for k, i in enumerate(rng.integers(0, len(pool.pixels), count)):
        y, x = (int(v) for v in rng.integers(0, full - side + 1, 2))
        cut = pool.pixels[i, y : y + side, x : x + side]
        out[k] = cut[:, ::-1] if rng.random() < 0.5 else cut
    both = to_tensor(out)
    return both[:, :3], (both[:, 3:] + 1.0) / 2.0


def fit(
    pool: Pool,
    plan: Plan,
    checkpoint: Path,
    *,
    channels: tuple[int, ...] = (24, 48, 96, 128),
    latent: int = 8,
    batch: int = 16,
    side: int = 64,
    kl: float = 1e-4,
    bf16: bool = True,
    say: Say = print,
) -> AutoencoderKL:
    """Train an autoencoder and return its averaged weights, every latent channel with mean 0 and deviation 1.

    The second half of the steps sees whole pictures instead of crops, because group norms
    measure the picture they are given: a decoder that only met crops shifts the colours of walls.
    """
    torch.manual_seed(plan.seed)
    model = build(channels, latent).to(memory_format=torch.channels_last)
    average = Average(model)
    whole = pool.pixels.shape[1]

    def step(number: int, rng: np.random.Generator) -> Tensor:
        late = number >= plan.steps * 0.5 and whole > side
        edge, count = (whole, max(batch * side * side // whole**2, 2)) if late else (side, batch)
        real, mask = crops(pool, rng, count, edge)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            spread = model.encode(real).latent_dist
            made = model.decode(spread.sample()).sample
        mean, logvar = spread.mean.float(), spread.logvar.float()
        cost = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
        total: Tensor = loss(made.float(), real, mask) + kl * cost
        return total

    model.train()
    train(step, {"model": model}, plan, checkpoint, averages={"model": average}, say=say)
    average.settle()
    model.eval()
    whiten(model, _sample_latents(model, pool, plan.seed))
    return model


@torch.no_grad()
def _sample_latents(model: AutoencoderKL, pool: Pool, seed: int) -> Tensor:
    """Latents (n, c, h, w) of up to 256 whole pictures of the pool."""
    sample, _ = crops(pool, np.random.default_rng((seed, 5)), min(256, len(pool.pixels)), pool.pixels.shape[1])
    return torch.cat([model.encode(part).latent_dist.mean for part in torch.split(sample, 16)])


def refine(
    model: AutoencoderKL,
    pool: Pool,
    plan: Plan,
    checkpoint: Path,
    *,
    batch: int = 4,
    blur: float = 0.1,
    bf16: bool = True,
    say: Say = print,
) -> None:
    """Train a whitened autoencoder on, in place, until it keeps what is a pixel wide; it is whitened again.

    A hairline covers a hundredth of a picture, so an autoencoder that weighs all pixels alike leaves it out. `blur` is
    the noise added to latents, whose deviation is 1: those of a diffusion model are not as exact as the encoder's.
    """
    torch.manual_seed(plan.seed)
    average = Average(model)
    whole = pool.pixels.shape[1]

    def step(_: int, rng: np.random.Generator) -> Tensor:
        real, mask = crops(pool, rng, batch, whole)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            mean = model.encode(real).latent_dist.mean
            made = model.decode(mean + blur * torch.randn_like(mean)).sample
        # Noise has a size only while the latents keep theirs.
        mean = mean.float()
        size = (mean.mean((0, 2, 3)).square() + (mean.std((0, 2, 3)) - 1).square()).mean()
        total: Tensor = sharp_loss(made.float(), real, mask) + 0.1 * size
        return total

    model.train()
    train(step, {"model": model}, plan, checkpoint, averages={"model": average}, say=say)
    average.settle()
    model.eval()
    whiten(model, _sample_latents(model, pool, plan.seed))


Guess = Callable[[Tensor, NDArray[np.int64], np.random.Generator], Tensor]
"""(latents (n, c, h, w), numbers of their pictures, rng) -> the latents as a model would hand them to the decoder."""


def learn_to_decode(
    model: AutoencoderKL,
    latents: NDArray[np.float16],
    pool: Pool,
    guess: Guess,
    plan: Plan,
    checkpoint: Path,
    *,
    share: float = 1.0,
    batch: int = 4,
    bf16: bool = True,
    say: Say = print,
) -> None:
    """Train the decoder on, in place, on latents (n, c, h, w) as a diffusion model makes them; the encoder stays.

    Where the model is not sure of a hairline its latents hold half of one. From those the decoder learns to draw a
    line: too light costs twice what too dark does. In the end its weights are `share` (0 to 1) of those learnt and for
    the rest those before: between two ends of one training the way is level (Wortsman et al. 2022, Robust fine-tuning
    of zero-shot models, arXiv 2109.01903).
    """
    torch.manual_seed(plan.seed)
    decoder = nn.ModuleDict({"post": model.post_quant_conv, "decoder": model.decoder})
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    average = Average(decoder)

    def step(_: int, rng: np.random.Generator) -> Tensor:
        chosen = np.sort(rng.integers(0, len(latents), batch))
        both = to_tensor(pool.pixels[chosen])
        real, mask = both[:, :3], (both[:, 3:] + 1.0) / 2.0
        given = guess(torch.from_numpy(latents[chosen].astype(np.float32)), chosen, rng)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            made = model.decode(given).sample
        return sharp_loss(made.float(), real, mask, too_light=2.0)

    decoder.train()
    train(step, {"decoder": decoder}, plan, checkpoint, averages={"decoder": average}, say=say)
    decoder.load_state_dict({name: before[name].lerp(value, share) for name, value in average.values.items()})
    decoder.eval()


def sharp_loss(made: Tensor, real: Tensor, mask: Tensor, *, too_light: float = 1.0) -> Tensor:
    """L1 in which a pixel of a crack counts for thirteen of the wall, with averages and differences.

    L1 draws a line where it is more likely than not; so weighted, where it is likelier than one in fourteen. A pixel
    of a crack that is lighter than it should be counts for one and `too_light` times twelve.
    """
    off = made - real
    weight = 1.0 + 12.0 * mask * (1.0 + (too_light - 1.0) * (off.detach() > 0))
    total = (off.abs() * weight).mean() + 1.5 * functional.avg_pool2d(off, 16).abs().mean()
    edge_x = off[..., :, 1:] - off[..., :, :-1]
    edge_y = off[..., 1:, :] - off[..., :-1, :]
    near = functional.max_pool2d(mask, 3, 1, 1) * 5.0 + 0.5
    return total + 0.5 * ((edge_x.abs() * near[..., :, 1:]).mean() + (edge_y.abs() * near[..., 1:, :]).mean())


@torch.no_grad()
def whiten(model: AutoencoderKL, latents: Tensor) -> None:
    """Fold mean 0 and deviation 1 for every latent channel into the two 1x1 convolutions, in place.

    `latents` (n, c, h, w) are what the model encodes to now. Pictures stay the same. One scaling
    factor for all channels, as Stable Diffusion has it, leaves quiet channels deep in the noise.
    """
    mean, spread = latents.mean((0, 2, 3)), latents.std((0, 2, 3)).clamp(min=1e-3)
    count = len(mean)
    quant, post = model.quant_conv, model.post_quant_conv
    post.bias += (post.weight * mean.view(1, -1, 1, 1)).sum((1, 2, 3))
    post.weight *= spread.view(1, -1, 1, 1)
    quant.weight[:count] /= spread.view(-1, 1, 1, 1)
    quant.bias[:count] = (quant.bias[:count] - mean) / spread
    # The second half is the logarithm of the variance.
    quant.bias[count:] -= 2 * spread.log()
    model.register_to_config(scaling_factor=1.0)
