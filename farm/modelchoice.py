"""Which files of a folder, a prefix or a repository make up a model, from their names and sizes alone. No torch."""

import re
from collections.abc import Mapping
from pathlib import Path

from farm.errors import InvalidModel
from farm.modelkinds import NOUNS, ModelKind

COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
"""The folders of a pipeline that rendering needs; a safety checker is left behind."""
ADAPTER_PARTS = ("unet", "text_encoder", "text_encoder_one", "text_encoder_2", "text_encoder_two")
"""Folders in which PEFT, and DiffEngine through it, put the parts of an adapter."""

SMALL_SUFFIXES = (".json", ".txt")
SMALL_BYTES = 16 * 1024 * 1024
"""Largest configuration or vocabulary file; CLIP's is 2 MB."""
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")

WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:\.(?P<variant>\w+))?(?:-\d{5}-of-\d{5})?\.safetensors"
    r"|(?:diffusion_pytorch_model|model)\.safetensors\.index(?:\.(?P<index>\w+))?\.json"
)


def choose(listing: Mapping[str, int], kind: ModelKind, variant: str | None = None) -> dict[str, str]:
    """Which files of a folder make up a model: path in the folder -> path in the model.

    `listing` maps relative paths to bytes. Only safetensors and small text files are ever chosen; of the number types
    a folder offers, `variant` (such as `fp16`) or else the plain one. Raises InvalidModel with file and reason.
    """
    if kind == "checkpoint":
        chosen = _checkpoint_files(listing, variant)
    elif kind in {"vae", "controlnet", "motion"}:
        if "config.json" not in listing:
            raise InvalidModel(f"config.json: this file is missing; a {NOUNS[kind]}'s diffusers folder has it")
        chosen = {"config.json": "config.json", **_weights(listing, "", variant)}
    else:
        chosen = _adapter_files(listing)
    if variant and not any(f".{variant}" in path for path in chosen):
        raise InvalidModel(f"there are no weights of variant {variant}; leave it out, or name one that is there")
    for path in chosen:
        if not path.endswith(".safetensors") and listing[path] > SMALL_BYTES:
            raise InvalidModel(f"{path}: {listing[path]} bytes are too many for a file of this kind")
    return chosen


def list_folder(folder: Path) -> dict[str, int]:
    """Every file below a folder that could be part of a model: relative path -> bytes."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


def _checkpoint_files(listing: Mapping[str, int], variant: str | None) -> dict[str, str]:
    if "model_index.json" not in listing:
        raise InvalidModel("model_index.json: this file is missing; a checkpoint is a diffusers folder or one file")
    chosen = {name: name for name in ("model_index.json", "profile.json") if name in listing}
    for part in COMPONENTS:
        small = [path for path in listing if path.startswith(f"{part}/") and path.count("/") == 1]
        with_weights = part in {"unet", "vae"} or part.startswith("text_encoder")
        if with_weights and (small or part in {"unet", "vae", "text_encoder"}):
            chosen |= _weights(listing, f"{part}/", variant)
        for path in small:
            if path.endswith(SMALL_SUFFIXES) and ".index" not in path:
                chosen[path] = path
    return chosen


def _weights(listing: Mapping[str, int], folder: str, variant: str | None) -> dict[str, str]:
    """The weight files of one component. A single file of a variant is stored under the plain name."""
    matches = {
        path: match
        for path in listing
        if path.startswith(folder) and (match := WEIGHTS.fullmatch(path.removeprefix(folder)))
    }
    by_variant: dict[str | None, dict[str, str]] = {}
    for path, match in matches.items():
        found = match["variant"] or match["index"]
        plain = path.replace(f".{found}.safetensors", ".safetensors") if match["variant"] else path
        by_variant.setdefault(found, {})[path] = plain
    offered = {name for name, files in by_variant.items() if any(path.endswith(".safetensors") for path in files)}
    if not offered:
        pickled = [path for path in listing if path.startswith(folder) and path.endswith(PICKLES)]
        hint = f" ({', '.join(pickled[:3])} is a pickle, which is never loaded)" if pickled else ""
        raise InvalidModel(f"{folder or './'}: there is no .safetensors file{hint}")
    wanted = variant if variant in offered else (None if None in offered else min(name or "" for name in offered))
    return by_variant[wanted]


def _adapter_files(listing: Mapping[str, int]) -> dict[str, str]:
    """PEFT folders by part, one PEFT folder, or the one file there is."""
    if "model_index.json" in listing:
        raise InvalidModel("model_index.json: this is a checkpoint; register it as one")
    chosen: dict[str, str] = {}
    for part in ("", *(f"{part}/" for part in ADAPTER_PARTS)):
        mine = [path for path in listing if path.startswith(part) and "/" not in path.removeprefix(part)]
        if f"{part}adapter_config.json" in mine or part:
            weights = [path for path in mine if path.endswith(".safetensors")]
            if mine and not weights:
                unsafe = next((path for path in mine if path.endswith(PICKLES)), None)
                if unsafe:
                    raise InvalidModel(
                        f"{unsafe}: this is a pickle, which is never loaded; a PEFT folder holds its factors as "
                        f"{part}adapter_model.safetensors"
                    )
                raise InvalidModel(f"{part or './'}: there is no .safetensors file; a PEFT folder has one")
            if len(weights) > 1:
                raise InvalidModel(f"{part or './'}: holds {len(weights)} .safetensors files, one is expected")
            chosen |= {path: path for path in mine if path in weights or path.endswith("adapter_config.json")}
    if chosen:
        return chosen
    files = [path for path in listing if path.endswith(".safetensors") and "/" not in path]
    if len(files) == 1:
        return {files[0]: "adapter.safetensors"}
    if files:
        raise InvalidModel(f"there are {len(files)} .safetensors files ({', '.join(files[:4])}): name the one you mean")
    pickled = [path for path in listing if path.endswith(PICKLES)]
    hint = f"; {pickled[0]} is a pickle, which is never loaded" if pickled else ""
    raise InvalidModel(f"there is no .safetensors file and no PEFT folder{hint}")
