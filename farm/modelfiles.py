"""Looking at model files before they are trusted: safetensors only, headers read, contents hashed. No torch."""

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import orjson

from farm.errors import InvalidModel

MAX_HEADER_BYTES = 100 * 1024 * 1024
"""safetensors' own limit for a header."""

FAMILIES = {"StableDiffusionPipeline": "sd15", "StableDiffusionXLPipeline": "sdxl"}
"""What a pipeline class is taken for, unless the folder's profile.json says more exactly."""

PROFILES: dict[str, dict[str, Any]] = {
    "sd15": {"width": 512, "height": 512, "min_size": 256, "max_size": 1024, "steps": 4, "guidance_scale": 1.0},
    "sdxl": {"width": 1024, "height": 1024, "min_size": 512, "max_size": 2048, "steps": 4, "guidance_scale": 1.0},
}

COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
"""The folders of a pipeline that rendering needs; a safety checker is left behind."""

SUFFIXES = {".json", ".txt", ".safetensors", ".model"}

LORA_DOWN = (".lora_down.weight", ".lora_A.weight", ".lora.down.weight")


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file of a model on disk: path inside the model, where it lies, sha256 (hex), bytes."""

    path: str
    source: Path
    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A model on disk that passed the checks. `hash` covers paths and contents."""

    hash: str
    family: str
    bytes: int
    files: tuple[FoundFile, ...]
    profile: dict[str, Any]
    source: dict[str, Any]

    def of_family(self, family: str) -> Self:
        return replace(self, family=family)


def read_checkpoint(folder: Path) -> FoundModel:
    """A diffusers folder of StableDiffusionPipeline or StableDiffusionXLPipeline.

    Raises InvalidModel with the file and the reason.
    """
    index = _json(folder / "model_index.json")
    kind = index.get("_class_name")
    if kind not in FAMILIES:
        raise InvalidModel(f"{folder}/model_index.json: _class_name is {kind}; one of {', '.join(FAMILIES)} is needed")
    weights = [folder / part for part in ("unet", "vae", "text_encoder")]
    for part in weights:
        if not any(part.glob("*.safetensors")):
            pickled = [path.name for path in part.glob("*.bin")]
            hint = f" ({', '.join(pickled)} is a pickle, which is never loaded)" if pickled else ""
            raise InvalidModel(f"{part}: there is no .safetensors file{hint}")
    unet = _json(folder / "unet" / "config.json")
    family = FAMILIES[kind]
    own = _json(folder / "profile.json") if (folder / "profile.json").exists() else {}
    family = str(own.pop("family", family))
    profile = {
        **PROFILES.get(family, PROFILES["sd15"]),
        "cross_attention_dim": unet.get("cross_attention_dim"),
        **own,
    }
    return _found(folder, sorted(_checkpoint_files(folder)), family, profile)


def read_adapter(path: Path) -> FoundModel:
    """A LoRA file. Its cross-attention width goes into the profile: it tells which checkpoints the file fits.

    Raises InvalidModel with file, key and reason.
    """
    if path.suffix != ".safetensors" or not path.is_file():
        raise InvalidModel(f"{path}: a LoRA is one .safetensors file")
    header = read_header(path)
    keys = [key for key in header if key != "__metadata__"]
    for key in keys:
        if "lora_magnitude_vector" in key or "dora_scale" in key:
            raise InvalidModel(f"{path}: {key}: DoRA is not supported")
        if any(part in key for part in ("hada_", "lokr_")):
            raise InvalidModel(f"{path}: {key}: LoHa and LoKr are not supported")
    downs = [key for key in keys if key.endswith(LORA_DOWN)]
    if not downs:
        raise InvalidModel(f"{path}: no LoRA weights found (keys ending in {', '.join(LORA_DOWN)})")
    crossing = [key for key in downs if "attn2" in key and ("to_k" in key or "to_v" in key)]
    profile = {"cross_attention_dim": header[crossing[0]]["shape"][1]} if crossing else {}
    return _found(path.parent, [path], "", profile)


def read_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: tensor name to dtype, shape and offsets, checked against the file's size.

    Raises InvalidModel when the file is not what it says it is.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise InvalidModel(f"{path}: not a safetensors file (its header would be {length} bytes)")
        raw = file.read(length)
    try:
        header: dict[str, Any] = json.loads(raw)
        ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise InvalidModel(f"{path}: the safetensors header cannot be read: {error!r}") from error
    if max(ends, default=0) != size - 8 - length:
        raise InvalidModel(f"{path}: the file is cut off or padded: its header does not match its size")
    return header


def _checkpoint_files(folder: Path) -> Iterator[Path]:
    for name in ("model_index.json", "profile.json"):
        if (folder / name).exists():
            yield folder / name
    for part in COMPONENTS:
        for path in (folder / part).glob("*"):
            if path.is_file() and path.suffix in SUFFIXES:
                if path.suffix == ".safetensors":
                    read_header(path)
                yield path


def _found(root: Path, paths: list[Path], family: str, profile: dict[str, Any]) -> FoundModel:
    files = []
    for path in paths:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        inside = str(path.relative_to(root)) if len(paths) > 1 else "adapter.safetensors"
        files.append(FoundFile(inside, path, digest, path.stat().st_size))
    listing = orjson.dumps({file.path: file.sha256 for file in files}, option=orjson.OPT_SORT_KEYS)
    total = sum(file.bytes for file in files)
    source = {"name": root.name if len(paths) > 1 else paths[0].name}
    return FoundModel(hashlib.sha256(listing).hexdigest(), family, total, tuple(files), profile, source)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise InvalidModel(f"{path}: this file is missing; a diffusers folder has it") from error
    except ValueError as error:
        raise InvalidModel(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidModel(f"{path}: a JSON object is expected")
    return value
