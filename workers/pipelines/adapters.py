"""Adapter files: kohya, diffusers and PEFT spellings become one canonical form, or are refused with the reason."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import torch
from safetensors import safe_open

from farm.errors import InvalidModel
from farm.safefile import Header, TensorInfo, read_header
from workers.pipelines.factors import Adapter, Factors

MAX_RANK = 512
NUMBER_TYPES = frozenset({"F16", "BF16", "F32", "F64"})

FACTOR_KEYS = re.compile(
    r"^(?P<layer>.+?)"
    r"(?:"
    r"\.lora_(?P<kohya>down|up)\.weight"  # kohya
    r"|\.lora_(?P<peft>[AB])(?:\.(?P<adapter>[^.]+))?\.weight"  # PEFT, diffusers today
    r"|(?:\.lora|_lora|\.lora_linear_layer)\.(?P<old>down|up)\.weight"  # diffusers of 2023
    r"|\.(?P<alpha>alpha)"
    r")$"
)
SLOTS = {"down": "down", "up": "up", "A": "down", "B": "up"}

REFUSED = (
    (re.compile(r"dora_scale|lora_magnitude_vector"), "DoRA is not supported"),
    (re.compile(r"\.hada_[wt]"), "LoHa is not supported"),
    (re.compile(r"\.lokr_[wt]"), "LoKr is not supported"),
    (re.compile(r"\.oft_|\.boft_|oft_diag"), "OFT is not supported"),
    (re.compile(r"\.lora_mid\."), "Tucker-decomposed convolutions (lora_mid) are not supported"),
    (re.compile(r"lora_[AB](\.[^.]+)?\.bias$|\.diff_b$"), "trained biases are not supported"),
    (re.compile(r"\.diff$|\.(w|b)_norm$"), "full-rank differences are not supported"),
    (
        re.compile(r"^lora_(te3|unet_double|unet_joint)|transformer_blocks\.\d+\.ff_context"),
        "this is for another model family",
    ),
)

PART_FOLDERS = {
    "unet": "unet",
    "text_encoder": "text_encoder",
    "text_encoder_one": "text_encoder",
    "text_encoder_2": "text_encoder_2",
    "text_encoder_two": "text_encoder_2",
}
METADATA_KEY = "lora_adapter_metadata"
"""Where diffusers puts the PEFT configuration in the header of a single file."""


@dataclass(frozen=True)
class _Source:
    """One file of an adapter: the part its bare keys belong to, and the PEFT configuration beside or inside it."""

    path: Path
    part: str
    config: Mapping[str, Any]


def read_adapter(
    path: Path, adapter: str, shapes: Mapping[str, tuple[int, ...]], aliases: Mapping[str, str]
) -> Adapter:
    """Read an adapter file or folder for a checkpoint with these weights.

    `shapes` maps canonical weight names to weight shapes, `aliases` maps every known spelling of a layer to its
    canonical weight name. Raises InvalidModel, naming file, key and reason, for anything that could not be applied
    completely: a key that is dropped silently is a picture that is silently wrong.
    """
    factors: dict[str, Factors] = {}
    for source in _sources(path):
        for name, found in _read_file(source, shapes, aliases).items():
            if name in factors:
                raise InvalidModel(f"{source.path.name}: {name}: given twice in this adapter")
            factors[name] = found
    return Adapter(adapter, factors)


def check_keys(path: Path) -> None:
    """Every key of an adapter file or folder is spelt as one of a method that can be applied, to whatever checkpoint.

    Read from the headers alone. Raises InvalidModel with file, key and reason.
    """
    for source in _sources(path):
        for key in read_header(source.path).tensors:
            _spelling(source, key)


def _sources(path: Path) -> Iterator[_Source]:
    if path.is_file():
        header = read_header(path)
        yield _Source(path, "", _embedded_config(path, header))
        return
    if not path.is_dir():
        raise InvalidModel(f"{path.name}: no such file or folder")
    folders = [path / name for name in sorted(PART_FOLDERS) if (path / name).is_dir()] or [path]
    for folder in folders:
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise InvalidModel(f"{path.name}: {folder.name} holds no .safetensors file; an adapter's folder has one")
        if len(files) > 1:
            raise InvalidModel(f"{path.name}: {folder.name} holds {len(files)} .safetensors files, one is expected")
        config_file = folder / "adapter_config.json"
        part = PART_FOLDERS.get(folder.name, "unet" if config_file.exists() else "") if folder != path else ""
        config = _config(config_file) if config_file.exists() else _embedded_config(files[0], read_header(files[0]))
        yield _Source(files[0], part or ("unet" if config_file.exists() else ""), config)


def _config(path: Path) -> dict[str, Any]:
    try:
        body = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise InvalidModel(f"{path.name}: not readable JSON") from error
    if not isinstance(body, dict):
        raise InvalidModel(f"{path.name}: not a JSON object")
    return body


def _embedded_config(path: Path, header: Header) -> dict[str, Any]:
    """Diffusers prefixes each entry with its part (`unet.lora_alpha`); kept as it is, `_alpha` knows both."""
    if METADATA_KEY not in header.metadata:
        return {}
    try:
        body = orjson.loads(header.metadata[METADATA_KEY])
    except orjson.JSONDecodeError as error:
        raise InvalidModel(f"{path.name}: __metadata__.{METADATA_KEY} is not JSON") from error
    return body if isinstance(body, dict) else {}


def _read_file(
    source: _Source, shapes: Mapping[str, tuple[int, ...]], aliases: Mapping[str, str]
) -> dict[str, Factors]:
    path = source.path
    header = read_header(path)
    if not header.tensors:
        raise InvalidModel(f"{path.name}: holds no tensors")
    keys: dict[str, dict[str, str]] = {}
    for key, info in header.tensors.items():
        name, slot = _resolve(source, key, aliases)
        if info.dtype not in NUMBER_TYPES:
            raise InvalidModel(
                f"{path.name}: {key}: numbers of type {info.dtype}, expected one of {sorted(NUMBER_TYPES)}"
            )
        slots = keys.setdefault(name, {})
        if slot in slots:
            raise InvalidModel(f"{path.name}: {key}: {name} is already given by {slots[slot]}")
        slots[slot] = key
    for name, slots in keys.items():
        _check_shapes(path.name, slots, header.tensors, shapes[name])
    with safe_open(str(path), framework="pt") as file:
        return {name: _factors(source, file, name, slots) for name, slots in keys.items()}


def _resolve(source: _Source, key: str, aliases: Mapping[str, str]) -> tuple[str, str]:
    """Canonical weight name and slot (down, up, alpha) of one key."""
    match = _spelling(source, key)
    slot = "alpha" if match["alpha"] else SLOTS[match["kohya"] or match["peft"] or match["old"]]
    layer = match["layer"].removeprefix("base_model.model.")
    layer = re.sub(r"\.processor(?=[._])", "", layer)
    layer = re.sub(r"\.to_out$", ".to_out.0", layer)
    for spelling in (layer, f"{source.part or 'unet'}.{layer}"):
        if spelling in aliases:
            return aliases[spelling], slot
    raise InvalidModel(
        f"{source.path.name}: {key}: the checkpoint has no such layer; is this adapter made for another base family?"
    )


def _spelling(source: _Source, key: str) -> re.Match[str]:
    """A key taken apart by `FACTOR_KEYS`."""
    for pattern, reason in REFUSED:
        if pattern.search(key):
            raise InvalidModel(f"{source.path.name}: {key}: {reason}")
    match = FACTOR_KEYS.match(key)
    if match is None:
        raise InvalidModel(f"{source.path.name}: {key}: not a LoRA key in kohya, diffusers or PEFT spelling")
    return match


def _check_shapes(
    file: str, slots: Mapping[str, str], tensors: Mapping[str, TensorInfo], weight: tuple[int, ...]
) -> None:
    """The factors of one weight, judged from the header alone."""
    for slot in ("down", "up"):
        if slot not in slots:
            raise InvalidModel(f"{file}: {next(iter(slots.values()))}: its {slot} factor is missing")
    down, up = tensors[slots["down"]].shape, tensors[slots["up"]].shape
    rank = down[0] if down else 0
    if rank > MAX_RANK:
        raise InvalidModel(f"{file}: {slots['down']}: rank {rank} is over the limit of {MAX_RANK}")
    rows, columns = weight[0], weight[1:]
    fits = (
        rank >= 1
        and len(down) in {2, 4}
        and len(up) in {2, 4}
        and _squeezed(up) == (rows, rank)
        and _squeezed(down[1:]) == _squeezed(columns)
    )
    if not fits:
        raise InvalidModel(
            f"{file}: {slots['down']}: shapes {down} and {up} do not make a weight of {weight}; "
            "is this adapter made for another base family?"
        )
    if "alpha" in slots and math.prod(tensors[slots["alpha"]].shape) != 1:
        raise InvalidModel(f"{file}: {slots['alpha']}: alpha must be one number")


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without the 1x1 kernel that some files leave out and others add."""
    return shape[:-2] if len(shape) >= 3 and shape[-2:] == (1, 1) else shape


def _factors(source: _Source, file: Any, name: str, slots: Mapping[str, str]) -> Factors:
    down, up = file.get_tensor(slots["down"]), file.get_tensor(slots["up"])
    for slot, tensor in (("down", down), ("up", up)):
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidModel(f"{source.path.name}: {slots[slot]}: holds NaN or infinity")
    if "alpha" in slots:
        alpha = float(file.get_tensor(slots["alpha"]).float().item())
    else:
        alpha = _alpha(source, name, int(down.shape[0]))
    if not math.isfinite(alpha):
        raise InvalidModel(f"{source.path.name}: {slots.get('alpha', name)}: alpha is NaN or infinite")
    return Factors(down.contiguous(), up.contiguous(), alpha)


def _alpha(source: _Source, name: str, rank: int) -> float:
    """Alpha from the PEFT configuration; the rank itself where nothing is said, which makes the scale 1."""
    part, path = name.removesuffix(".weight").split(".", 1)

    def said(entry: str) -> Any:
        prefixed = f"{part}.{entry}"
        return source.config[prefixed] if prefixed in source.config else source.config.get(entry)

    if said("use_dora"):
        raise InvalidModel(f"{source.path.name}: DoRA is not supported")
    alpha = said("lora_alpha")
    for pattern, value in (said("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            alpha = value
            break
    if alpha is None:
        return float(rank)
    # Rank-stabilised LoRA scales by alpha / sqrt(rank).
    return float(alpha) * math.sqrt(rank) if said("use_rslora") else float(alpha)
