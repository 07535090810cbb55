"""The checkpoint that is trained on: Stable Diffusion 1.x, 2.x or SDXL, frozen, with a new adapter on it."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from diffusers.training_utils import cast_training_params
from numpy.typing import NDArray
from peft import LoraConfig
from torch import Tensor, nn

from workers.pipelines.load import Pipeline, load
from workers.pipelines.prompts import encode
from workers.training.data import some
from workers.training.errors import TrainingError

TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""What is adapted in a text encoder, as diffusers' scripts do."""
SLICE = 4
"""Pictures the autoencoder takes at once, in float32: more would need the memory that training needs."""
PIECE = 64 * 1024
"""Bytes."""
READ = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
"""Folders of a checkpoint whose configurations decide what is learnt."""


@dataclass(frozen=True, slots=True)
class Condition:
    """What the UNet is told beside latents and time, on the device.

    `states` (n, 77, width); for SDXL `pooled` (n, width) and `sizes` (n, 6) as in `Example.sizes`. Where the text
    encoders learn, `tokens` holds what each of them reads (n, 77) and states and pooled come from the network.
    """

    states: Tensor | None
    pooled: Tensor | None
    sizes: Tensor | None
    tokens: tuple[Tensor, ...] = ()
    full: Tensor | None = None


class Network(nn.Module):
    """What learns, as one module, so that several devices keep it equal in one go: the UNet, and `learning` texts."""

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__()
        self.unet = pipeline.unet
        self.learning = nn.ModuleList()
        # In a tuple torch does not look for submodules.
        self._pipeline = (pipeline,)

    @property
    def texts(self) -> list[Any]:
        """The text encoders, learning or not."""
        return [encoder.model for encoder in self._pipeline[0].encoders]

    def read(self, tokens: Sequence[Tensor], full: Tensor) -> tuple[Tensor, Tensor | None]:
        """States and pooled states. `full` (n,) is 0 for an empty text that the pipeline replaces by zeros, else 1."""
        made = encode(self._pipeline[0], [_Tokens(each) for each in tokens])
        pooled = None if made.pooled is None else made.pooled * full.view(-1, 1).to(made.pooled.dtype)
        return made.tokens * full.view(-1, 1, 1).to(made.tokens.dtype), pooled

    def forward(self, latents: Tensor, times: Tensor, told: Condition) -> Tensor:
        """What the UNet predicts, in float32."""
        states, pooled = told.states, told.pooled
        if told.tokens and told.full is not None:
            states, pooled = self.read(told.tokens, told.full)
        added = None
        if told.sizes is not None:
            added = {"text_embeds": pooled, "time_ids": told.sizes}
        guess: Tensor = self.unet(latents, times, encoder_hidden_states=states, added_cond_kwargs=added).sample
        return guess.float()


@dataclass(frozen=True, slots=True)
class _Tokens:
    """What `encode` takes from a tokenizer. Every place is attended to, as Stable Diffusion was trained."""

    input_ids: Tensor

    @property
    def attention_mask(self) -> Tensor:
        return torch.ones_like(self.input_ids)


@dataclass(eq=False)
class Base:
    """A loaded checkpoint.

    `alphas` (timesteps,) are cumulative products, in host memory; `kind` is what it predicts.
    `factor` is the width of a latent in pixels.
    """

    pipeline: Pipeline
    network: Network
    alphas: Tensor
    kind: str
    factor: int
    fingerprint: str

    @property
    def xl(self) -> bool:
        return self.pipeline.family == "sdxl"

    @property
    def vae(self) -> Any:
        return self.pipeline.vae

    @property
    def native(self) -> int:
        """Side of the pictures that the checkpoint was made for, pixels."""
        return int(self.pipeline.unet.config.sample_size) * self.factor

    def park(self) -> None:
        """Text encoders and autoencoder to host memory, where a run with a cache does not need them."""
        self.move_helpers(torch.device("cpu"))

    def move_helpers(self, device: torch.device) -> None:
        """Text encoders and autoencoder to a device."""
        for module in (self.vae, *self.network.texts):
            module.to(device)

    def check_size(self, width: int, height: int) -> None:
        """Raises TrainingError for a size that its autoencoder cannot halve often enough."""
        for name, pixels in (("width", width), ("height", height)):
            if pixels < self.factor or pixels % self.factor:
                near = max(self.factor, round(pixels / self.factor) * self.factor)
                raise TrainingError(f"--size: {name} {pixels} is no multiple of {self.factor}; {near} would be")

    def tokens(self, texts: Sequence[str]) -> tuple[tuple[Tensor, ...], Tensor]:
        """What each text encoder reads (n, 77), and `full` (n,) for `Network.read`."""
        made = tuple(
            tokenizer(
                list(texts),
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            for tokenizer, _ in self.pipeline.encoders
        )
        zero = self.pipeline.zero_empty_negative
        return made, torch.tensor([0.0 if zero and not text else 1.0 for text in texts])

    @torch.no_grad()
    def moments(self, pixels: NDArray[np.uint8]) -> Tensor:
        """Mean and log variance (n, 2c, h, w) of the latents of pictures (n, height, width, 3), float32."""
        made = []
        for start in range(0, len(pixels), SLICE):
            part = torch.from_numpy(pixels[start : start + SLICE]).to(self.vae.device)
            scaled = part.permute(0, 3, 1, 2).float() / 127.5 - 1.0
            made.append(self.vae.encode(scaled).latent_dist.parameters)
        return torch.cat(made)

    def latents(self, moments: Tensor) -> Tensor:
        """A draw (n, c, h, w) of the latents, scaled as the UNet knows them; torch's host generator decides."""
        mean, spread = moments.float().chunk(2, dim=1)
        noise = torch.randn(mean.shape).to(mean.device)
        scale = float(self.vae.config.scaling_factor)
        # Limits as in diffusers' DiagonalGaussianDistribution.
        return (mean + (0.5 * spread.clamp(-30.0, 20.0)).exp() * noise) * scale


def open_base(folder: Path) -> Base:
    """Load a checkpoint in float32, frozen, in host memory.

    Raises InvalidModel for a folder of another family or with unsafe files, and TrainingError for one that cannot be
    trained on: an inpainting UNet, a schedule that is not one of DDPM, a tiny autoencoder.
    """
    if not folder.is_dir():
        hint = "a single file: convert it to a diffusers folder first" if folder.is_file() else "no such folder"
        raise TrainingError(f"--checkpoint {folder}: {hint}")
    pipeline = load(folder, folder.name, torch.float32, torch.float32)
    unet, vae = pipeline.unet, pipeline.vae
    if not isinstance(vae, AutoencoderKL) or getattr(vae.config, "latents_mean", None) is not None:
        raise TrainingError(f"{folder}: training needs a plain AutoencoderKL, not {type(vae).__name__}")
    channels = int(vae.config.latent_channels)
    if (unet.config.in_channels, unet.config.out_channels) != (channels, channels):
        raise TrainingError(
            f"{folder}: its UNet takes {unet.config.in_channels} channels and gives {unet.config.out_channels}, where "
            f"text-to-image on {channels} latent channels is wanted (9 in: an inpainting checkpoint)"
        )
    schedule = pipeline.scheduler_config
    name = str(schedule.get("_class_name"))
    if name.startswith(("EDM", "FlowMatch")) or "beta_start" not in schedule:
        raise TrainingError(f"{folder}: {name} is no schedule of DDPM noise, which SD 1.x, 2.x and SDXL have")
    ddim = DDIMScheduler.from_config(schedule)
    kind = str(ddim.config.prediction_type)
    if kind not in {"epsilon", "v_prediction"}:
        raise TrainingError(f"{folder}: prediction_type {kind!r} cannot be trained; epsilon and v_prediction can")
    if kind == "epsilon" and float(ddim.alphas_cumprod[-1]) == 0.0:
        raise TrainingError(f"{folder}: a schedule that ends in noise alone needs v_prediction, not epsilon")
    network = Network(pipeline)
    for part in (network.unet, *network.texts):
        part.requires_grad_(False)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    return Base(pipeline, network, ddim.alphas_cumprod, kind, factor, _fingerprint(folder))


def attach(base: Base, targets: Sequence[str], *, chosen: bool, rank: int, alpha: float, text: bool) -> None:
    """Put an untrained adapter on the UNet, and on the text encoders if `text`; its weights are float32.

    `targets` are names or ends of names of linear and convolution layers. Those of a preset may be absent; when the
    person `chosen` them, an absent one is an error that names near ones.
    """
    unet = base.network.unet
    present = matching(unet, targets)
    if absent := [name for name in targets if name not in present]:
        if chosen:
            known = sorted({end for path in _layers(unet) for end in _ends(path)})
            near = {name: difflib.get_close_matches(name, known, 4, 0.5) for name in absent}
            told = "; ".join(f"{name!r} (near: {some(found) or 'nothing'})" for name, found in near.items())
            raise TrainingError(f"--target: the UNet has no linear or convolution layer {told}")
        targets = [name for name in targets if name in present]
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets)))
    if text:
        base.network.learning.extend(base.network.texts)
        for encoder in base.network.texts:
            encoder.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(TEXT_TARGETS)))
    cast_training_params([unet, *base.network.texts], dtype=torch.float32)


def matching(module: nn.Module, targets: Sequence[str]) -> set[str]:
    """Those targets that name a layer an adapter can sit on."""
    layers = _layers(module)
    return {name for name in targets if any(path == name or path.endswith(f".{name}") for path in layers)}


def _layers(module: nn.Module) -> list[str]:
    return [path for path, part in module.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)]


def _ends(path: str) -> list[str]:
    """`a.b.c` as c, b.c and a.b.c."""
    parts = path.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _fingerprint(folder: Path) -> str:
    """Names and sizes of the weights and two pieces of each file, as fine-tunes have equal names and sizes; and all
    that is said of them: what they predict and for which noise is in the scheduler's configuration alone."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        size = path.stat().st_size
        found.update(f"{path.relative_to(folder)} {size}".encode())
        with path.open("rb") as file:
            for start in (size // 2, max(0, size - PIECE)):
                file.seek(start)
                found.update(file.read(PIECE))
    said = [path for part in READ for path in (folder / part).glob("*") if path.suffix in {".json", ".txt"}]
    for path in sorted([folder / "model_index.json", *said]):
        found.update(f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}".encode())
    return found.hexdigest()
