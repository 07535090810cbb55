"""Checkpoints in the original one-file layout (`.safetensors` as web UIs share them) become diffusers folders.

Done once, at registration, so that workers know one format. The keys are translated by diffusers' own converters, with
a configuration that ships with the farm: nothing is looked up anywhere. Numbers stay as the file has them, and a key
that is missing, left over or of another shape refuses the file, where stock loading would warn and go on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors import safe_open
from torch import Tensor, nn

from farm import families
from farm.errors import InvalidModel
from farm.safefile import Header, read_header
from farm.tokens import clip_vocabulary
from workers.pipelines.patching import LOADING
from workers.pipelines.structure import part_of

UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT = {
    "StableDiffusionPipeline": {"text_encoder": "cond_stage_model.transformer."},
    "StableDiffusionXLPipeline": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
}
"""How each text encoder's keys begin."""
IGNORED = (
    "model_ema.", "alphas_cumprod", "betas", "log_one_minus_alphas_cumprod", "posterior_", "sqrt_", "denoiser.",
    "logvar", "edm_", "v_pred", "ztsnr", "cond_stage_model.logit_scale", "lvlb_weights", "scale_factor",
)  # fmt: skip
"""What a file may hold besides the parts: schedules, markers, and averaged weights that rendering does not use."""
UNUSED_TEXT = ("position_ids", "logit_scale", "attn_mask")
CROSS = UNET + "input_blocks.{}.1.transformer_blocks.0.attn2.to_k.weight"
FIRST = UNET + "input_blocks.0.0.weight"


def family_of(path: Path) -> str:
    """The family of a file in the original layout, from its header. Raises InvalidModel for what is not supported."""
    tensors = read_header(path).tensors

    def refuse(key: str, reason: str) -> InvalidModel:
        return InvalidModel(f"{path.name}: {key}: {reason}")

    if FIRST not in tensors:
        raise refuse(FIRST, "this key is missing; a checkpoint in the original layout has it")
    channels = tensors[FIRST].shape[1] if len(tensors[FIRST].shape) == 4 else 0
    if channels != 4:
        raise refuse(FIRST, f"a UNet of {channels} input channels (inpainting, editing) is not supported")
    second = "conditioner.embedders.1.model.ln_final.weight"
    if second in tensors:
        return "sdxl" if any(key.startswith(f"{UNET}middle_block.1.") for key in tensors) else "ssd-1b"
    if "conditioner.embedders.0.model.ln_final.weight" in tensors:
        raise refuse("conditioner.embedders.0.model.ln_final.weight", "the SDXL refiner is not supported")
    if any(key.startswith("cond_stage_model.model.") for key in tensors):
        raise refuse("cond_stage_model.model", "Stable Diffusion 2 in one file is not supported: take its folder")
    if not any(key.startswith("cond_stage_model.transformer.") for key in tensors):
        raise refuse("cond_stage_model", "the text encoder is missing; a UNet alone is no checkpoint")
    return "sd15"


def convert(path: Path, folder: Path, template: Mapping[str, Any] | None = None) -> str:
    """Write a checkpoint file as a diffusers folder (made new); answers its family.

    `template` holds the configurations to use instead of the family's own. Raises InvalidModel with file, key and
    reason.
    """
    family = family_of(path)
    config = dict(template or families.template(family))
    header = read_header(path)
    pipeline = config["model_index"]["_class_name"]
    parts = {"unet": UNET, "vae": VAE, **TEXT[pipeline]}
    _check_keys(path.name, header, tuple(parts.values()))
    folder.mkdir(parents=True)
    with safe_open(str(path), framework="pt") as file:
        for part, prefix in parts.items():
            mine = {key: file.get_tensor(key) for key in header.tensors if key.startswith(prefix)}
            module = part_of(part, config[part])
            _fill(path.name, module, prefix, mine, _translated(part, module, config[part], prefix, mine))
            # transformers 5 loads a model in the number type it was stored in.
            module.save_pretrained(folder / part, safe_serialization=True)
    _write_rest(folder, config, header.tensors)
    return family


def convert_vae(path: Path, folder: Path, family: str) -> None:
    """Write a VAE file in the original layout as a diffusers folder. Raises InvalidModel with file, key and reason."""
    config = families.template(family)["vae"]
    header = read_header(path)
    prefix = VAE if any(key.startswith(VAE) for key in header.tensors) else ""
    with safe_open(str(path), framework="pt") as file:
        mine = {
            VAE + key.removeprefix(VAE): file.get_tensor(key)
            for key in header.tensors
            if key.startswith(prefix) and not key.startswith(("loss.", "model_ema."))
        }
    module = part_of("vae", config)
    _fill(path.name, module, VAE, mine, convert_ldm_vae_checkpoint(dict(mine), config))
    module.save_pretrained(folder, safe_serialization=True)


def _check_keys(name: str, header: Header, prefixes: tuple[str, ...]) -> None:
    for key in header.tensors:
        if not key.startswith(prefixes) and not key.startswith(IGNORED) and not key.endswith(UNUSED_TEXT):
            raise InvalidModel(f"{name}: {key}: not a key of a checkpoint in the original layout")
    for prefix in prefixes:
        if not any(key.startswith(prefix) for key in header.tensors):
            raise InvalidModel(f"{name}: {prefix}: no key begins so; this part is missing from the file")


def _translated(
    part: str, module: Any, config: Mapping[str, Any], prefix: str, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The same numbers under diffusers' names."""
    if part == "unet":
        return dict(convert_ldm_unet_checkpoint(tensors, config))
    if part == "vae":
        return dict(convert_ldm_vae_checkpoint(tensors, config))
    if part == "text_encoder_2":
        found = convert_open_clip_checkpoint(module, tensors, prefix=prefix)
    else:
        found = convert_ldm_clip_checkpoint(tensors)
    # Only some versions of transformers have `text_model.` in front.
    if not hasattr(module, "text_model"):
        found = {key.removeprefix("text_model."): tensor for key, tensor in found.items()}
    return {key: tensor for key, tensor in found.items() if not key.endswith(UNUSED_TEXT)}


def _fill(
    name: str, module: nn.Module, prefix: str, given: Mapping[str, Tensor], translated: Mapping[str, Tensor]
) -> None:
    """Give a module its weights, all of them and no other. Raises InvalidModel."""
    expected = module.state_dict()
    _refuse_first(name, prefix, expected.keys() - translated.keys(), "is missing from the file")
    _refuse_first(name, prefix, translated.keys() - expected.keys(), "belongs to no layer of this family")
    used = {tensor.untyped_storage().data_ptr() for tensor in translated.values()}
    if prefix in {UNET, VAE}:
        # The converters leave out what they do not know, without a word.
        left = {key for key, tensor in given.items() if tensor.untyped_storage().data_ptr() not in used}
        _refuse_first(name, "", left, "belongs to no layer of this family")
    for key, tensor in translated.items():
        if tensor.shape != expected[key].shape:
            told = f"has shape {tuple(tensor.shape)}, this family's is {tuple(expected[key].shape)}"
            raise InvalidModel(f"{name}: {prefix}{key}: {told}")
    with LOADING:
        module.load_state_dict({key: value.contiguous() for key, value in translated.items()}, strict=True, assign=True)


def _refuse_first(name: str, prefix: str, keys: Collection[str], reason: str) -> None:
    if keys:
        more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
        raise InvalidModel(f"{name}: {prefix}{min(keys)}: {reason}{more}")


def _write_rest(folder: Path, config: Mapping[str, Any], keys: Collection[str]) -> None:
    """Pipeline, scheduler and tokenizers, which such a file does not hold."""
    write: Callable[[Path, Any], int] = lambda path, body: path.write_text(json.dumps(body, indent=2) + "\n")  # noqa: E731
    write(folder / "model_index.json", config["model_index"])
    scheduler = dict(config["scheduler"])
    if "v_pred" in keys:
        scheduler["prediction_type"] = "v_prediction"
    if "ztsnr" in keys:
        scheduler["rescale_betas_zero_snr"] = True
    (folder / "scheduler").mkdir()
    write(folder / "scheduler" / "scheduler_config.json", scheduler)
    vocabulary, merges = clip_vocabulary()
    for part in ("tokenizer", "tokenizer_2"):
        if part not in config:
            continue
        (folder / part).mkdir()
        marks = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
        marks |= config[part]
        (folder / part / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
        (folder / part / "merges.txt").write_text(merges)
        write(folder / part / "special_tokens_map.json", marks)
        write(folder / part / "tokenizer_config.json", {
            **marks, "add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": 77,
            "tokenizer_class": "CLIPTokenizer",
        })  # fmt: skip
