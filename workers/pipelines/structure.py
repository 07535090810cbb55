"""The layers of a checkpoint, from its configuration alone: modules without numbers (torch's `meta` device)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ControlNetModel, MotionAdapter, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from farm import families
from farm.errors import InvalidModel
from farm.modelfiles import read_json
from farm.safefile import read_header
from workers.pipelines.targets import target_modules

TEXT = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
VAES = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
DIFFUSERS_PARTS = ("unet", "vae")
ADAPTABLE = ("unet", "text_encoder", "text_encoder_2")

ATTENTION_2022 = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""How the attention of early VAE files is spelt; diffusers still reads it."""
UNUSED_TEXT = ("position_ids", "logit_scale")

Shapes = Mapping[str, tuple[int, ...]]


def part_of(part: str, config: Mapping[str, Any]) -> Any:
    """One part of a pipeline without numbers. Raises InvalidModel for a configuration that makes none."""
    body = dict(config)
    try:
        with torch.device("meta"):
            if part == "unet":
                return UNet2DConditionModel.from_config(body).eval()
            if part == "controlnet":
                return ControlNetModel.from_config(body).eval()
            if part == "motion":
                return MotionAdapter.from_config(body).eval()
            if part == "vae":
                return VAES[str(body.get("_class_name"))].from_config(body).eval()
            return TEXT[part](CLIPTextConfig(**body)).eval()
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise InvalidModel(f"{part}/config.json: makes no model: {said}") from error


def shapes_of(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, ...]]:
    """Canonical weight name -> shape, for every weight an adapter may touch. `configs` by part."""
    parts = {part: part_of(part, configs[part]) for part in ADAPTABLE if part in configs}
    weights: dict[str, Any] = {name: module.weight for name, module in target_modules(parts).items()}
    return {name: tuple(weight.shape) for name, weight in weights.items()}


@lru_cache(maxsize=8)
def known_shapes(family: str) -> Shapes:
    """The same for a family the farm knows by heart."""
    return shapes_of(families.template(family))


def folder_shapes(folder: Path) -> Shapes:
    """The same for a checkpoint's folder; its weights are not read. Raises InvalidModel."""
    return shapes_of({part: read_json(folder / part / "config.json") for part in _parts(folder, ADAPTABLE)})


def controls(controlnet: Mapping[str, Any], unet: Mapping[str, Any]) -> str | None:
    """Why a ControlNet of this configuration cannot control a UNet of that one; None if it can.

    Compared are what it takes in and what it hands over. How deep its transformers are is its own affair.
    """
    for key in ("block_out_channels", "cross_attention_dim"):
        # Said by both, and told without making modules of gigabytes' shapes.
        if controlnet.get(key) != unet.get(key):
            return f"config.json: {key} is {controlnet.get(key)}, the UNet's {unet.get(key)}"
    own = part_of("controlnet", controlnet)
    fitting: Any = ControlNetModel.from_unet(part_of("unet", unet), load_weights_from_unet=False)
    told = ("conv_in.", "time_embedding.", "add_embedding.", "controlnet_down_blocks.", "controlnet_mid_block.")
    shapes = [
        {key: tuple(value.shape) for key, value in net.state_dict().items() if key.startswith(told)}
        for net in (own, fitting)
    ]
    differing = sorted(key for key in shapes[0].keys() | shapes[1].keys() if shapes[0].get(key) != shapes[1].get(key))
    if differing:
        key = differing[0]
        return f"{key} has shape {shapes[0].get(key)}, the UNet asks for {shapes[1].get(key)}"
    return None


def moves(motion: Mapping[str, Any], unet: Mapping[str, Any]) -> str | None:
    """Why a motion adapter of this configuration cannot move a UNet of that one; None if it can."""
    if unet.get("addition_embed_type") is not None:
        return "a UNet that is told sizes, as SDXL's: only those of Stable Diffusion 1 and 2 are animated"
    for key, of in (("block_out_channels", "block_out_channels"), ("motion_layers_per_block", "layers_per_block")):
        own, its = (config.get(name, 2) for config, name in ((motion, key), (unet, of)))
        if _each(own, unet) != _each(its, unet):
            return f"config.json: {key} is {own}, the UNet's {of} {its}"
    return None


def _each(value: Any, unet: Mapping[str, Any]) -> list[Any]:
    """A number for every block, or the list there is."""
    return [value] * len(unet["down_block_types"]) if isinstance(value, int) else list(value)


def check_weights(folder: Path) -> None:
    """Every weight that the configurations ask for is there with its shape, and none besides.

    Stock loading fills a missing weight with random numbers and a warning. Raises InvalidModel with file, key, reason.
    """
    for part in _parts(folder, (*DIFFUSERS_PARTS, *TEXT)):
        check_part(folder / part, part)


def check_part(folder: Path, part: str) -> None:
    """The same for one part's folder."""
    expected = {_plain(part, key): tuple(value.shape) for key, value in _state(folder, part)}
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        name = f"{folder.name}/{path.name}"
        for key, tensor in read_header(path).tensors.items():
            plain = _plain(part, key)
            if part in TEXT and plain.endswith(UNUSED_TEXT):
                continue
            if plain not in expected:
                raise InvalidModel(f"{name}: {key}: the configuration has no such weight")
            if _flat(part, tensor.shape) != _flat(part, expected[plain]):
                told = f"shape {tensor.shape}, the configuration asks for {expected[plain]}"
                raise InvalidModel(f"{name}: {key}: {told}")
            found[plain] = name
    missing = expected.keys() - found.keys()
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise InvalidModel(f"{folder.name}: {min(missing)}: this weight is missing{more}")


def _parts(folder: Path, of: tuple[str, ...]) -> Iterator[str]:
    return (part for part in of if (folder / part).is_dir())


def _state(folder: Path, part: str) -> Any:
    return part_of(part, read_json(folder / "config.json")).state_dict().items()


def _plain(part: str, key: str) -> str:
    """One spelling for keys that libraries have spelt in several."""
    if part in TEXT:
        return key.removeprefix("text_model.")
    if part == "vae" and ".attentions." in key:
        head, _, tail = key.rpartition(".")
        before, _, last = head.rpartition(".")
        return f"{before}.{ATTENTION_2022.get(last, last)}.{tail}"
    return key


def _flat(part: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Early VAE files hold the linear layers of their attention as 1x1 convolutions."""
    return shape[:2] if part == "vae" and shape[2:] == (1, 1) else shape
