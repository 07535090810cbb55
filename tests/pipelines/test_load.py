"""Which folders load, and which are refused before a weight is read."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file

from farm.errors import InvalidModel
from workers.pipelines.engine import Engine
from workers.pipelines.load import estimate, load, load_vae, measured
from workers.pipelines.upsample import merge_upsampling

from . import toys
from .conftest import farm_settings, go_on, recipe

F32 = torch.float32


@pytest.fixture
def folder(tmp_path: Path, sd_folder: Path) -> Path:
    """A copy of the toy checkpoint that a test may spoil."""
    return Path(shutil.copytree(sd_folder, tmp_path / "copy"))


def edit(folder: Path, change: Callable[[dict[str, Any]], object], name: str = "model_index.json") -> None:
    body = json.loads((folder / name).read_text())
    change(body)
    (folder / name).write_text(json.dumps(body))


def test_families(sd_folder: Path, sdxl_folder: Path) -> None:
    sd, sdxl = load(sd_folder, "a", F32, F32), load(sdxl_folder, "b", F32, F32)
    assert (sd.family, len(sd.encoders), sd.zero_empty_negative) == ("sd", 1, False)
    assert (sdxl.family, len(sdxl.encoders), sdxl.zero_empty_negative) == ("sdxl", 2, True)
    assert sd.structure != sdxl.structure
    assert sd.load_seconds > 0
    assert all(not parameter.requires_grad for module in sd.modules() for parameter in module.parameters())


def test_bytes_are_measured(sd_folder: Path) -> None:
    full, half = load(sd_folder, "a", F32, F32), load(sd_folder, "a", torch.float16, F32)
    assert full.bytes == pytest.approx(estimate(sd_folder, torch.float32, torch.float32), rel=0.1)
    assert half.bytes == pytest.approx(full.bytes / 2, rel=0.05)
    tensor = torch.zeros(100)
    assert measured([tensor, tensor[:50]]) == 400, "a storage is counted once"


def test_the_sdxl_vae_leaves_float16(sdxl_folder: Path) -> None:
    loaded = load(sdxl_folder, "b", torch.float16, F32)
    assert (loaded.unet.dtype, loaded.vae.dtype) == (torch.float16, F32)


def test_half_precision_files_only(folder: Path) -> None:
    for part in ("unet", "vae", "text_encoder"):
        (file,) = (folder / part).glob("*.safetensors")
        save_file({key: value.half() for key, value in load_file(file).items()}, file, {"format": "pt"})
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    assert load(folder, "a", torch.float16, F32).unet.dtype == torch.float16


def test_the_safety_checker_is_never_loaded(folder: Path) -> None:
    edit(folder, lambda body: body.update(safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"]))
    assert load(folder, "a", F32, F32).family == "sd"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"_class_name": "FluxPipeline"}, "_class_name 'FluxPipeline' is not one of"),
        ({"_class_name": None}, "_class_name None"),
        ({"unet": ["my_code", "UNet2DConditionModel"]}, "code from 'my_code' is never loaded"),
        ({"unet": ["diffusers", "Anything"]}, "unet: .*is not one of"),
        ({"text_encoder": [None, None]}, "text_encoder: .*is not one of"),
        ({"vae": "diffusers"}, "vae: 'diffusers'"),
    ],
)
def test_a_suspicious_index_is_refused(folder: Path, change: dict[str, Any], reason: str) -> None:
    edit(folder, lambda body: body.update(change))
    with pytest.raises(InvalidModel, match=rf"copy/model_index\.json: .*{reason}"):
        load(folder, "a", F32, F32)


def test_pickles_are_never_read(folder: Path) -> None:
    (weights,) = (folder / "unet").glob("*.safetensors")
    torch.save(load_file(weights), folder / "unet" / "diffusion_pytorch_model.bin")
    weights.unlink()
    with pytest.raises(InvalidModel, match=r"copy/unet: no \.safetensors file"):
        load(folder, "a", F32, F32)
    (folder / "unet" / "diffusion_pytorch_model.bin").rename(weights)
    with pytest.raises(InvalidModel, match=r"diffusion_pytorch_model\.safetensors: this is a pickle"):
        load(folder, "a", F32, F32)


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.mark,)


def test_nothing_that_lies_in_a_folder_is_run(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "it-ran"
    for name in ("pipeline.py", "unet/unet_2d_condition.py", "modeling.py", "scheduler/my_scheduler.py"):
        (folder / name).write_text(f"open({str(mark)!r}, 'w')\n")
    for name in ("model.ckpt", "unet/diffusion_pytorch_model.bin", "unet/optimizer.pt", "vae/scaler.pkl"):
        (folder / name).write_bytes(pickle.dumps(Canary(mark)))
    assert load(folder, "a", F32, F32).family == "sd"
    for change in ({"_class_name": ["pipeline", "MyPipeline"]}, {"unet": ["pipeline", "UNet2DConditionModel"]}):
        edit(folder, lambda body, change=change: body.update(change))  # type: ignore[misc]
        with pytest.raises(InvalidModel):
            load(folder, "a", F32, F32)
    assert not mark.exists()


def test_weights_of_the_wrong_shape_are_refused(folder: Path) -> None:
    edit(folder, lambda body: body.update(block_out_channels=[8, 32]), "unet/config.json")
    with pytest.raises(InvalidModel, match="copy: cannot be loaded"):
        load(folder, "a", F32, F32)


@pytest.mark.parametrize("body", [None, "not json", "[1]"])
def test_no_index(tmp_path: Path, body: str | None) -> None:
    if body is not None:
        (tmp_path / "model_index.json").write_text(body)
    with pytest.raises(InvalidModel, match=r"model_index\.json"):
        load(tmp_path, "a", F32, F32)


def test_another_vae(tmp_path: Path, sd_folder: Path) -> None:
    """A VAE named by the recipe replaces the checkpoint's own, TAESD's kind included."""
    torch.manual_seed(9)
    toys.vae().save_pretrained(tmp_path / "full")
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    )
    tiny.save_pretrained(tmp_path / "tiny")
    places = {"sd": sd_folder, "full": tmp_path / "full", "tiny": tmp_path / "tiny"}
    engine = Engine(farm_settings(), places.__getitem__)
    pictures = {}
    for vae in (None, "full", "tiny", "full"):
        wanted = [recipe(vae=vae)]
        (picture,) = engine.render(engine.stage(wanted), wanted, go_on)
        assert picture is not None
        assert picture.shape == (64, 64, 3)
        assert pictures.setdefault(vae, picture.tobytes()) == picture.tobytes()
    assert len(set(pictures.values())) == 3


def test_a_folder_that_is_no_vae_is_refused(sd_folder: Path) -> None:
    with pytest.raises(InvalidModel, match="'UNet2DConditionModel' is not one of"):
        load_vae(sd_folder / "unet", "sd", F32, F32)


def test_upsampling_in_one_step_decodes_the_same(sd_folder: Path) -> None:
    plain, merged = (load(sd_folder, "a", F32, F32).vae for _ in range(2))
    assert merge_upsampling(merged) == 3
    assert merge_upsampling(merged) == 0
    latents = torch.randn((2, 4, 6, 10), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, made = (vae.decode(latents, return_dict=False)[0] for vae in (plain, merged))
    assert made.shape == (2, 3, 48, 80)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
