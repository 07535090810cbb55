"""A trained adapter as files: kohya's keys as the official LCM-LoRA has them, diffusers', and PEFT folders."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from farm.training import Training
from workers.training.base import Base
from workers.training.errors import TrainingError

_TEXT = {"sd": ("lora_te",), "sdxl": ("lora_te1", "lora_te2")}
_FOLDERS = {"sd": ("text_encoder",), "sdxl": ("text_encoder_one", "text_encoder_two")}
"""As DiffEngine names them."""
_V2_WIDTH = 1024
"""Of what a UNet of Stable Diffusion 2.x is told; 1.x has 768."""


def kohya(parts: Mapping[str, nn.Module], alpha: float | None = None) -> dict[str, Tensor]:
    """The adapters of these modules, by kohya prefix, under kohya's key names, float16.

    `down_blocks.0.resnets.0.conv1` becomes `lora_unet_down_blocks_0_resnets_0_conv1`, with `.lora_down.weight`,
    `.lora_up.weight` and `.alpha`. Without `alpha` it is the rank: strength 1. Raises TrainingError when there is none.
    """
    tensors: dict[str, Tensor] = {}
    ends = {".lora_A.weight": ".lora_down.weight", ".lora_B.weight": ".lora_up.weight"}
    for prefix, module in parts.items():
        for key, value in get_peft_model_state_dict(module).items():
            ours = next(end for end in ends if key.endswith(end))
            path = key.removesuffix(ours)
            if prefix.startswith("lora_te"):
                path = f"text_model.{path.removeprefix('text_model.')}"
            stem = f"{prefix}_{path.replace('.', '_')}"
            tensors[stem + ends[ours]] = value.detach().to("cpu", torch.float16).contiguous()
            if ours.startswith(".lora_A"):
                tensors[stem + ".alpha"] = _number(float(value.shape[0]) if alpha is None else alpha)
    if not tensors:
        raise TrainingError("there is no adapter to export")
    return tensors


def export(out: Path, base: Base, options: Training, notes: Mapping[str, str], *, text: bool) -> list[Path]:
    """Write the adapter in every format asked for; returns where. Raises TrainingError when the disk is full.

    What stood there before is replaced only by something whole.
    """
    made = []
    name = str(options.model_dump().get("kind", "lora"))
    try:
        for form in options.format:
            target = out / (f"{name}.safetensors" if form == "kohya" else f"{name}-{form}")
            half = target.with_name(f"{target.name}.part")
            _remove(half)
            out.mkdir(parents=True, exist_ok=True)
            if form == "kohya":
                _one_file(half, base, options, notes, text=text)
            elif form == "diffusers":
                _diffusers(half, base, text=text)
            else:
                _peft(half, base, text=text)
            _put(half, target)
            made.append(target)
    # safetensors says "I/O error" with an exception of its own.
    except Exception as error:
        if isinstance(error, TrainingError):
            raise
        raise TrainingError(f"cannot write the adapter to {out}: {error}") from error
    return made


def _one_file(path: Path, base: Base, options: Training, notes: Mapping[str, str], *, text: bool) -> None:
    parts: dict[str, nn.Module] = {"lora_unet": base.network.unet}
    if text:
        parts |= dict(zip(_TEXT[base.pipeline.family], base.network.texts, strict=True))
    version, architecture = _named(base)
    header = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(options.rank),
        "ss_network_alpha": str(options.strength),
        "ss_base_model_version": version,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        **notes,
    }
    _save(kohya(parts, options.strength), path, header)


def _named(base: Base) -> tuple[str, str]:
    """The base as kohya's scripts name it, and as modelspec does: programs choose by these names where a file fits."""
    if base.xl:
        return "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"
    velocity = base.kind == "v_prediction"
    if base.network.unet.config.cross_attention_dim == _V2_WIDTH:
        return ("sd_v2_v", "stable-diffusion-v2-768-v") if velocity else ("sd_v2", "stable-diffusion-v2-512")
    return "sd_v1_v" if velocity else "sd_v1", "stable-diffusion-v1"


def _diffusers(folder: Path, base: Base, *, text: bool) -> None:
    """By the pipelines' own `save_lora_weights`, with alpha in the header.

    PEFT's key spelling as it is: `convert_state_dict_to_diffusers` spells attention layers one way and all others
    another, and stock diffusers 0.42 then loads only one kind. Text encoders get the `text_model.` that older versions
    of transformers need and newer ones take away.
    """
    xl = base.xl
    layers: dict[str, Any] = {"unet": base.network.unet}
    if text:
        layers |= dict(zip(("text_encoder", "text_encoder_2"), base.network.texts, strict=False))
    given: dict[str, Any] = {}
    for part, module in layers.items():
        front = "" if part == "unet" else "text_model."
        given[f"{part}_lora_layers"] = {f"{front}{k.removeprefix(front)}": v for k, v in _half(module).items()}
        given[f"{part}_lora_adapter_metadata"] = module.peft_config["default"].to_dict()
    folder.mkdir(parents=True)
    kind = StableDiffusionXLPipeline if xl else StableDiffusionPipeline
    kind.save_lora_weights(str(folder), safe_serialization=True, **given)


def _peft(folder: Path, base: Base, *, text: bool) -> None:
    """A folder a part, as `PeftModel.from_pretrained` reads it."""
    parts: dict[str, Any] = {"unet": base.network.unet}
    if text:
        parts |= dict(zip(_FOLDERS[base.pipeline.family], base.network.texts, strict=True))
    for part, module in parts.items():
        (folder / part).mkdir(parents=True)
        tensors = {f"base_model.model.{key}": value for key, value in _half(module).items()}
        _save(tensors, folder / part / "adapter_model.safetensors", {"format": "pt"})
        config = module.peft_config["default"]
        config.save_pretrained(str(folder / part))


def _number(value: float) -> Tensor:
    """float16 as in the official files, where that is exact."""
    exact = torch.tensor(value)
    return exact.half() if float(exact.half()) == value else exact


def _half(module: Any) -> dict[str, Tensor]:
    state = get_peft_model_state_dict(module)
    return {key: value.detach().to("cpu", torch.float16).contiguous() for key, value in state.items()}


def _save(tensors: dict[str, Tensor], path: Path, header: Mapping[str, str]) -> None:
    save_file(tensors, path, metadata=dict(header))
    if load_file(path).keys() != tensors.keys():
        raise TrainingError(f"{path} did not survive writing")


def _put(half: Path, target: Path) -> None:
    """Replace what stands at `target`, if anything, by something whole.

    A file is replaced in one step. A folder cannot be: the old one waits beside the new one until that is in place.
    """
    if half.is_file():
        half.replace(target)
        return
    old = target.with_name(f"{target.name}.old")
    if os.path.lexists(target):
        _remove(old)
        target.rename(old)
    try:
        half.rename(target)
    except OSError:
        if os.path.lexists(old):
            old.rename(target)
        raise
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()
