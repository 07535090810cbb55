"""Pictures that recipes draw from, as the pipeline wants them: resized, as numbers, encoded to latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from farm.errors import InvalidRequest

if TYPE_CHECKING:
    from farm.recipe import Recipe
    from workers.pipelines.device import Device

Pixels = NDArray[np.uint8]
"""Height x width x 3, 0..255."""


@dataclass(frozen=True, eq=False)
class Guide:
    """What one image is drawn from, at the size of its recipe: `image` uint8 (height, width, 3), `mask` bool (height,
    width), true where it is drawn anew, `controls` uint8 (height, width, 3) in the recipe's order."""

    image: Pixels | None = None
    mask: NDArray[np.bool_] | None = None
    controls: tuple[Pixels, ...] = ()


def guide_of(recipe: Recipe, pictures: Mapping[str, Pixels]) -> Guide:
    """The pictures of one recipe, resized as diffusers' image processors do it: Lanczos, both sides on their own.

    A mask is what is at least half white after that. Raises InvalidRequest for a picture that is not in `pictures`.
    """
    missing = sorted(recipe.pictures - pictures.keys())
    if missing:
        raise InvalidRequest(f"the picture {missing[0]} that this recipe draws from was not handed over")

    def sized(hash_: str) -> Image.Image:
        picture = Image.fromarray(pictures[hash_])
        return picture.resize((recipe.width, recipe.height), Image.Resampling.LANCZOS)

    image = None if recipe.image is None else np.asarray(sized(recipe.image))
    mask = None if recipe.mask is None else np.asarray(sized(recipe.mask).convert("L")) >= 128
    return Guide(image, mask, tuple(np.asarray(sized(control.image)) for control in recipe.controls or ()))


def encode(vae: Any, guides: Sequence[Guide], noise: Tensor | None, device: Device) -> Tensor:
    """The images of these guides as latents (n, channels, height, width), float32, as the UNet works on them.

    `noise` of the same shape picks the sample of each image's distribution; a VAE without one needs none.
    """
    pixels = torch.from_numpy(np.stack([guide.image for guide in guides if guide.image is not None]))
    ready = pixels.to(device.place).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
    ready = ready.to(next(vae.parameters()).dtype).contiguous(memory_format=torch.channels_last)
    share = -(-len(ready) // len(device.spread.parts(len(ready))))
    size = max(1, min(device.decode_pixels // (ready.shape[-1] * ready.shape[-2]), share))

    def encoded(chunk: Tensor, drawn: Tensor | None) -> Tensor:
        answer = vae.encode(chunk)
        if drawn is None:
            latents: Tensor = answer.latents
            return latents.float()
        found = answer.latent_dist
        sample: Tensor = found.mean.float() + found.std.float() * drawn
        return sample

    drawn = [None] * len(torch.split(ready, size)) if noise is None else list(torch.split(noise, size))
    calls = [partial(encoded, *both) for both in zip(torch.split(ready, size), drawn, strict=True)]
    return scaled(vae, torch.cat(device.spread.run(calls)))


def has_distribution(vae: Any) -> bool:
    """Whether encoding draws a sample: an AutoencoderKL does, a tiny one does not."""
    return hasattr(vae, "quant_conv")


def scaled(vae: Any, latents: Tensor) -> Tensor:
    """Latents as the UNet works on them, from those the VAE made: what `render.unscaled` undoes."""
    config = vae.config
    mean, spread = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is not None and spread is not None:
        shape = (1, -1, 1, 1)
        middle = torch.tensor(mean, device=latents.device, dtype=latents.dtype).view(shape)
        width = torch.tensor(spread, device=latents.device, dtype=latents.dtype).view(shape)
        return (latents - middle) * float(config.scaling_factor) / width
    return latents * float(config.scaling_factor)


def latent_mask(guides: Sequence[Guide], factor: int, device: Device) -> Tensor:
    """1.0 where latents are drawn anew, 0.0 elsewhere: (n, 1, height, width), each the mask's pixel at its upper left,
    as torch's nearest interpolation takes it."""
    masks = torch.from_numpy(np.stack([guide.mask for guide in guides if guide.mask is not None]))
    return masks[:, None, ::factor, ::factor].float().to(device.place)


def control_images(guides: Sequence[Guide], index: int, dtype: torch.dtype, device: Device) -> Tensor:
    """The control images at this place of each guide, 0..1: (n, 3, height, width)."""
    pixels = torch.from_numpy(np.stack([guide.controls[index] for guide in guides]))
    ready = pixels.to(device.place).permute(0, 3, 1, 2).float().div_(255.0)
    return ready.to(dtype).contiguous(memory_format=torch.channels_last)


def composited(picture: Pixels, guide: Guide) -> Pixels:
    """The drawn picture where the mask says so, the image itself, pixel by pixel, everywhere else."""
    if guide.image is None or guide.mask is None:
        return picture
    return np.where(guide.mask[:, :, None], picture, guide.image)
