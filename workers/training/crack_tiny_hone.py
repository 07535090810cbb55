"""Sharpens the LCM-LoRA of a finished `crack-tiny` further, without the working folder it was made in.

    python -m workers.training.crack_tiny_hone --model FOLDER --work DIR [--out FILE]

Everything else stays as it is in FOLDER. Readers learn anew, on walls encoded with the folder's own autoencoder, and
the last stage of `workers.training.crack_tiny` goes on from the folder's own adapter, with the direction of a crack
counting more. What such adapters draw wrong is shown to the readers as wrong: walls with cracks that run two ways, and
diagonals that neither rise nor fall as a whole. Wet walls, where most of that happens, are asked for more often. Goes
on after a stop; called again with what it made in the folder, it goes on with that.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import pydantic.dataclasses
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.utils import convert_unet_state_dict_to_peft
from numpy.typing import NDArray
from peft import set_peft_model_state_dict
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from farm.training import Positive, Seed, Whole, flag
from workers.training import crack_tiny, crack_tiny_settings, diffusion, distill, sharpen
from workers.training.arguments import STRICT, checked, use_threads
from workers.training.errors import TrainingError, exit_status
from workers.training.export import export_lora
from workers.training.finished import check_finished, mark
from workers.training.loop import Plan
from workers.training.questions import CROSSED, DIAGONAL, LEANS, MEANINGS, bent, crossed, lean

LCM = "lcm-lora.safetensors"
Weight = Annotated[float, Field(ge=0)]


@pydantic.dataclasses.dataclass(frozen=True, slots=True, config=STRICT)
class Settings:
    """Everything that fixes the result, apart from the model, library versions and the processor."""

    seed: Seed = 1
    pool: Whole = 12_000
    words_steps: Whole = 800
    words_rate: Positive = 5e-3
    reader_steps: Whole = 3_000
    reader_rate: Positive = 1e-3
    readers: Whole = 2
    """So many, each of a seed of its own: an adapter learns to please one that is alone."""
    sharpen_steps: Whole = 2_000
    sharpen_rate: Positive = 3e-4
    sharpen_weight: Positive = 0.02
    direction: Weight = 3.0
    lean: Weight = 5.0
    wall: Weight = 3.0
    """How often these questions count."""
    crossed: Whole = 4_000
    bent: Whole = 2_000
    """Walls with cracks put together from two, and with halves of two diagonal ones, of which the reader learns what
    running two ways looks like."""
    wet: Positive = 3.0
    whole: Positive = 3.0
    """How many times as often as others wet walls are asked for, and walls without cracks."""
    walks: tuple[Annotated[int, Field(ge=1, le=50)], ...] = (1, 1, 4, 8, 8, 8)
    """Numbers of steps the student walks, one drawn each time."""
    deep: Whole = 2
    """How many of the steps walked last answer for what the reader finds."""
    remembered: Annotated[int, Field(ge=2)] = 64
    """Among so many pictures of diagonal cracks enough have to rise and enough to fall."""
    bf16: bool = True

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not self.walks:
            raise ValueError("--walks needs a number of steps")
        return self


@dataclass(frozen=True, slots=True)
class Honing(crack_tiny.Recipe):
    """The recipe's last stages over a model there is: what came before them is read from its folder."""

    model: Path = Path()
    honing: Settings = field(default_factory=Settings)

    def plan(self, stage: str, number: int) -> Plan:
        plan = crack_tiny.Recipe.plan(self, stage, number)
        own = {one.name for one in fields(Settings)} - {one.name for one in fields(crack_tiny_settings.Settings)}
        more = {"reader": {"crossed", "bent"}, "sharpen": own}.get(stage, set())
        plan.settings = {**plan.settings, **{name: getattr(self.honing, name) for name in sorted(more)}}
        return plan

    def tokenizer(self) -> CLIPTokenizer:
        return CLIPTokenizer.from_pretrained(self.model / "tokenizer")

    def refine(self) -> AutoencoderKL:
        vae: AutoencoderKL = AutoencoderKL.from_pretrained(self.model / "vae", torch_dtype=torch.float32)
        return vae.eval()

    def words_with_answers(self) -> tuple[CLIPTextModel, nn.ModuleDict]:
        """The text encoder stays; what names the answers was not shipped with it and is learned anew."""
        text = CLIPTextModel.from_pretrained(self.model / "text_encoder").float().requires_grad_(False)
        plan = self.plan("words", 4)
        torch.manual_seed(plan.seed)
        path = self.work / "answers.pt"
        heads = diffusion.learn_words(
            text, MEANINGS, self.tokenizer(), plan=plan, checkpoint=path, bf16=False, say=self.say
        )
        return text.eval(), heads.requires_grad_(False)

    def base(self) -> tuple[UNet2DConditionModel, CLIPTextModel]:
        unet = UNet2DConditionModel.from_pretrained(self.model / "unet", torch_dtype=torch.float32)
        # As in the base training: the backward pass of torch's fused attention is slow on CPUs.
        unet.set_attn_processor(AttnProcessor())
        return unet.to(memory_format=torch.channels_last), self.words()

    def distil(self) -> tuple[UNet2DConditionModel, CLIPTextModel]:
        """The UNet with the adapter of the folder on it, ready to learn on."""
        unet, text = self.base()
        adapt(unet, self.model / LCM)
        return unet, text

    def seen(self) -> tuple[crack_tiny.Latents, dict[str, int], dict[str, NDArray[np.int64]]]:
        latents, kinds, known = crack_tiny.Recipe.seen(self)
        known = known | {"lean": lean(self.pool())}
        for name, make, count in (("crossed", crossed, self.honing.crossed), ("bent", bent, self.honing.bent)):
            pool, more = make(self.pool(), count, np.random.default_rng((self.settings.seed, 9)))
            # By what they are, not by how many: another release may put together other ones.
            path = self.work / f"{name}-{sha256(pool.pixels.data).hexdigest()[:12]}.npy"
            latents = np.concatenate((latents, diffusion.encode_pool(self.refine(), pool, path)))
            known = {question: np.concatenate((right, more[question])) for question, right in known.items()}
        return latents, kinds | {"direction": CROSSED + 1, "lean": len(LEANS)}, known

    def panel(self) -> int:
        return self.honing.readers

    def odds(self) -> NDArray[np.float64]:
        scenes = self.pool().scenes
        often = np.where([scene.water for scene in scenes], self.honing.wet, 1.0)
        often *= np.where([scene.cracked for scene in scenes], 1.0, self.honing.whole)
        odds: NDArray[np.float64] = often / often.sum()
        return odds

    def wanted(self, told: dict[str, Tensor]) -> dict[str, Tensor]:
        """A diagonal crack may rise or fall; it may not do both."""
        diagonal = told["direction"] == DIAGONAL
        return told | {"lean": torch.where(diagonal, sharpen.ANY, sharpen.UNKNOWN)}

    def sharpening(self) -> sharpen.Sharpening:
        honing = self.honing
        return replace(
            crack_tiny.Recipe.sharpening(self),
            walks=honing.walks,
            deep=honing.deep,
            remembered=honing.remembered,
            emphasis={"direction": honing.direction, "lean": honing.lean, "wall": honing.wall},
        )


def adapt(unet: UNet2DConditionModel, path: Path) -> None:
    """Freeze the UNet and give it the adapter of a file in a form that can learn on.

    Raises TrainingError when the file is none, or was made for other layers or with a strength that is not 1.
    """
    try:
        state, alphas = StableDiffusionPipeline.lora_state_dict(path.parent, weight_name=path.name)
    except Exception as error:
        raise TrainingError(f"{path} is not an LCM-LoRA to go on with: {error}") from error
    own = {key.removeprefix("unet."): value.float() for key, value in state.items() if key.startswith("unet.")}
    weights = convert_unet_state_dict_to_peft(own)
    ranks = {value.shape[0] for key, value in weights.items() if "lora_A" in key}
    if len(ranks) != 1 or any(alpha not in ranks for alpha in (alphas or {}).values()):
        raise TrainingError(f"{path} cannot be gone on with: its layers have ranks {sorted(ranks)} and other alphas")
    distill.attach(unet, ranks.pop())
    learning = [name for name, weight in unet.named_parameters() if weight.requires_grad]
    found: Any = set_peft_model_state_dict(unet, weights)
    if found.unexpected_keys or len(learning) != len(weights):
        raise TrainingError(f"{path} has {len(weights)} tensors; an adapter of this model has {len(learning)}, by name")
    for name in learning:
        unet.get_parameter(name).requires_grad_(True)


def hone(model: Path, work: Path, settings: Settings, out: Path, minutes: float = math.inf) -> None:
    """Write the sharpened adapter of a model folder to `out`.

    Raises TrainingError when the folder is no such model or something cannot be written, UnfinishedError when the
    minutes are over first; what is in `work` then goes on.
    """
    check_finished(model, "to go on with")
    if not (model / LCM).is_file():
        raise TrainingError(f"{model} is not a crack-tiny to go on with: it has no {LCM}")
    shared = {one.name for one in fields(crack_tiny_settings.Settings)} & {one.name for one in fields(Settings)}
    # Checkpoints know their seed, not the model they began with: each has a folder of its own.
    own = work / f"hone-{mark(model, beside=[LCM])}"
    own.mkdir(parents=True, exist_ok=True)
    whole = replace(crack_tiny_settings.Settings(), **{name: getattr(settings, name) for name in shared})
    recipe = Honing(own, whole, minutes, say=partial(print, flush=True), model=model, honing=settings)
    unet, _ = recipe.sharpen()
    export_lora(out, unet, crack_tiny.NOTES)
    (work / "hone-settings.json").write_text(json.dumps(asdict(settings), indent=2) + "\n", "utf-8")


def options(settings: Mapping[str, Any]) -> list[str]:
    """What has to be said on the command line for these settings: those that are not the defaults."""
    usual, told = asdict(Settings()), list[str]()
    for name, value in settings.items():
        words, unsaid = (
            list(map(str, one if isinstance(one, list | tuple) else [one])) for one in (value, usual[name])
        )
        if words != unsaid and name != "bf16":
            told += [flag(name), *words]
    return told


def parsed(arguments: list[str] | None) -> tuple[Settings, argparse.Namespace]:
    """The settings of a command line, and the rest of it. Raises TrainingError for settings that cannot be."""
    parser = argparse.ArgumentParser(prog="python -m workers.training.crack_tiny_hone")
    parser.add_argument("--model", type=Path, required=True, help=f"folder of the finished model, with its {LCM}")
    parser.add_argument("--work", type=Path, required=True, help="folder for data and checkpoints")
    parser.add_argument("--out", type=Path, help=f"the adapter (default: WORK/{LCM})")
    parser.add_argument("--minutes", type=float, default=math.inf, help="leave a stage that takes longer: status 3")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    usual = asdict(Settings())
    for name, value in usual.items():
        if isinstance(value, tuple):
            parser.add_argument(flag(name), type=int, nargs="+", default=value)
        elif name != "bf16":
            parser.add_argument(flag(name), type=type(value), default=value)
    given = parser.parse_args(arguments)
    given.walks = tuple(given.walks)
    return checked(Settings, {name: getattr(given, name, value) for name, value in usual.items()}), given


def main(arguments: list[str] | None = None) -> int:
    """Hone and write the adapter; 1 and a reason when it cannot, 3 when its time is over."""

    def work() -> str:
        settings, given = parsed(arguments)
        use_threads(given.threads)
        out = given.out or given.work / LCM
        hone(given.model, given.work, settings, out, given.minutes)
        return f"{out}: {out.stat().st_size / 1e6:.1f} MB"

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
