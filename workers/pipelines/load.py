"""A checkpoint: from a diffusers folder to a pipeline in host memory. Safetensors only, no code from the folder."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import orjson
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    ControlNetModel,
    MotionAdapter,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.utils import constants
from torch import Tensor, nn

from farm.errors import InvalidModel
from farm.safefile import read_header
from workers.pipelines.factors import UNET
from workers.pipelines.merge import Merger
from workers.pipelines.patching import LOADING
from workers.pipelines.pinned import pin, taken
from workers.pipelines.programs import Program
from workers.pipelines.prompts import PromptCache
from workers.pipelines.slots import Slots
from workers.pipelines.targets import target_modules

if constants.DIFFUSERS_DISABLE_REMOTE_CODE is not True:
    raise RuntimeError("DIFFUSERS_DISABLE_REMOTE_CODE must be 1 before diffusers is imported")

Family = Literal["sd", "sdxl"]

FAMILIES: dict[str, tuple[Family, Any]] = {
    "StableDiffusionPipeline": ("sd", StableDiffusionPipeline),
    "StableDiffusionXLPipeline": ("sdxl", StableDiffusionXLPipeline),
}
"""What model_index.json may name."""

PARTS: dict[str, frozenset[str]] = {
    "unet": frozenset({"UNet2DConditionModel"}),
    "vae": frozenset({"AutoencoderKL", "AutoencoderTiny"}),
    "text_encoder": frozenset({"CLIPTextModel"}),
    "text_encoder_2": frozenset({"CLIPTextModelWithProjection"}),
    "tokenizer": frozenset({"CLIPTokenizer", "CLIPTokenizerFast"}),
    "tokenizer_2": frozenset({"CLIPTokenizer", "CLIPTokenizerFast"}),
}
"""The parts this engine uses, and the classes it knows for each."""

WITH_WEIGHTS = ("unet", "vae", "text_encoder", "text_encoder_2")
UNUSED = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
VAES = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
NETS = {"ControlNetModel": ControlNetModel, "MotionAdapter": MotionAdapter}


class Encoder(NamedTuple):
    """A tokenizer with the text encoder it belongs to."""

    tokenizer: Any
    model: Any


@dataclass(eq=False)
class Pipeline:
    """A loaded checkpoint and the state of its live weights.

    `structure` is equal for checkpoints that take the same adapters; `load_seconds` is what reading it took.
    """

    checkpoint: str
    family: Family
    unet: Any
    encoders: tuple[Encoder, ...]
    vae: Any
    scheduler_config: dict[str, Any]
    zero_empty_negative: bool
    load_seconds: float
    vaes: dict[str, Any] = field(default_factory=dict)
    nets: dict[str, Any] = field(default_factory=dict)
    """ControlNets and motion adapters beside the checkpoint, by hash."""
    moving: dict[str, Any] = field(default_factory=dict)
    """UNets that draw frames, by their motion adapter's hash: made of that and of this checkpoint's own layers."""
    programs: dict[Any, Program] = field(default_factory=dict)
    """What of this pipeline is compiled, by the kind of call."""
    merger: Merger = field(init=False)
    slots: Slots = field(init=False)
    structure: str = field(init=False)
    prompts: PromptCache = field(default_factory=PromptCache)

    def __post_init__(self) -> None:
        parts = {"unet": self.unet}
        for name, encoder in zip(("text_encoder", "text_encoder_2"), self.encoders, strict=False):
            parts[name] = encoder.model
        targets = target_modules(parts)
        self.merger = Merger(targets)
        self.slots = Slots({name: module for name, module in targets.items() if name.startswith(UNET)})
        self.structure = hashlib.sha256(repr(sorted(self.merger.shapes.items())).encode()).hexdigest()

    def modules(self) -> Iterator[nn.Module]:
        """Every module with weights."""
        yield self.unet
        yield self.vae
        yield from (encoder.model for encoder in self.encoders)
        yield from self.vaes.values()
        yield from self.nets.values()

    def move(self, device: torch.device) -> None:
        """Everything of this pipeline to a device, merged weights and pristine copies alike."""
        for module in self.modules():
            module.to(device)
        self.merger.move(device)
        self.prompts.clear()

    def clear_slots(self) -> None:
        """Let go of all slots, and of what was compiled with them."""
        self.slots.clear()
        for key in [key for key, program in tuple(self.programs.items()) if program.slotted]:
            del self.programs[key]

    def park(self, room: int) -> None:
        """To host memory, as the checkpoint has it; pinned where there is a GPU, so that it comes back faster, unless
        that takes more than `room` bytes."""
        self.merger.clear()
        self.clear_slots()
        for program in tuple(self.programs.values()):
            # A graph has the device's addresses in it; what was compiled finds its weights wherever they are.
            program.let_go()
            program.weighed = False
        self.move(torch.device("cpu"))
        pin((tensor for module in self.modules() for tensor in _tensors(module)), room)

    @property
    def bytes(self) -> int:
        """Bytes of all weights, buffers, pristine copies and slots, each storage counted once."""
        beside = weighed((*self.vaes.values(), *self.nets.values()))
        return self._own_bytes + beside + self.merger.bytes + self.slots.bytes

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that it takes where it waits there."""
        return taken(tensor for module in self.modules() for tensor in _tensors(module))

    @property
    def bare_bytes(self) -> int:
        """Bytes of the checkpoint alone."""
        return self._own_bytes

    @cached_property
    def _own_bytes(self) -> int:
        """Measured once, before there are slots: thousands of tensors are too many to look at each micro-batch."""
        own = [self.unet, self.vae, *(encoder.model for encoder in self.encoders)]
        return measured(tensor for module in own for tensor in _tensors(module)) - self.slots.bytes


def measured(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind these tensors, each counted once."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def weighed(modules: Iterable[nn.Module]) -> int:
    """Bytes of the weights and buffers of modules that share none."""
    return sum(measured(_tensors(one)) for one in modules)


def check_folder(folder: Path) -> Family:
    """Refuse a folder this engine must not or cannot load, before a single weight is read. Raises InvalidModel."""
    index = _json(folder, "model_index.json")
    known = FAMILIES.get(str(index.get("_class_name")))
    if known is None:
        raise InvalidModel(
            f"{folder.name}/model_index.json: _class_name {index.get('_class_name')!r} is not one of {sorted(FAMILIES)}"
        )
    family = known[0]
    wanted = {"unet", "vae", "text_encoder", "tokenizer"}
    if family == "sdxl":
        wanted |= {"text_encoder_2", "tokenizer_2"}
    for part in sorted(wanted):
        named = index.get(part)
        if not isinstance(named, list) or len(named) != 2 or named[1] not in PARTS[part]:
            raise InvalidModel(f"{folder.name}/model_index.json: {part}: {named!r} is not one of {sorted(PARTS[part])}")
        if named[0] not in {"diffusers", "transformers"}:
            raise InvalidModel(f"{folder.name}/model_index.json: {part}: code from {named[0]!r} is never loaded")
    for part in WITH_WEIGHTS:
        if part in wanted:
            check_weights(folder / part)
    channels = _json(folder / "unet", "config.json").get("in_channels", 4)
    latent = _json(folder / "vae", "config.json").get("latent_channels", 4)
    if channels != latent:
        raise InvalidModel(
            f"{folder.name}/unet/config.json: a UNet of {channels} input channels for latents of {latent}: made for "
            "inpainting alone; its base model inpaints as well"
        )
    return family


def check_weights(folder: Path) -> int:
    """Bytes of the safetensors files of one part, each header checked. Raises InvalidModel where there are none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InvalidModel(f"{folder.parent.name}/{folder.name}: no .safetensors file (other formats are not read)")
    for file in files:
        read_header(file)
    return sum(file.stat().st_size for file in files)


def estimate(folder: Path, dtype: torch.dtype, vae_dtype: torch.dtype) -> int:
    """Bytes the weights of a checkpoint will take in memory, from the headers of its files alone. Raises InvalidModel.

    The VAE is counted in the wider number type, as it may need that.
    """
    half = _variant(folder) is not None
    total = 0
    for part in WITH_WEIGHTS:
        wide = max(dtype.itemsize, vae_dtype.itemsize) if part == "vae" else dtype.itemsize
        files = list((folder / part).glob("*.safetensors"))
        # Files of the other precision are not read, unless a part has no others.
        for file in [one for one in files if (".fp16" in one.name) == half] or files:
            total += sum(math.prod(one.shape) * wide for one in read_header(file).tensors.values())
    return total


def estimate_part(folder: Path, dtype: torch.dtype) -> int:
    """Bytes the weights of one part's folder will take in memory, from its files' headers. Raises InvalidModel."""
    check_weights(folder)
    files = sorted(folder.glob("*.safetensors"))
    return sum(math.prod(one.shape) * dtype.itemsize for file in files for one in read_header(file).tensors.values())


def load_net(folder: Path, dtype: torch.dtype) -> Any:
    """Read a ControlNet or a motion adapter into host memory. Raises InvalidModel."""
    check_weights(folder)
    name = str(_json(folder, "config.json").get("_class_name"))
    if name not in NETS:
        raise InvalidModel(f"{folder.name}/config.json: _class_name {name!r} is not one of {sorted(NETS)}")
    try:
        with LOADING:
            net = NETS[name].from_pretrained(str(folder), dtype=dtype, use_safetensors=True, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise InvalidModel(f"{folder.name}: cannot be loaded: {_first_line(error)}") from error
    return _ready(net)


def load(folder: Path, checkpoint: str, dtype: torch.dtype, vae_dtype: torch.dtype) -> Pipeline:
    """Read a checkpoint into host memory as `dtype`; its VAE as `vae_dtype` where it overflows in float16.

    Raises InvalidModel, naming the file, when the folder cannot be used.
    """
    family = check_folder(folder)
    started = time.perf_counter()
    kind = FAMILIES[str(_json(folder, "model_index.json")["_class_name"])][1]
    options: dict[str, Any] = dict(UNUSED)
    if family == "sdxl":
        options = {"image_encoder": None, "feature_extractor": None, "add_watermarker": False}
    else:
        options["requires_safety_checker"] = False
    if variant := _variant(folder):
        options["variant"] = variant
    try:
        with LOADING:
            made = kind.from_pretrained(
                str(folder),
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                low_cpu_mem_usage=True,
                **options,
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise InvalidModel(f"{folder.name}: cannot be loaded: {_first_line(error)}") from error
    encoders = [Encoder(made.tokenizer, made.text_encoder)]
    if family == "sdxl":
        encoders.append(Encoder(made.tokenizer_2, made.text_encoder_2))
    for encoder in encoders:
        encoder.model.requires_grad_(False).eval()
    return Pipeline(
        checkpoint=checkpoint,
        family=family,
        unet=_ready(made.unet),
        encoders=tuple(encoders),
        vae=_ready(_safe_vae(made.vae, family, vae_dtype)),
        scheduler_config=dict(made.scheduler.config),
        zero_empty_negative=bool(family == "sdxl" and made.config.force_zeros_for_empty_prompt),
        load_seconds=time.perf_counter() - started,
    )


def load_vae(folder: Path, family: Family, dtype: torch.dtype, vae_dtype: torch.dtype) -> Any:
    """Read a VAE that replaces the own one of a checkpoint of this family. Raises InvalidModel."""
    check_weights(folder)
    name = str(_json(folder, "config.json").get("_class_name"))
    if name not in VAES:
        raise InvalidModel(f"{folder.name}/config.json: _class_name {name!r} is not one of {sorted(VAES)}")
    try:
        with LOADING:
            vae = VAES[name].from_pretrained(str(folder), dtype=dtype, use_safetensors=True, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise InvalidModel(f"{folder.name}: cannot be loaded: {_first_line(error)}") from error
    return _ready(_safe_vae(vae, family, vae_dtype))


def _ready(module: Any) -> Any:
    """Channels last: a fifth faster for the VAE on a CPU, what half precision wants on a GPU, never slower."""
    return module.requires_grad_(False).eval().to(memory_format=torch.channels_last)


def _safe_vae(vae: Any, family: Family, vae_dtype: torch.dtype) -> Any:
    """The original SDXL VAE overflows in float16 and says so by `force_upcast`. For SD's that entry means nothing."""
    upcast = family == "sdxl" and vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    return vae.to(vae_dtype) if upcast else vae


def _variant(folder: Path) -> str | None:
    """`fp16` when the folder holds half-precision files only."""
    plain = list((folder / "unet").glob("diffusion_pytorch_model*.safetensors"))
    return "fp16" if plain and all(".fp16" in file.name for file in plain) else None


def _json(folder: Path, name: str) -> dict[str, Any]:
    try:
        body = orjson.loads((folder / name).read_bytes())
    except FileNotFoundError as error:
        raise InvalidModel(f"{folder.name}: {name} is missing; a checkpoint is a diffusers folder") from error
    except (OSError, orjson.JSONDecodeError) as error:
        raise InvalidModel(f"{folder.name}/{name}: not readable JSON") from error
    if not isinstance(body, dict):
        raise InvalidModel(f"{folder.name}/{name}: not a JSON object")
    return body


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
