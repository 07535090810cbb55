"""One micro-batch: prompts and seeds in, pictures out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from farm.errors import InvalidRequest, RenderFailed
from workers.pipelines.controls import Controls
from workers.pipelines.guides import Guide, composited, encode, has_distribution, latent_mask
from workers.pipelines.motion import SCHEDULE, as_pictures, unet_for
from workers.pipelines.prompts import Text, is_guided
from workers.pipelines.sampling import Kept, Noise, Sampler, denoise, sampler
from workers.pipelines.slots import Chosen

if TYPE_CHECKING:
    # Types only: the benchmark of this module runs where there is nothing but torch and diffusers.
    from farm.recipe import Recipe
    from workers.pipelines.device import Device
    from workers.pipelines.load import Pipeline

Picture = NDArray[np.uint8]
"""Height x width x 3, 0..255; an animation has its frames in front."""

OnStep = Callable[[int, int], Collection[int]]
"""Called after each denoising step with (steps done, steps in all); answers the indices to drop."""

Ask = Callable[..., Tensor]
"""Called with a network, the name of its method, and what that is given; answers the first tensor that it answers."""


def asked(network: Any, method: str, *given: Any, **options: Any) -> Tensor:
    """Ask a network as it is."""
    answer: Tensor = getattr(network, method)(*given, **options)[0]
    return answer


@torch.inference_mode()
def render(
    pipeline: Pipeline,
    vae: Any,
    recipes: Sequence[Recipe],
    told: Sequence[Text],
    on_step: OnStep,
    device: Device,
    chosen: Chosen | None = None,
    guides: Sequence[Guide] = (),
    ask: Ask = asked,
) -> list[Picture | None]:
    """Render recipes that share a lane, with the weights as they are now.

    `told` holds each one's encoded prompts, `guides` the pictures it draws from, `chosen` each one's slots where
    the UNet has its slots engaged; UNet and VAE are called through `ask`.

    Answers one picture for each recipe, None for the dropped ones: their rows are computed to the end, because a shape
    that changes costs more than it saves, but not decoded. Raises InvalidRequest for what this pipeline cannot do and
    RenderFailed when a picture is not a number.
    """
    first = recipes[0]
    factor = vae_factor(vae)
    if first.width % factor or first.height % factor:
        raise InvalidRequest(f"{first.width}x{first.height}: width and height must be multiples of {factor}")
    unet = unet_for(pipeline, first)
    parts = device.spread.parts(len(recipes))
    pace = Pace(on_step, parts)

    def drawn(part: slice) -> list[Callable[[], Decoded]]:
        own = None if chosen is None else chosen.of(part)
        try:
            latents = _denoised(
                pipeline, unet, vae, recipes[part], told[part], own, guides[part], pace.of(part), device, ask
            )
        except BaseException:
            pace.failed()
            raise
        kept = pace.kept(part)
        if latents is None or not kept:
            return []
        if len(kept) < len(latents):
            latents = latents[torch.tensor([index - part.start for index in kept], device=latents.device)]
        if first.frames:
            latents, kept = as_pictures(latents), [index for index in kept for _ in range(first.frames)]
        return decoding(vae, latents, kept, device, ask)

    made: dict[int, list[Picture]] = {}
    for index, picture in decoded(device.spread.flow([partial(drawn, part) for part in parts])):
        made.setdefault(index, []).append(picture)
    pictures: list[Picture | None] = [None] * len(recipes)
    for index in made.keys() - pace.dropped:
        picture = np.stack(made[index]) if first.frames else made[index][0]
        pictures[index] = composited(picture, guides[index]) if first.composite else picture
    return pictures


class Pace:
    """How far the parts of a micro-batch are: each goes on by itself, and `on_step` hears of the slowest."""

    def __init__(self, on_step: OnStep, parts: Sequence[slice]) -> None:
        self._on_step = on_step
        self._done = {part.start: 0 for part in parts}
        self._told = 0
        self._failed = False
        self._lock = Lock()
        self.dropped: set[int] = set()

    def of(self, part: slice) -> Callable[[int, int], bool]:
        """What a part calls after each step, with (steps done, steps in all); answers whether it goes on."""

        def after_step(done: int, steps: int) -> bool:
            with self._lock:
                if self._failed:
                    return False
                self._done[part.start] = done
                while self._told < min(self._done.values()):
                    self._told += 1
                    self.dropped.update(self._on_step(self._told, steps))
                if self._kept(part):
                    return True
                # Of the others' steps on_step is told all the same.
                self._done[part.start] = steps
                return False

        return after_step

    def failed(self) -> None:
        """One part is lost, and the others with it: they stop at their next step, or nobody would hear of theirs."""
        with self._lock:
            self._failed = True

    def kept(self, part: slice) -> list[int]:
        """The rows of a part that nobody has dropped so far."""
        with self._lock:
            return self._kept(part)

    def _kept(self, part: slice) -> list[int]:
        return [index for index in range(part.start, part.stop) if index not in self.dropped]


def _denoised(
    pipeline: Pipeline,
    unet: Any,
    vae: Any,
    recipes: Sequence[Recipe],
    told: Sequence[Text],
    chosen: Chosen | None,
    guides: Sequence[Guide],
    after_step: Callable[[int, int], bool],
    device: Device,
    ask: Ask,
) -> Tensor | None:
    """The latents of recipes that share a lane; None when told to stop."""
    first, factor = recipes[0], vae_factor(vae)
    config = pipeline.scheduler_config | (SCHEDULE if first.motion else {})
    sampling = sampler(first.scheduler, config, first.steps, device.place, first.first_step)
    length = (first.frames,) if first.frames else ()
    shape = (int(unet.config.in_channels), *length, first.height // factor, first.width // factor)
    steps = len(sampling.timesteps)
    noise = Noise([recipe.seed for recipe in recipes], shape, device.place)
    begun, kept = _begin(sampling, vae, first, guides, noise, device)
    controls = Controls.of(pipeline, first, guides, steps, device)
    predict = _predictor(pipeline, unet, first, told, chosen, controls, device, ask)
    return denoise(sampling, predict, begun, lambda done: after_step(done, steps), kept)


def _begin(
    sampling: Sampler, vae: Any, first: Recipe, guides: Sequence[Guide], noise: Noise, device: Device
) -> tuple[Tensor, Kept | None]:
    """The first latents, and what is to be kept of the pictures they begin from. Noise is drawn in the order in which
    diffusers' own pipelines draw it."""
    if first.task == "txt2img":
        return sampling.start(noise), None
    draws = has_distribution(vae)
    clean = encode(vae, guides, noise.draw(1)[0] if draws else None, device)
    if first.task == "img2img":
        return sampling.start(noise, clean), None
    # Stock pipelines encode the picture without its masked part too, for UNets that are told it. Ours is not.
    begun = sampling.start(noise, clean if first.first_step else None, spare=int(draws))
    return begun, Kept(clean, latent_mask(guides, vae_factor(vae), device))


def vae_factor(vae: Any) -> int:
    """Pixels along one side of a latent."""
    channels = getattr(vae.config, "block_out_channels", None) or vae.config.encoder_block_out_channels
    return int(2 ** (len(channels) - 1))


def _predictor(
    pipeline: Pipeline,
    unet: Any,
    first: Recipe,
    told: Sequence[Text],
    chosen: Chosen | None,
    controls: Controls,
    device: Device,
    ask: Ask,
) -> Callable[[Tensor, Tensor, int], Tensor]:
    """The UNet with everything but latents and timestep filled in; guidance only where it is above 1."""
    slots, frames = pipeline.slots, first.frames or 1
    guided = is_guided(pipeline, first)
    rows = [one.asked for one in told]
    if guided:
        rows = [one.refused for one in told if one.refused is not None] + rows
        chosen = None if chosen is None else chosen.twice()
        controls = controls.twice()
    tokens = torch.cat([row.tokens for row in rows])
    options: dict[str, Any] = {}
    if pipeline.family == "sdxl":
        sizes = (first.height, first.width, 0, 0, first.height, first.width)
        options["added_cond_kwargs"] = {
            "text_embeds": torch.cat([row.pooled for row in rows if row.pooled is not None]),
            "time_ids": torch.tensor([sizes], dtype=unet.dtype).repeat(len(rows), 1).to(tokens.device),
        }
    if (width := unet.config.time_cond_proj_dim) is not None:
        scale = torch.full((len(rows),), first.guidance_scale - 1)
        options["timestep_cond"] = guidance_embedding(scale, width).to(tokens.device, unet.dtype)

    # diffusers' own `dtype` walks over every module each time.
    dtype = next(unet.parameters()).dtype

    def predict(latents: Tensor, time: Tensor, step: int) -> Tensor:
        seen = torch.cat([latents, latents]) if guided else latents
        seen = seen.to(dtype)
        if seen.ndim == len("nchw"):
            seen = seen.contiguous(memory_format=torch.channels_last)

        def rows_of(part: slice) -> Tensor:
            some = {name: _rows(value, part) for name, value in options.items()}
            # All frames of an animation are told the same.
            some["encoder_hidden_states"] = (
                tokens[part].repeat_interleave(frames, dim=0) if frames > 1 else tokens[part]
            )
            heard = {name: value for name, value in some.items() if name != "timestep_cond"}
            some |= controls.residuals(seen[part], time, step, part, heard)
            if chosen is not None:
                # In the thread that computes these rows.
                slots.rows.are(chosen.of(part))
            return ask(unet, "__call__", seen[part], time, return_dict=False, **some)

        answer = device.spread.along(rows_of, len(seen)).float()
        if not guided:
            return answer
        without, asked = answer.chunk(2)
        return without + first.guidance_scale * (asked - without)

    return predict


def _rows(value: Any, part: slice) -> Any:
    """Some rows of one of the UNet's inputs, or of each in a dict of them."""
    return {name: one[part] for name, one in value.items()} if isinstance(value, dict) else value[part]


def guidance_embedding(scale: Tensor, width: int) -> Tensor:
    """Guidance minus one, (rows,), as the sinusoidal embedding (rows, width) that full LCM UNets were trained with."""
    half = width // 2
    rates = torch.exp(torch.arange(half, dtype=torch.float32) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = (scale * 1000.0)[:, None] * rates[None, :]
    made = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.nn.functional.pad(made, (0, width % 2))


Decoded = tuple[Sequence[int], Tensor, Tensor]
"""Which rows, their pixels uint8 (n, height, width, 3) on the device, and for each a number that is finite if the
picture is."""


def decode(vae: Any, latents: Tensor, device: Device) -> list[Picture]:
    """Latents (n, channels, height, width) to pictures, a few at a time. Raises RenderFailed for what is no number."""
    found = decoded(device.spread.run(decoding(vae, latents, range(len(latents)), device)))
    return [picture for _, picture in found]


def decoding(
    vae: Any, latents: Tensor, rows: Sequence[int], device: Device, ask: Ask = asked
) -> list[Callable[[], Decoded]]:
    """Calls that decode latents (n, channels, height, width) of these rows, a few each.

    Rounded on the device: a float copy would be four times as large and the host four times as busy.
    """
    latents = unscaled(vae, latents)
    factor = vae_factor(vae)
    pixels = latents.shape[-1] * latents.shape[-2] * factor**2
    ready = latents.to(next(vae.parameters()).dtype).contiguous(memory_format=torch.channels_last)
    share = -(-len(ready) // len(device.spread.parts(len(ready))))
    chunks = torch.split(ready, max(1, min(device.decode_pixels // pixels, share)))

    def rounded(chunk: Tensor, some: Sequence[int]) -> Decoded:
        image = ask(vae, "decode", chunk, return_dict=False).float()
        # A sum is NaN or infinite exactly when a picture is spoilt, and cheaper than looking at every pixel.
        total = image.sum(dim=(1, 2, 3))
        image = image.mul(127.5).add_(127.5).round_().clamp_(0, 255)
        return some, image.permute(0, 2, 3, 1).to(torch.uint8), total

    size = len(chunks[0])
    return [partial(rounded, chunk, rows[n * size : (n + 1) * size]) for n, chunk in enumerate(chunks)]


def decoded(made: Sequence[Decoded]) -> list[tuple[int, Picture]]:
    """Row and picture of all that was decoded, with one copy to the host. Raises RenderFailed for what is no number."""
    if not made:
        return []
    rows = [row for some, _, _ in made for row in some]
    pictures = torch.cat([pixels for _, pixels, _ in made]).cpu().numpy()
    finite = torch.isfinite(torch.cat([total for _, _, total in made])).tolist()
    if broken := sorted({row for row, good in zip(rows, finite, strict=True) if not good}):
        raise RenderFailed("the picture is not a number; try another number type or VAE", rows=broken)
    return [(row, np.ascontiguousarray(picture)) for row, picture in zip(rows, pictures, strict=True)]


def unscaled(vae: Any, latents: Tensor) -> Tensor:
    """Latents as the VAE wants them, from those the UNet works on."""
    config = vae.config
    mean, spread = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is not None and spread is not None:
        shape = (1, -1, 1, 1)
        middle = torch.tensor(mean, device=latents.device, dtype=latents.dtype).view(shape)
        width = torch.tensor(spread, device=latents.device, dtype=latents.dtype).view(shape)
        return latents * width / float(config.scaling_factor) + middle
    return latents / float(config.scaling_factor)
