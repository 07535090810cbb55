"""Checkpoints in the original one-file layout: the same weights as the folder they were made from, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from farm.errors import InvalidModel
from farm.families import KNOWN, template
from workers.pipelines import original, structure
from workers.pipelines.load import load

from . import originals, toys

BIG: dict[str, tuple[int, int, int]] = {
    "sd15": (859_520_964, 123_060_480, 0),
    "sdxl": (2_567_463_684, 123_060_480, 694_659_840),
    "ssd-1b": (1_331_334_404, 123_060_480, 694_659_840),
}
"""Parameters of the published models: UNet and text encoders."""


@pytest.fixture(scope="session")
def ssd1b_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.ssd1b(tmp_path_factory.mktemp("ssd1b"))


@pytest.fixture(scope="session")
def folders(sd_folder: Path, sdxl_folder: Path, ssd1b_folder: Path) -> dict[str, Path]:
    return {"sd15": sd_folder, "sdxl": sdxl_folder, "ssd-1b": ssd1b_folder}


def weights(pipeline: Any) -> dict[str, torch.Tensor]:
    parts = [part for part in (*structure.ADAPTABLE, "vae") if getattr(pipeline, part, None) is not None]
    return {f"{part}.{key}": value for part in parts for key, value in getattr(pipeline, part).state_dict().items()}


@pytest.mark.parametrize("family", KNOWN)
def test_a_file_becomes_the_folder_it_was_made_from(folders: dict[str, Path], tmp_path: Path, family: str) -> None:
    file = originals.original(folders[family], tmp_path / "toy.safetensors")
    assert original.convert(file, tmp_path / "made", originals.template(folders[family])) == family
    kind: Any = StableDiffusionPipeline if family == "sd15" else StableDiffusionXLPipeline
    before = weights(kind.from_pretrained(str(folders[family])))
    after = weights(kind.from_pretrained(str(tmp_path / "made")))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert load(tmp_path / "made", "made", torch.float32, torch.float32).family == (
        "sd" if family == "sd15" else "sdxl"
    )


def test_stock_diffusers_reads_the_same_from_the_file(sdxl_folder: Path, tmp_path: Path) -> None:
    file = originals.original(sdxl_folder, tmp_path / "toy.safetensors")
    original.convert(file, tmp_path / "made", originals.template(sdxl_folder))
    for kind, part in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae")):
        stock = kind.from_single_file(str(file), config=str(sdxl_folder), subfolder=part, local_files_only=True)
        ours = kind.from_pretrained(str(tmp_path / "made" / part)).state_dict()
        assert all(torch.equal(ours[key], value) for key, value in stock.state_dict().items())


def test_numbers_stay_as_the_file_has_them(sd_folder: Path, tmp_path: Path) -> None:
    file = originals.original(sd_folder, tmp_path / "toy.safetensors")
    save_file({key: value.half() for key, value in load_file(file).items()}, file)
    original.convert(file, tmp_path / "made", originals.template(sd_folder))
    for part in ("unet", "vae", "text_encoder"):
        (path,) = (tmp_path / "made" / part).glob("*.safetensors")
        assert {value.dtype for value in load_file(path).values()} == {torch.float16}


def test_markers_of_velocity_training_reach_the_scheduler(sd_folder: Path, tmp_path: Path) -> None:
    file = originals.original(sd_folder, tmp_path / "v.safetensors", v_pred=torch.zeros(0), ztsnr=torch.zeros(0))
    original.convert(file, tmp_path / "made", originals.template(sd_folder))
    config = StableDiffusionPipeline.from_pretrained(str(tmp_path / "made")).scheduler.config
    assert (config.prediction_type, config.rescale_betas_zero_snr) == ("v_prediction", True)


UNET = "model.diffusion_model."
Change = Callable[[dict[str, torch.Tensor]], object]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.pop(UNET + "out.2.bias"), r"out\.bias: is missing from the file"),
        (lambda t: t.update({UNET + "surprise": torch.ones(1)}), "surprise: belongs to no layer"),
        (lambda t: t.update({UNET + "out.2.bias": torch.ones(5)}), r"conv_out\.bias: has shape \(5,\)"),
        (lambda t: t.update({"first_stage_model.extra": torch.ones(1)}), r"first_stage_model\.extra: belongs to no"),
        (lambda t: t.update({"something.else": torch.ones(1)}), "something.else: not a key of a checkpoint"),
        (lambda t: t.update({UNET + "input_blocks.0.0.weight": torch.ones(16, 9, 3, 3)}), "9 input channels"),
        (lambda t: [t.pop(key) for key in list(t) if key.startswith("first_stage")], "first_stage_model.: no key"),
        (lambda t: [t.pop(key) for key in list(t) if key.startswith("cond_")], "text encoder is missing"),
        (lambda t: t.update({"cond_stage_model.model.x": torch.ones(1)}), "Stable Diffusion 2 in one file"),
        (lambda t: t.update({"conditioner.embedders.0.model.ln_final.weight": torch.ones(1)}), "refiner"),
        (lambda t: t.pop(UNET + "input_blocks.0.0.weight"), "input_blocks.0.0.weight: this key is missing"),
        (lambda t: t.pop("cond_stage_model.transformer.text_model.final_layer_norm.bias"), "final_layer_norm.bias: is"),
    ],
)
def test_refusals_name_file_key_and_reason(sd_folder: Path, tmp_path: Path, change: Change, reason: str) -> None:
    file = originals.original(sd_folder, tmp_path / "toy.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(InvalidModel, match=rf"toy\.safetensors: .*{reason}"):
        original.convert(file, tmp_path / "made", originals.template(sd_folder))


@pytest.mark.parametrize("family", KNOWN)
def test_the_known_families_have_the_published_sizes(family: str) -> None:
    """The configurations that ship with the farm, against the parameter counts of the published models."""
    config = template(family)
    unet, first, second = BIG[family]
    assert count(structure.part_of("unet", config["unet"])) == unet
    assert count(structure.part_of("text_encoder", config["text_encoder"])) == first
    assert count(structure.part_of("vae", config["vae"])) == 83_653_863
    if second:
        assert count(structure.part_of("text_encoder_2", config["text_encoder_2"])) == second


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_a_vae_file_becomes_a_folder(sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    originals.pretend(monkeypatch, sd_folder)
    stock = AutoencoderKL.from_pretrained(str(sd_folder / "vae"))
    for number, front in enumerate(("", "first_stage_model.")):
        file = tmp_path / f"{number}.safetensors"
        save_file({front + key: value.contiguous() for key, value in originals.vae(stock.state_dict()).items()}, file)
        original.convert_vae(file, tmp_path / str(number), "sd15")
        ours = AutoencoderKL.from_pretrained(str(tmp_path / str(number))).state_dict()
        assert all(torch.equal(ours[key], value) for key, value in stock.state_dict().items())


def test_a_folder_with_missing_or_foreign_weights_is_refused(sd_folder: Path, tmp_path: Path) -> None:
    """Stock loading would fill the gap with random numbers."""
    structure.check_weights(sd_folder)
    copy = toys.sd(tmp_path)
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file({key: value for key, value in tensors.items() if key != "conv_out.bias"}, path)
    with pytest.raises(InvalidModel, match=r"unet: conv_out\.bias: this weight is missing"):
        structure.check_weights(copy)
    save_file({**tensors, "stranger": torch.ones(1)}, path)
    with pytest.raises(InvalidModel, match=r"unet/diffusion_pytorch_model\.safetensors: stranger: the configuration"):
        structure.check_weights(copy)
    save_file({**tensors, "conv_out.bias": torch.ones(9)}, path)
    with pytest.raises(InvalidModel, match=r"conv_out\.bias: shape \(9,\), the configuration asks for \(4,\)"):
        structure.check_weights(copy)
