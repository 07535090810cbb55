"""The ControlNet of `crack-tiny`: cracks that follow a given mask.

    python -m workers.training.crack_tiny_control --model FOLDER --work DIR [--out FOLDER]

Paints walls with their crack masks, encodes them with the model's own autoencoder, and teaches a copy of the UNet's
first half, beside the frozen UNet, to bring the cracks where the mask has them. Goes on after a stop.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from diffusers import ControlNetModel
from diffusers.models.attention_processor import AttnProcessor
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from farm.training import Positive, Seed, Share, Whole
from workers.training import diffusion
from workers.training.arguments import STRICT, checked, use_threads
from workers.training.disk import beside
from workers.training.errors import TrainingError, exit_status
from workers.training.finished import mark, open_finished
from workers.training.loop import Plan, Say, train
from workers.training.pool import open_pool

NAME = "mask"
SIDE = 128
CONDITIONING = (16, 32, 64, 96, 128)
"""Channels on the way from the mask's pixels to latents: one more than the autoencoder halves."""
LARGEST = 20_000_000
"""Bytes that the exported weights may have: the model is made to be shipped."""


@dataclass(frozen=True, slots=True, config=STRICT)
class Settings:
    """Everything that fixes the result, apart from the model, library versions and the processor."""

    seed: Seed = 41
    pictures: Whole = 2_000
    steps: Whole = 400
    rate: Positive = 4e-4
    batch: Whole = 16
    drop: Share = 0.3
    """Share of captions left out, so that the mask alone says where a crack runs."""
    cracks: Annotated[float, Field(ge=0)] = 4.0
    """How much more a place with a crack counts than the wall."""
    bf16: bool = True


class Controlled:
    """The frozen UNet as it is with a ControlNet following these masks (n, 3, height, width), 0..1."""

    def __init__(self, unet: Any, net: Any, masks: Tensor) -> None:
        self.unet, self.net, self.masks = unet, net, masks

    def __call__(self, noisy: Tensor, times: Tensor, encoder_hidden_states: Tensor) -> Any:
        down, middle = self.net(
            noisy, times, encoder_hidden_states=encoder_hidden_states, controlnet_cond=self.masks, return_dict=False
        )
        return self.unet(
            noisy,
            times,
            encoder_hidden_states=encoder_hidden_states,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
        )


def controlnet_for(unet: Any, halvings: int) -> Any:
    """A ControlNet that changes nothing yet, with the UNet's own weights; its pictures are halved so often.

    Raises TrainingError for more halvings than there are channels for.
    """
    if not 0 <= halvings < len(CONDITIONING):
        raise TrainingError(f"an autoencoder that halves {halvings} times is not known here")
    copied = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=CONDITIONING[: halvings + 1])
    # diffusers' from_unet leaves this entry behind: a copy would pool the words' states with another number of heads.
    # It goes with the list of entries that a reader takes from the defaults instead, which has it otherwise.
    config = {name: value for name, value in copied.config.items() if name != "_use_default_values"}
    config["addition_embed_type_num_heads"] = unet.config.addition_embed_type_num_heads
    made = ControlNetModel.from_config(config)
    made.load_state_dict(copied.state_dict())
    return made


def fit(folder: Path, work: Path, settings: Settings, *, minutes: float = math.inf, say: Say = print) -> Any:
    """A trained ControlNet for the model in `folder`; checkpoints in `work` belong to this model and these settings.

    Raises TrainingError when the folder is no model or a checkpoint cannot be written.
    """
    model = open_finished(folder, "to control")
    # More steps may follow: a longer run goes on from a shorter one.
    mine = mark(folder, *(value for name, value in asdict(settings).items() if name != "steps"))
    unet, schedule = model.unet, model.schedule
    torch.manual_seed(settings.seed)
    net = controlnet_for(unet, len(model.vae.config.block_out_channels) - 1)
    # As in the base training: the backward pass of torch's fused attention is slow on CPUs.
    net.set_attn_processor(AttnProcessor())
    net.to(memory_format=torch.channels_last)
    unet.requires_grad_(False).eval()
    walls = open_pool(work, settings.pictures, SIDE, settings.seed)
    latents = diffusion.encode_pool(model.vae, walls, work / f"control-{NAME}-{mine}.npy")
    importance = walls.importance(latents.shape[-1], settings.cracks)

    def step(_: int, rng: np.random.Generator) -> Tensor:
        clean, texts, chosen = diffusion.batch_of(latents, walls.captions, settings.batch, rng)
        texts = ["" if rng.random() < settings.drop else t for t in texts]
        with torch.no_grad():
            states = model.text(diffusion.token_ids(model.tokenizer, texts)).last_hidden_state
        return diffusion.denoising_loss(
            Controlled(unet, net, masks_of(walls.pixels[chosen, :, :, 3])),
            clean,
            states,
            schedule.alphas_cumprod,
            kind=schedule.config.prediction_type,
            importance=torch.from_numpy(importance[chosen].astype(np.float32))[:, None],
            placed=True,
            bf16=settings.bf16,
        )

    plan = Plan(settings.steps, settings.rate, seed=settings.seed, warmup=50, save_every=50, say_every=25)
    plan.minutes = minutes
    net.train()
    train(step, {"controlnet": net}, plan, work / f"control-{NAME}-{mine}.pt", say=say)
    return net.eval()


def masks_of(planes: Any) -> Tensor:
    """Crack masks (n, height, width), 0 or 255, as a ControlNet follows them: (n, 3, height, width), 0..1."""
    one = torch.from_numpy(np.ascontiguousarray(planes)).float().div_(255.0)[:, None]
    return one.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


def export(folder: Path, net: Any) -> int:
    """Write a diffusers ControlNetModel folder, half precision; answers the bytes of its weights.

    What stood there before is replaced only by something whole that may be shipped. Raises TrainingError when it cannot
    be written, does not survive that, or is too large.
    """
    net.to(torch.float16)
    try:
        with beside(folder) as half:
            net.save_pretrained(half, safe_serialization=True)
            return _checked(half, net)
    # safetensors says "I/O error" with an exception of its own.
    except Exception as error:
        if isinstance(error, TrainingError):
            raise
        raise TrainingError(f"cannot write the ControlNet to {folder}: {error}") from error


def _checked(folder: Path, net: Any) -> int:
    """The bytes of the weights. Raises TrainingError when they are others than the net's, or too many."""
    back = ControlNetModel.from_pretrained(folder, torch_dtype=torch.float16, local_files_only=True).state_dict()
    if any(not torch.equal(value, back[name]) for name, value in net.state_dict().items()):
        raise TrainingError(f"{folder} did not survive writing")
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if size > LARGEST:
        raise TrainingError(
            f"the ControlNet has {size / 1e6:.1f} MB of weights, {LARGEST / 1e6:.0f} at most may be shipped"
        )
    return size


def main(arguments: list[str] | None = None) -> int:
    """Train and write the ControlNet; 1 and a reason when it cannot, 3 when its time is over."""
    parser = argparse.ArgumentParser(prog="python -m workers.training.crack_tiny_control")
    parser.add_argument("--model", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--work", type=Path, required=True, help="folder for data and checkpoints")
    parser.add_argument("--out", type=Path, help=f"the ControlNet's folder (default: WORK/control-{NAME})")
    default = Settings()
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--pictures", type=int, default=default.pictures)
    parser.add_argument("--batch", type=int, default=default.batch)
    parser.add_argument("--rate", type=float, default=default.rate)
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="stop after, with status 3; the same command goes on"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args(arguments)
    out = given.out or given.work / f"control-{NAME}"

    def work() -> str:
        use_threads(given.threads)
        chosen = {name: getattr(given, name) for name in ("pictures", "steps", "rate", "batch")}
        settings = checked(Settings, chosen)
        net = fit(given.model, given.work, settings, minutes=given.minutes, say=partial(print, flush=True))
        size = export(out, net)
        (given.work / "control-settings.json").write_text(json.dumps(asdict(settings), indent=2) + "\n", "utf-8")
        return f"{out}: {size / 1e6:.1f} MB"

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
