"""Looking at model files before they are trusted: what they are, what they hash to. No torch.

A model is a diffusers folder, one `.safetensors` file, or the PEFT folders of an adapter. What a worker with torch
finds out beyond this is in `workers.pipelines.inspecting`.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Self

import orjson
from pydantic import ValidationError

from farm.errors import InvalidModel
from farm.families import PIPELINES, VAE_SCALES, Profile, family_of, profile_of
from farm.modelchoice import PICKLES, SMALL_BYTES, choose, list_folder
from farm.modelkinds import ModelKind
from farm.safefile import Header, read_header

VAE_CLASSES = ("AutoencoderKL", "AutoencoderTiny")
CONTROLNET_CLASS = "ControlNetModel"
MOTION_CLASS = "MotionAdapter"

LORA_DOWN = (".lora_down.weight", ".lora_A.weight", ".lora.down.weight")
LORA = re.compile(
    r"\.lora_(down|up|[AB])\b|\.lora\.(down|up)\b|_lora\.(down|up)\b|\.lora_linear_layer\.|hada_|lokr_|dora_"
    r"|\.b?oft_|oft_diag|\.diff(_b)?$"
)
"""Keys of an adapter, those of methods included that are refused later: by their names, not as files of no kind."""
ORIGINAL_UNET = "model.diffusion_model."
"""How a UNet's keys begin in the original layout, which web UIs read and write."""


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
    profile: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)

    def of_family(self, family: str) -> Self:
        return replace(self, family=family)

    def coming_from(self, **source: Any) -> Self:
        """The same model with more said about its origin."""
        return replace(self, source={**self.source, **{key: value for key, value in source.items() if value}})


def kind_of(path: Path) -> Literal["checkpoint", "original", "vae", "controlnet", "motion", "adapter"]:
    """What lies here: a diffusers folder, a checkpoint in the original one-file layout, a VAE, a ControlNet's or a
    motion adapter's diffusers folder, or an adapter.

    Raises InvalidModel when it is none of these.
    """
    if path.is_dir():
        if (path / "model_index.json").exists():
            return "checkpoint"
        if (path / "config.json").exists():
            name = str(read_json(path / "config.json").get("_class_name"))
            if name in VAE_CLASSES:
                return "vae"
            if name == CONTROLNET_CLASS:
                return "controlnet"
            if name == MOTION_CLASS:
                return "motion"
        return "adapter"
    if path.suffix in PICKLES:
        raise InvalidModel(f"{path.name}: this is a pickle; only safetensors files are accepted")
    keys = read_header(path).tensors
    if any(key.startswith(ORIGINAL_UNET) for key in keys):
        return "original"
    if any(LORA.search(key) for key in keys):
        return "adapter"
    if any(key.startswith(("control_model.", "controlnet_")) for key in keys):
        raise InvalidModel(f"{path.name}: a ControlNet as one file; register its diffusers folder")
    if any(key.removeprefix("first_stage_model.").startswith("decoder.") for key in keys):
        return "vae"
    raise InvalidModel(
        f"{path.name}: neither a checkpoint, a VAE nor an adapter; its first key is {next(iter(keys), '')}"
    )


def read_checkpoint(
    folder: Path,
    *,
    family: str | None = None,
    variant: str | None = None,
    changes: Mapping[str, Any] | None = None,
    scratch: Path | None = None,
) -> FoundModel:
    """A diffusers folder of StableDiffusionPipeline or StableDiffusionXLPipeline.

    `changes` are a person's words on the profile. A number type among them goes into the model's own `profile.json`
    (written below `scratch`), because whoever loads it knows nothing but its files. Raises InvalidModel with the file
    and the reason.
    """
    pipeline = read_json(folder / "model_index.json").get("_class_name")
    if pipeline not in PIPELINES:
        raise InvalidModel(f"model_index.json: _class_name is {pipeline}; one of {', '.join(PIPELINES)} is needed")
    chosen = choose(list_folder(folder), "checkpoint", variant)
    unet = read_json(folder / "unet" / "config.json")
    own = read_json(folder / "profile.json") if "profile.json" in chosen else {}
    named = family or own.get("family")
    found = str(named) if named else _family(pipeline, unet)
    try:
        said = Profile.model_validate({key: value for key, value in own.items() if key in Profile.model_fields})
    except ValidationError as error:
        raise InvalidModel(f"profile.json: {error.errors()[0]['loc'][0]}: {error.errors()[0]['msg']}") from error
    profile = profile_of(found, pipeline, said.model_dump(), changes or {})
    profile["cross_attention_dim"] = unet.get("cross_attention_dim")
    elsewhere = {}
    if scratch is not None and changes and changes.get("dtype"):
        elsewhere["profile.json"] = scratch / "profile.json"
        scratch.mkdir(parents=True, exist_ok=True)
        elsewhere["profile.json"].write_bytes(orjson.dumps({**own, "dtype": changes["dtype"]}))
        chosen["profile.json"] = "profile.json"
    return _found(folder, chosen, found, profile, elsewhere)


def read_vae(folder: Path, *, family: str | None = None, variant: str | None = None) -> FoundModel:
    """A VAE's diffusers folder; `family` is the one whose latents it decodes, told by scaling_factor where it can be.

    Raises InvalidModel with the file and the reason.
    """
    config = read_json(folder / "config.json")
    kind = str(config.get("_class_name"))
    if kind not in VAE_CLASSES:
        raise InvalidModel(f"config.json: _class_name is {kind}; one of {', '.join(VAE_CLASSES)} is needed")
    told = VAE_SCALES.get(config.get("scaling_factor", 0.18215)) if kind == "AutoencoderKL" else None
    if family is None and told is None:
        raise InvalidModel("config.json: does not say whose latents this VAE decodes; name the family")
    if family is not None and told is not None and family not in {told, *_others(told)}:
        raise InvalidModel(f"config.json: scaling_factor is that of {told}, not of {family}")
    chosen = choose(list_folder(folder), "vae", variant)
    return _found(folder, chosen, str(family or told), {"tiny": kind == "AutoencoderTiny"})


def read_controlnet(folder: Path, *, variant: str | None = None) -> FoundModel:
    """A ControlNet's diffusers folder; its family is found with torch. Raises InvalidModel with file and reason."""
    name = read_json(folder / "config.json").get("_class_name")
    if name != CONTROLNET_CLASS:
        raise InvalidModel(f"config.json: _class_name is {name}; {CONTROLNET_CLASS} is needed")
    return _found(folder, choose(list_folder(folder), "controlnet", variant), "", {})


def read_motion(folder: Path, *, variant: str | None = None, acceleration: str | None = None) -> FoundModel:
    """A motion adapter's diffusers folder; its family is found with torch. `acceleration` is the name of the LCM-LoRA
    that goes with it. Raises InvalidModel with file and reason."""
    config = read_json(folder / "config.json")
    if config.get("_class_name") != MOTION_CLASS:
        raise InvalidModel(f"config.json: _class_name is {config.get('_class_name')}; {MOTION_CLASS} is needed")
    if config.get("conv_in_channels"):
        raise InvalidModel("config.json: conv_in_channels is set: made to animate a given picture, which is not done")
    length = config.get("motion_max_seq_length", 32)
    if not isinstance(length, int) or not 2 <= length <= 1024:
        raise InvalidModel(f"config.json: motion_max_seq_length is {length!r}; a number of frames from 2 is needed")
    profile: dict[str, Any] = {"max_frames": length, **({"acceleration": acceleration} if acceleration else {})}
    return _found(folder, choose(list_folder(folder), "motion", variant), "", profile)


def read_adapter(path: Path) -> FoundModel:
    """A LoRA file or PEFT folders. Its cross-attention width goes into the profile: a hint at the checkpoints it fits.

    Raises InvalidModel with file, key and reason for what no checkpoint could take; the rest is found with torch.
    """
    if path.is_file():
        if path.suffix != ".safetensors":
            raise InvalidModel(f"{path.name}: a LoRA is a .safetensors file or a PEFT folder")
        root, chosen = path.parent, {path.name: "adapter.safetensors"}
    else:
        root, chosen = path, choose(list_folder(path), "style")
    headers = {name: read_header(root / name) for name in chosen if name.endswith(".safetensors")}
    for name, header in headers.items():
        if not any(LORA.search(key) for key in header.tensors):
            raise InvalidModel(f"{name}: no LoRA weights found (keys ending in {', '.join(LORA_DOWN)})")
    return _found(root, chosen, "", _widths(headers.values()))


def read_raw(path: Path, kind: ModelKind, variant: str | None = None) -> FoundModel:
    """The files of a model as they lie here, to be sent to a worker, which finds out what they are worth.

    Raises InvalidModel with file and reason for what cannot be a model.
    """
    if path.is_file():
        kind_of(path)
        return _found(path.parent, {path.name: path.name}, "", {})
    return _found(path, choose(list_folder(path), kind, variant), "", {})


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a small file. Raises InvalidModel."""
    try:
        if path.stat().st_size > SMALL_BYTES:
            raise InvalidModel(f"{path.name}: {path.stat().st_size} bytes are too many for a configuration")
        value = orjson.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise InvalidModel(
            f"{path.parent.name}/{path.name}: this file is missing; a diffusers folder has it"
        ) from error
    except ValueError as error:
        raise InvalidModel(f"{path.parent.name}/{path.name}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidModel(f"{path.parent.name}/{path.name}: a JSON object is expected")
    return value


def _family(pipeline: str, unet: dict[str, Any]) -> str:
    try:
        return family_of(pipeline, unet)
    except (TypeError, ValueError, AttributeError) as error:
        raise InvalidModel(f"unet/config.json: not a UNet's configuration: {error}") from error


def _others(latents: str) -> tuple[str, ...]:
    """Further families whose latents are the same."""
    return ("ssd-1b",) if latents == "sdxl" else ()


def _widths(headers: Iterable[Header]) -> dict[str, Any]:
    for header in headers:
        for key, tensor in header.tensors.items():
            if (
                key.endswith(LORA_DOWN)
                and "attn2" in key
                and ("to_k" in key or "to_v" in key)
                and len(tensor.shape) > 1
            ):
                return {"cross_attention_dim": tensor.shape[1]}
    return {}


def _found(
    root: Path,
    chosen: Mapping[str, str],
    family: str,
    profile: dict[str, Any],
    elsewhere: Mapping[str, Path] | None = None,
) -> FoundModel:
    """The chosen files, hashed; `elsewhere` says which of them do not lie below `root`."""
    files = []
    for name, inside in sorted(chosen.items(), key=lambda pair: pair[1]):
        path = (elsewhere or {}).get(name) or root / PurePosixPath(name)
        if path.suffix == ".safetensors":
            read_header(path)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files.append(FoundFile(inside, path, digest, path.stat().st_size))
    listing = orjson.dumps({file.path: file.sha256 for file in files}, option=orjson.OPT_SORT_KEYS)
    total = sum(file.bytes for file in files)
    source = {"name": root.name if len(files) > 1 else Path(next(iter(chosen))).name}
    if len(files) == 1:
        source["file_sha256"] = files[0].sha256
    return FoundModel(hashlib.sha256(listing).hexdigest(), family, total, tuple(files), profile, source)
