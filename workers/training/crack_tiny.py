"""The recipe of `crack-tiny`, from painted walls to the files that are shipped.

    python -m workers.training.crack_tiny --work DIR --out FOLDER [--quick]

Stages: autoencoder -> refine -> words -> base -> distil -> decoder -> reader -> sharpen -> export. Each writes
checkpoints to the working folder and continues there after a kill; the same command again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from farm.painter import caption, sample_scene
from farm.training import flag
from workers.training import autoencoder, diffusion, distill, sharpen, tokens
from workers.training.arguments import checked, use_threads
from workers.training.crack_tiny_settings import QUICK, Settings
from workers.training.disk import beside
from workers.training.errors import exit_status
from workers.training.export import export_lora, export_pipeline, export_profile
from workers.training.loop import Plan
from workers.training.pool import Pool, open_pool
from workers.training.questions import MEANINGS, answers

STAGES = ("autoencoder", "refine", "words", "base", "distil", "decoder", "reader", "sharpen", "export")
SIDE = 128
LAST_STEPS = (0, 139, 259, 259)
"""Timesteps of which the last of 4 and of 8 LCM steps start; 0 stands for samplers that end in clean latents."""
CAPTIONS = 20_000
"""What the tokenizer is learned from."""
Latents = np.ndarray[tuple[int, ...], np.dtype[np.float16]]
CERTAIN = 0.9
"""A caption answers a question if the text encoder is as sure as this; of captions that leave one open nothing is
asked."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """The stages over one working folder."""

    work: Path
    settings: Settings
    minutes: float = math.inf
    compiled: bool = False
    say: Callable[[str], None] = print

    def plan(self, stage: str, number: int) -> Plan:
        """How a stage learns. Its own settings and those it shares decide the result, not those of later ones."""
        steps, rate = (getattr(self.settings, f"{stage}_{name}") for name in ("steps", "rate"))
        return Plan(
            steps,
            rate,
            seed=self.settings.seed + number,
            minutes=self.minutes,
            settings=self.settings.decisive(stage),
        )

    def pool(self) -> Pool:
        return open_pool(self.work, self.settings.pool, SIDE, self.settings.seed)

    def tokenizer(self) -> CLIPTokenizer:
        return _tokenizer(self.work / "tokenizer", self.settings.seed)

    def autoencoder(self) -> AutoencoderKL:
        plan = self.plan("autoencoder", 0)
        path = self.work / "autoencoder.pt"
        return autoencoder.fit(self.pool(), plan, path, bf16=self.settings.bf16, say=self.say)

    def refine(self) -> AutoencoderKL:
        """The autoencoder that also keeps what is a pixel wide."""
        model = self.autoencoder()
        plan = self.plan("refine", 5)
        autoencoder.refine(model, self.pool(), plan, self.work / "refine.pt", bf16=self.settings.bf16, say=self.say)
        return model

    def latents(self) -> Latents:
        return _latents(self)

    def words(self) -> CLIPTextModel:
        return self.words_with_answers()[0]

    def words_with_answers(self) -> tuple[CLIPTextModel, nn.ModuleDict]:
        """The text encoder, and what names a caption's answer to each question."""
        tokenizer = self.tokenizer()
        torch.manual_seed(self.settings.seed + 4)
        text = diffusion.build_text(diffusion.Size(), tokenizer)
        plan = self.plan("words", 4)
        path, bf16 = self.work / "words.pt", self.settings.bf16
        heads = diffusion.learn_words(text, MEANINGS, tokenizer, plan=plan, checkpoint=path, bf16=bf16, say=self.say)
        return text, heads

    def base(self) -> tuple[UNet2DConditionModel, CLIPTextModel]:
        plan = self.plan("base", 1)
        text = self.words()
        unet = diffusion.fit(
            self.latents(),
            self.pool().captions,
            self.tokenizer(),
            text,
            size=diffusion.Size(),
            plan=plan,
            checkpoint=self.work / "base.pt",
            batch=self.settings.base_batch,
            bf16=self.settings.bf16,
            importance=self.pool().importance(diffusion.Size().grid, self.settings.crack_importance),
            compiled=self.compiled,
            say=self.say,
        )
        return unet, text

    def distillation(self) -> distill.Recipe:
        return distill.Recipe(
            rank=self.settings.distil_rank,
            skip=self.settings.distil_skip,
            low=self.settings.distil_low,
            high=self.settings.distil_high,
        )

    def lessons(self, text: CLIPTextModel) -> distill.Batch:
        """What distillation learns from, a batch at a time."""
        latents, pool, tokenizer = self.latents(), self.pool(), self.tokenizer()
        count = self.settings.distil_batch
        with torch.no_grad():
            empty = text(diffusion.token_ids(tokenizer, [""])).last_hidden_state

        importance = pool.importance(diffusion.Size().grid, self.settings.crack_importance)

        def batch(rng: np.random.Generator) -> distill.Lesson:
            clean, texts, chosen = diffusion.batch_of(latents, pool.captions, count, rng)
            with torch.no_grad():
                states = text(diffusion.token_ids(tokenizer, texts)).last_hidden_state
            counts = torch.from_numpy(importance[chosen].astype(np.float32)).unsqueeze(1)
            return distill.Lesson(clean, states, empty.expand(count, -1, -1), counts)

        return batch

    def distil(self) -> tuple[UNet2DConditionModel, CLIPTextModel]:
        """Base model with a trained adapter on its UNet."""
        unet, text = self.base()
        distill.fit(
            unet,
            diffusion.scheduler(),
            self.lessons(text),
            recipe=self.distillation(),
            plan=self.plan("distil", 2),
            checkpoint=self.work / "distil.pt",
            bf16=self.settings.bf16,
            say=self.say,
        )
        with torch.no_grad():
            for name, weight in unet.named_parameters():
                if ".lora_B." in name:
                    weight.mul_(self.settings.distil_strength)
        return unet, text

    def decoder(self) -> AutoencoderKL:
        """The autoencoder whose decoder knows how the adapter's few steps end."""
        model = self.refine()
        unet, text = self.distil()
        pool, tokenizer = self.pool(), self.tokenizer()
        student = sharpen.Student(unet.eval(), diffusion.scheduler(), bf16=self.settings.bf16)

        def guess(latents: Tensor, chosen: NDArray[np.int64], rng: np.random.Generator) -> Tensor:
            at = int(rng.choice(LAST_STEPS))
            if not at:
                return latents + 0.1 * torch.randn_like(latents)
            with torch.no_grad():
                told = text(diffusion.token_ids(tokenizer, pool.captions(chosen, rng))).last_hidden_state
                alpha = student.alphas[at]
                noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * torch.randn_like(latents)
                return student.answer(noisy, at, told)

        autoencoder.learn_to_decode(
            model,
            self.latents(),
            pool,
            guess,
            self.plan("decoder", 8),
            self.work / "decode.pt",
            share=self.settings.decoder_share,
            bf16=self.settings.bf16,
            say=self.say,
        )
        return model

    def seen(self) -> tuple[Latents, dict[str, int], dict[str, NDArray[np.int64]]]:
        """What the reader learns from: latents, how many answers each question has, and the right ones."""
        scenes = self.pool().scenes
        known = answers(scenes)
        whole = np.array([not scene.cracked for scene in scenes])
        for name in ("width", "form"):
            known[name][whole] = sharpen.UNKNOWN
        return self.latents(), MEANINGS.kinds, known

    def odds(self) -> NDArray[np.float64] | None:
        """How likely the student is asked for what each wall of the pool shows; None: all alike."""
        return None

    def wanted(self, told: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the reader should find, by what captions say."""
        return told

    def reader(self) -> list[sharpen.Reader]:
        """Who says what the student's pictures show: several readers of the same walls."""
        latents, kinds, known = self.seen()
        walls = sharpen.content(latents, known)
        size, readers = diffusion.Size(), list[sharpen.Reader]()
        for number in range(self.panel()):
            # Each has a beginning and an order of its own.
            offset = 6 + 100 * number
            plan = self.plan("reader", offset)
            # Counts are among the settings; what was counted may be painted otherwise by another release.
            plan.settings = {**plan.settings, "walls to learn": walls}
            torch.manual_seed(plan.seed)
            reader = sharpen.Reader(size.latent, kinds)
            sharpen.learn_to_read(
                reader,
                latents,
                known,
                diffusion.scheduler().alphas_cumprod,
                blur=sharpen.Sharpening().blur,
                plan=plan,
                checkpoint=self.work / (f"reader-{number + 1}.pt" if number else "reader.pt"),
                bf16=self.settings.bf16,
                say=self.say,
            )
            readers.append(reader)
        return readers

    def panel(self) -> int:
        """How many readers there are."""
        return 1

    def sharpening(self) -> sharpen.Sharpening:
        return sharpen.Sharpening(weight=self.settings.sharpen_weight)

    def sharpen(self) -> tuple[UNet2DConditionModel, CLIPTextModel]:
        """The same adapter, taught by how well a reader recognises what it makes."""
        unet, text = self.distil()
        pool, tokenizer = self.pool(), self.tokenizer()
        heads, size, odds = self.words_with_answers()[1], diffusion.Size(), self.odds()

        def trial(rng: np.random.Generator) -> sharpen.Asked:
            chosen = rng.choice(len(pool.scenes), self.settings.distil_batch, p=odds)
            ids = diffusion.token_ids(tokenizer, pool.captions(chosen, rng))
            told = {}
            with torch.no_grad():
                states = text(ids).last_hidden_state
                meant = diffusion.meaning(states, ids == tokenizer.eos_token_id)
                for name, head in heads.items():
                    sure, answer = head(meant).softmax(1).max(1)
                    told[name] = answer.masked_fill(sure < CERTAIN, sharpen.UNKNOWN)
            return sharpen.Asked(states, self.wanted(told))

        sharpen.fit(
            unet,
            diffusion.scheduler(),
            trial,
            distill.learning(
                unet, diffusion.scheduler(), self.lessons(text), self.distillation(), bf16=self.settings.bf16
            ),
            self.reader(),
            shape=(size.latent, size.grid, size.grid),
            recipe=self.sharpening(),
            plan=self.plan("sharpen", 7),
            checkpoint=self.work / "sharpen.pt",
            bf16=self.settings.bf16,
            say=self.say,
        )
        return unet, text

    def export(self, out: Path) -> None:
        """The model's folder; what stood there before stays until all of the new one is written."""
        unet, text = self.sharpen()
        with beside(out) as half:
            export_lora(half / "lcm-lora.safetensors", unet, NOTES)
            unet.unload_lora()
            export_pipeline(
                half,
                vae=self.decoder(),
                text=text,
                tokenizer=self.tokenizer(),
                unet=unet,
                schedule=diffusion.scheduler(),
            )
            export_profile(half / "profile.json", PROFILE)
        recipe = json.dumps(asdict(self.settings), indent=2)
        (self.work / "settings.json").write_text(recipe + "\n", "utf-8")


@cache
def _latents(recipe: Recipe) -> Latents:
    """What the finished autoencoder makes of the pool: kept under a name that no other one of either shares."""
    vae, settings = recipe.refine(), recipe.settings
    name = f"latents-{settings.pool}-{settings.seed}-{autoencoder.fingerprint(vae)}.npy"
    return diffusion.encode_pool(vae, recipe.pool(), recipe.work / name)


@cache
def _tokenizer(folder: Path, seed: int) -> CLIPTokenizer:
    """The same every time: it is learned from seeded captions."""
    rng = np.random.default_rng((seed, 3))
    return tokens.build((caption(sample_scene(rng), rng) for _ in range(CAPTIONS)), folder)


NOTES = {"modelspec.title": "crack-tiny LCM-LoRA", "modelspec.license": "Apache-2.0"}
PROFILE = {
    "family": "crack-tiny",
    "width": SIDE,
    "height": SIDE,
    "min_size": 64,
    "max_size": 256,
    "size_multiple": 32,
    "steps": 4,
    "guidance_scale": 1.0,
    "teacher_steps": 50,
    "teacher_guidance_scale": 3.0,
    "lcm_lora": "lcm-lora.safetensors",
}


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe, or one stage with all before it; 1 and a reason when it cannot, 3 when its time is over."""
    parser = argparse.ArgumentParser(prog="python -m workers.training.crack_tiny")
    parser.add_argument("--work", type=Path, required=True, help="folder for data and checkpoints")
    parser.add_argument("--out", type=Path, help="folder for the model (default: WORK/crack-tiny)")
    parser.add_argument("--stage", choices=STAGES, default="export", help="last stage to run")
    parser.add_argument("--minutes", type=float, default=math.inf, help="leave a stage that takes longer: status 3")
    parser.add_argument("--quick", action="store_true", help="ten minutes, rough pictures")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    default = Settings()
    for name, value in asdict(default).items():
        if name != "bf16":
            parser.add_argument(flag(name), type=type(value))
    parser.add_argument("--compile", action="store_true", help="compile the base's UNet: needs a C++ compiler")
    parser.add_argument("--float32", action="store_true", help="no bfloat16 autocast")
    given = vars(parser.parse_args(arguments))
    start = asdict(QUICK if given["quick"] else default)
    chosen = {k: given[k] for k in start if given.get(k) is not None}
    out = given["out"] or given["work"] / "crack-tiny"

    def work() -> str:
        use_threads(given["threads"])
        settings = checked(Settings, {**start, **chosen, "bf16": not given["float32"]})
        recipe = Recipe(given["work"], settings, given["minutes"], given["compile"], partial(print, flush=True))
        if given["stage"] != "export":
            getattr(recipe, given["stage"])()
            return f"{given['work']}: {given['stage']} is done"
        recipe.export(out)
        return f"{out}: the model"

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
