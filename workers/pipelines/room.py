"""How much memory pictures take while they are rendered, estimated from shapes alone before anything is.

A GPU says when its memory runs out, and the micro-batch is halved; a CPU's process is killed instead. So the first size
of a micro-batch is one whose activations fit what is free. What is counted are values that live at the same time where
most of them do, taken from diffusers' own layers:

- UNet: one for each skip connection that waits for its way up, and at the level with most pixels times channels those
  of a transformer's feed-forward (hidden state twice, normed, its projection to 8 times the width, two halves of that)
  or of the resnet that takes skip and hidden state together (three times as wide, three times, and its answer).
- VAE: pictures at full size, at the width of the level below, which the first resnet there takes: itself, normed and
  activated.

tests/pipelines/test_room.py holds both against what the layers allocate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from workers.pipelines.prompts import is_guided

if TYPE_CHECKING:
    from farm.recipe import Recipe
    from workers.pipelines.device import Device
    from workers.pipelines.load import Pipeline

FEED_FORWARD = 22
RESNET = 12
"""Values of a level's size alive at once, with a transformer there and without."""
CONTROL_EMBEDDING = 64
"""Values a pixel in what a ControlNet makes of its picture: 16 channels at full size, before and after activation."""
FULL_SIZE = 3
"""Values a pixel and channel in a VAE at full size."""
KEPT = 64
"""Bytes a pixel of a picture that outlast the networks: pixels drawn and drawn from, latents, their noise."""
HEADROOM = 1.5
"""What allocators round up and leave unused between blocks, and kernels use as scratch. Measured on a CPU as growth of
the process: crack-tiny, 2 pictures of 256x256 and 4 of 512x512, 1.37 and 1.26 times what is counted; SDXL's VAE in
float32, 256x256 and 2 of 384x384, 1.47 and 1.31 times."""


class Need(NamedTuple):
    """Bytes of activations: `drawn` for each image in the UNet, `decoded` for each of at most `at_once` pictures that
    the VAE holds, `kept` for each image throughout. An image has `pictures` (an animation its frames)."""

    drawn: int
    decoded: int
    at_once: int
    kept: int
    pictures: int = 1

    def of(self, images: int) -> int:
        """Bytes that so many images take together."""
        decoding = min(images * self.pictures, self.at_once) * self.decoded
        return int((max(images * self.drawn, decoding) + images * self.kept) * HEADROOM)


def need_of(pipeline: Pipeline, vae: Any, recipe: Recipe, device: Device) -> Need:
    """What recipes of this one's lane take beside weights."""
    pixels = recipe.width * recipe.height
    factor = 2 ** (len(_widths(vae)) - 1)
    controls = len(recipe.controls or ())
    skips, most = unet_values(pipeline.unet.config, pixels // factor**2)
    drawn = max(most, CONTROL_EMBEDDING * pixels if controls else 0) + (1 + controls) * skips
    rows = 2 if is_guided(pipeline, recipe) else 1
    pictures = recipe.frames or 1
    return Need(
        drawn=drawn * rows * pictures * pipeline.unet.dtype.itemsize,
        decoded=vae_values(vae, pixels) * next(vae.parameters()).element_size(),
        at_once=device.spread.cores * max(1, device.decode_pixels // pixels),
        kept=KEPT * pixels * pictures,
        pictures=pictures,
    )


def unet_values(config: Any, latents: int) -> tuple[int, int]:
    """Values in the skip connections of a UNet for one row with so many latent pixels, and most values beside them."""
    widths = config.block_out_channels
    layers = config.layers_per_block
    each = [layers] * len(widths) if isinstance(layers, int) else list(layers)
    skips, most = widths[0] * latents, 0
    for level, (width, count, kind) in enumerate(zip(widths, each, config.down_block_types, strict=True)):
        size = width * max(1, latents // 4**level)
        skips += count * size + (size // 4 if level + 1 < len(widths) else 0)
        most = max(most, size * (FEED_FORWARD if "CrossAttn" in kind else RESNET))
    return skips, most


def vae_values(vae: Any, pixels: int) -> int:
    """Values that a VAE has at once while it decodes, or encodes, one picture of so many pixels."""
    return FULL_SIZE * max(_widths(vae)[:2]) * pixels


def fitting(
    need: Need, most: int, room: Callable[[], int], padded: Callable[[int], int], evict: Callable[[], bool]
) -> int:
    """How many images of at most `most` fit the free bytes that `room` answers, halved as when memory runs out.

    `padded` answers how many rows so many images are computed as. Where one image does not fit, `evict` makes room if
    it can; one is tried in any case.
    """
    for again in (True, False):
        size, free = most, room()
        while size > 1 and need.of(padded(size)) > free:
            size = (size + 1) // 2
        if need.of(padded(size)) <= free or not (again and evict()):
            break
    return size


def _widths(vae: Any) -> Sequence[int]:
    found = getattr(vae.config, "block_out_channels", None) or vae.config.decoder_block_out_channels
    return tuple(map(int, found))
