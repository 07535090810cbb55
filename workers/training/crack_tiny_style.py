"""The style adapter of `crack-tiny`: night light, a small LoRA on the finished model.

    python -m workers.training.crack_tiny_style --model FOLDER --work DIR [--out FILE]

Paints walls by night, encodes them with the model's own autoencoder, and teaches a LoRA on the frozen UNet to draw
them; half of the captions do not mention the night, so the adapter's weight alone brings it. Goes on after a stop.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from numpy.typing import NDArray
from pydantic.dataclasses import dataclass
from torch import Tensor

from farm.painter import Scene, sample_scene
from farm.painter.night import night_caption, paint_night
from farm.training import Positive, Rank, Seed, Share, Whole
from workers.training import diffusion, distill
from workers.training.arguments import STRICT, checked, use_threads
from workers.training.errors import exit_status
from workers.training.export import export_lora
from workers.training.finished import mark, open_finished
from workers.training.loop import Plan, Say, train
from workers.training.pool import Pool

NAME = "night"
SIDE = 128


@dataclass(frozen=True, slots=True, config=STRICT)
class Settings:
    """Everything that fixes the result, apart from the model, library versions and the processor."""

    seed: Seed = 31
    pictures: Whole = 1_500
    steps: Whole = 3_000
    rate: Positive = 8e-4
    batch: Whole = 16
    rank: Rank = 16
    drop: Share = 0.1
    bf16: bool = True


def scenes(settings: Settings) -> list[Scene]:
    """What is painted by night: scenes as often as by day, drawn with a seed of their own."""
    rng = np.random.default_rng((settings.seed, 77))
    return [sample_scene(rng) for _ in range(settings.pictures)]


def pool(settings: Settings) -> Pool:
    """Walls by night, 128 pixels a side, with their masks."""
    drawn = scenes(settings)
    pixels = np.empty((len(drawn), SIDE, SIDE, 4), np.uint8)
    for i, scene in enumerate(drawn):
        painted = paint_night(scene, SIDE, SIDE, settings.seed * 10_000_019 + i)
        pixels[i, :, :, :3] = painted.picture
        pixels[i, :, :, 3] = painted.mask * np.uint8(255)
    return Pool(pixels, drawn)


def fit(
    folder: Path, work: Path, settings: Settings, *, minutes: float = math.inf, say: Say = print
) -> UNet2DConditionModel:
    """The model's UNet with a trained adapter; checkpoints in `work` belong to this model and these settings alone.

    Raises TrainingError when the folder is no model or a checkpoint cannot be written.
    """
    model = open_finished(folder, "to learn a style on")
    # More steps may follow: a longer run goes on from a shorter one.
    mine = mark(folder, *(value for name, value in asdict(settings).items() if name != "steps"))
    unet, schedule = model.unet, model.schedule
    torch.manual_seed(settings.seed)
    distill.attach(unet, settings.rank)
    work.mkdir(parents=True, exist_ok=True)
    night = pool(settings)
    latents = diffusion.encode_pool(model.vae, night, work / f"style-{NAME}-{mine}.npy")

    def words(chosen: NDArray[np.int64], rng: np.random.Generator) -> list[str]:
        return [night_caption(night.scenes[int(i)], rng) for i in chosen]

    def step(_: int, rng: np.random.Generator) -> Tensor:
        clean, texts, _chosen = diffusion.batch_of(latents, words, settings.batch, rng)
        texts = ["" if rng.random() < settings.drop else t for t in texts]
        with torch.no_grad():
            states = model.text(diffusion.token_ids(model.tokenizer, texts)).last_hidden_state
        kind = schedule.config.prediction_type
        return diffusion.denoising_loss(unet, clean, states, schedule.alphas_cumprod, kind=kind, bf16=settings.bf16)

    plan = Plan(settings.steps, settings.rate, seed=settings.seed, warmup=30, save_every=50, say_every=25)
    plan.minutes = minutes
    unet.train()
    train(step, {"unet": unet}, plan, work / f"style-{NAME}-{mine}.pt", say=say)
    return unet.eval()


def main(arguments: list[str] | None = None) -> int:
    """Train and write the adapter; 1 and a reason when it cannot, 3 when its time is over."""
    parser = argparse.ArgumentParser(prog="python -m workers.training.crack_tiny_style")
    parser.add_argument("--model", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--work", type=Path, required=True, help="folder for data and checkpoints")
    parser.add_argument("--out", type=Path, help=f"the adapter (default: MODEL/style-{NAME}.safetensors)")
    default = Settings()
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--pictures", type=int, default=default.pictures)
    parser.add_argument("--rate", type=float, default=default.rate)
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="stop after, with status 3; the same command goes on"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args(arguments)
    out = given.out or given.model / f"style-{NAME}.safetensors"

    def work() -> str:
        use_threads(given.threads)
        settings = checked(Settings, {"pictures": given.pictures, "steps": given.steps, "rate": given.rate})
        unet = fit(given.model, given.work, settings, minutes=given.minutes, say=partial(print, flush=True))
        notes = {"modelspec.title": f"crack-tiny {NAME}", "modelspec.license": "Apache-2.0"}
        export_lora(out, unet, notes)
        (given.work / "style-settings.json").write_text(json.dumps(asdict(settings), indent=2) + "\n", "utf-8")
        return f"{out}: {out.stat().st_size / 1e6:.1f} MB"

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
