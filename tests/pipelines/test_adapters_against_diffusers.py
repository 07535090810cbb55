"""Adapters merged by the farm against diffusers' own loaders and `fuse_lora`, weight by weight.

Tolerance: 2e-6 of the largest weight, in float32; both add the same products, in another order.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from peft import LoraConfig, PeftModel, get_peft_model

from workers.pipelines.adapters import read_adapter
from workers.pipelines.load import load
from workers.pipelines.structure import folder_shapes
from workers.pipelines.targets import aliases

from . import toys

TOLERANCE = 2e-6
UNET = ("attn1.to_q", "attn2.to_k", "attn2.to_out.0", "ff.net.2", "proj_in", "conv1", "conv_shortcut", "time_emb_proj")
TEXT = ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1")
WEIGHTS = (1.8, -0.5)


@pytest.fixture(scope="module")
def folders(sd_folder: Path, sdxl_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"sd": sd_folder, "sdxl": sdxl_folder, "ssd-1b": toys.ssd1b(tmp_path_factory.mktemp("ssd1b"))}


def stock(folder: Path, family: str) -> Any:
    kind: Any = StableDiffusionPipeline if family == "sd" else StableDiffusionXLPipeline
    return kind.from_pretrained(str(folder), local_files_only=True)


def chosen(folder: Path, ends: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    layers = {name.removesuffix(".weight"): shape for name, shape in folder_shapes(folder).items()}
    return {name: shape for name, shape in layers.items() if name.endswith(ends)}


def merged(folder: Path, *files: tuple[Path, float]) -> dict[str, torch.Tensor]:
    """Weights after the farm's own merge, by canonical name."""
    pipeline = load(folder, "toy", torch.float32, torch.float32)
    shapes = pipeline.merger.shapes
    uses = [(read_adapter(file, str(n), shapes, aliases(shapes)), weight) for n, (file, weight) in enumerate(files)]
    pipeline.merger.apply(uses)
    return {name: pipeline.merger._live(name).detach() for name in shapes}


def fused(pipeline: Any) -> dict[str, torch.Tensor]:
    """The same of a stock pipeline whose adapters were fused."""
    found = {}
    for part in ("unet", "text_encoder", "text_encoder_2"):
        model = getattr(pipeline, part, None)
        for name, module in model.named_modules() if model is not None else ():
            layer = getattr(module, "base_layer", module)
            if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
                plain = name.removeprefix("text_model.").removesuffix(".base_layer")
                found[f"{part}.{plain}.weight"] = layer.weight.detach()
    return found


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], folder: Path, touched: int) -> None:
    assert ours.keys() <= theirs.keys()
    bare = merged(folder)
    changed = 0
    for name, mine in ours.items():
        limit = TOLERANCE * max(1.0, float(mine.abs().max()))
        assert float((mine - theirs[name]).abs().max()) <= limit, name
        changed += not torch.equal(mine, bare[name])
    assert changed == touched


@pytest.mark.parametrize("family", ["sd", "sdxl", "ssd-1b"])
@pytest.mark.parametrize("write", [toys.kohya, toys.diffusers_file], ids=["kohya", "diffusers"])
def test_files_with_text_encoders(
    folders: dict[str, Path], tmp_path: Path, family: str, write: Callable[..., Path]
) -> None:
    folder = folders[family]
    prefixes = [toys.KOHYA if family == "sd" else toys.KOHYA_XL] if write is toys.kohya else []
    layers = chosen(folder, UNET + TEXT)
    files = [
        write(tmp_path / f"{n}.safetensors", toys.changes(layers, seed=n, strength=0.2), *prefixes) for n in range(2)
    ]
    pipeline = stock(folder, family)
    for number, file in enumerate(files):
        pipeline.load_lora_weights(str(file), adapter_name=f"a{number}", local_files_only=True)
    pipeline.set_adapters(["a0", "a1"], [1.8, -0.5])
    parts = ["unet", "text_encoder"] + (["text_encoder_2"] if family != "sd" else [])
    pipeline.fuse_lora(components=parts, adapter_names=["a0", "a1"])
    same(merged(folder, (files[0], 1.8), (files[1], -0.5)), fused(pipeline), folder, len(layers))


@pytest.mark.parametrize("weight", WEIGHTS)
def test_peft_folders_of_diffengine(sdxl_folder: Path, tmp_path: Path, weight: float) -> None:
    """Written by PEFT itself, as DiffEngine does: `unet/`, `text_encoder_one/`, `text_encoder_two/`; merged by PEFT."""
    source = stock(sdxl_folder, "sdxl")
    names = {"unet": "unet", "text_encoder": "text_encoder_one", "text_encoder_2": "text_encoder_two"}
    torch.manual_seed(3)
    for part, name in names.items():
        targets = ["to_q", "to_k", "proj_in"] if part == "unet" else ["q_proj", "fc1"]
        config = LoraConfig(r=8, lora_alpha=8, target_modules=targets, init_lora_weights=False)
        get_peft_model(getattr(source, part), config).save_pretrained(str(tmp_path / name))
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())["peft_type"] == "LORA"
    theirs = stock(sdxl_folder, "sdxl")
    for part, name in names.items():
        model = PeftModel.from_pretrained(getattr(theirs, part), str(tmp_path / name))
        for module in model.modules():
            if hasattr(module, "scaling"):
                module.scaling = {key: value * weight for key, value in module.scaling.items()}
        setattr(theirs, part, model.merge_and_unload())
    touched = len(chosen(sdxl_folder, ("to_q", "to_k", "proj_in", "q_proj", "fc1")))
    same(merged(sdxl_folder, (tmp_path, weight)), fused(theirs), sdxl_folder, touched)
