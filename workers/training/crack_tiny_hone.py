"""Sharpens the LCM-LoRA of a finished `crack-tiny` further, without the working folder it was made in.

    python -m workers.training.crack_tiny_hone --model FOLDER --work DIR [--out FILE]

Everything else stays as it is in FOLDER. A reader learns anew, on walls encoded with the folder's own autoencoder, and
the last stage of `workers.training.crack_tiny` goes on from the folder's own adapter, with the direction of a crack
counting more and eight steps walked as often as four. Diagonal cracks are asked to rise or to fall: an adapter that was
only asked for "diagonal" draws some that do both. Goes on after a stop.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.utils import convert_unet_state_dict_to_peft
from numpy.typing import NDArray
from peft import set_peft_model_state_dict
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from workers.training import crack_tiny, diffusion, distill, sharpen
from workers.training.errors import UNFINISHED, TrainingError, UnfinishedError
from workers.training.export import export_lora
from workers.training.questions import DIAGONAL, LEANS, MEANINGS, lean

LCM = "lcm-lora.safetensors"
PARTS = ("unet", "vae", "text_encoder", "tokenizer")
WALKS = (2, 4, 4, 8, 8)


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that fixes the result, apart from the model, library versions and the processor."""

    seed: int = 1
    pool: int = 12_000
    words_steps: int = 800
    words_rate: float = 5e-3
    reader_steps: int = 3_000
    reader_rate: float = 1e-3
    sharpen_steps: int = 800
    sharpen_rate: float = 2e-4
    sharpen_weight: float = 0.02
    direction: float = 3.0
    lean: float = 3.0
    """How often these two questions count; without a say of `lean` the reader is not asked it at all."""
    bf16: bool = True


@dataclass(frozen=True, slots=True)
class Honing(crack_tiny.Recipe):
    """The recipe's last stages over a model there is: what came before them is read from its folder."""

    model: Path = Path()
    direction: float = 1.0
    lean: float = 1.0

    def tokenizer(self) -> CLIPTokenizer:
        return CLIPTokenizer.from_pretrained(self.model / "tokenizer")

    def refine(self) -> AutoencoderKL:
        vae: AutoencoderKL = AutoencoderKL.from_pretrained(self.model / "vae", torch_dtype=torch.float32)
        return vae.eval()

    def words_with_answers(self) -> tuple[CLIPTextModel, nn.ModuleDict]:
        """The text encoder stays; what names the answers was not shipped with it and is learned anew."""
        text = CLIPTextModel.from_pretrained(self.model / "text_encoder").float().requires_grad_(False)
        plan = self.plan(self.settings.words_steps, self.settings.words_rate, 4)
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

    def seen(self) -> tuple[dict[str, int], dict[str, NDArray[np.int64]]]:
        kinds, known = crack_tiny.Recipe.seen(self)
        if not self.lean:
            return kinds, known
        return kinds | {"lean": len(LEANS)}, known | {"lean": lean(self.pool())}

    def wanted(self, told: dict[str, Tensor]) -> dict[str, Tensor]:
        """A diagonal crack may rise or fall; it may not do both."""
        if not self.lean:
            return told
        diagonal = told["direction"] == DIAGONAL
        return told | {"lean": torch.where(diagonal, sharpen.ANY, sharpen.UNKNOWN)}

    def sharpening(self) -> sharpen.Sharpening:
        usual = crack_tiny.Recipe.sharpening(self)
        return replace(usual, walks=WALKS, emphasis={"direction": self.direction, "lean": self.lean})


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
    if not (model / "model_index.json").is_file() or not (model / LCM).is_file():
        raise TrainingError(f"{model} is not a crack-tiny to go on with: it has no model_index.json or no {LCM}")
    given = asdict(settings)
    counted = {name: given.pop(name) for name in ("direction", "lean")}
    # Checkpoints know their seed, not the model they began with: each has a folder of its own.
    own = work / f"hone-{_mark(model)}"
    own.mkdir(parents=True, exist_ok=True)
    whole = replace(crack_tiny.Settings(), **given)
    recipe = Honing(own, whole, minutes, say=partial(print, flush=True), model=model, **counted)
    unet, _ = recipe.sharpen()
    export_lora(out, unet, crack_tiny.NOTES)
    (work / "hone-settings.json").write_text(json.dumps(asdict(settings), indent=2) + "\n", "utf-8")


def _mark(model: Path) -> str:
    """Twelve letters that only these weights have."""
    sums = [
        hashlib.sha256(path.read_bytes()).hexdigest() for part in PARTS for path in sorted((model / part).glob("*"))
    ]
    return hashlib.sha256(f"{sums} {hashlib.sha256((model / LCM).read_bytes()).hexdigest()}".encode()).hexdigest()[:12]


def main(arguments: list[str] | None = None) -> int:
    """Hone and write the adapter; 1 and a reason when it cannot, 3 when its time is over."""
    parser = argparse.ArgumentParser(prog="python -m workers.training.crack_tiny_hone")
    parser.add_argument("--model", type=Path, required=True, help=f"folder of the finished model, with its {LCM}")
    parser.add_argument("--work", type=Path, required=True, help="folder for data and checkpoints")
    parser.add_argument("--out", type=Path, help=f"the adapter (default: WORK/{LCM})")
    parser.add_argument("--minutes", type=float, default=math.inf, help="leave a stage that takes longer: status 3")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    default = Settings()
    for name, value in asdict(default).items():
        if name != "bf16":
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = vars(parser.parse_args(arguments))
    torch.set_num_threads(given["threads"])
    settings = Settings(**{name: given.get(name, value) for name, value in asdict(default).items()})
    out = given["out"] or given["work"] / LCM
    try:
        hone(given["model"], given["work"], settings, out, given["minutes"])
    except UnfinishedError as pause:
        sys.stderr.write(f"{pause}\n")
        return UNFINISHED
    except (TrainingError, OSError) as error:
        sys.stderr.write(f"training stopped: {error}\n")
        return 1
    sys.stdout.write(f"{out}: {out.stat().st_size / 1e6:.1f} MB\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
