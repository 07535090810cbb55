"""What a family is rendered with, who may change it, and how the number type reaches whoever loads the model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from farm.errors import InvalidModel
from farm.families import KNOWN, PROFILES, Profile, family_of, profile_of, template
from farm.modelfiles import FoundModel, read_checkpoint
from workers.pipelines.device import Device

GPU = Device(torch.device("cuda:0"), torch.float16, 1, open=True)


def test_every_known_family_has_a_profile_that_holds_together() -> None:
    assert tuple(PROFILES) == KNOWN
    for family, size, low, high, acceleration, guidance in (
        ("sd15", 512, 256, 1024, "lcm-lora-sdv1-5", 7.5),
        ("sdxl", 1024, 512, 2048, "lcm-lora-sdxl", 5.0),
        ("ssd-1b", 1024, 512, 2048, "lcm-lora-ssd-1b", 9.0),
    ):
        profile = PROFILES[family]
        assert Profile.model_validate(profile).model_dump(exclude_none=True) == profile
        assert (profile["width"], profile["height"]) == (size, size)
        assert (profile["min_size"], profile["max_size"], profile["size_multiple"]) == (low, high, 8)
        assert (profile["steps"], profile["guidance_scale"]) == (4, 1.0), "LCM-LoRA's own"
        assert (profile["teacher_steps"], profile["teacher_guidance_scale"]) == (25, guidance)
        assert (profile["acceleration"], profile["dtype"]) == (acceleration, "float16")
        config = template(family)
        assert family_of(config["model_index"]["_class_name"], config["unet"]) == family


def test_a_profile_is_changed_by_the_folder_and_then_by_the_person() -> None:
    before = json.dumps(PROFILES)
    pipeline = "StableDiffusionXLPipeline"
    profile = profile_of("sdxl", pipeline, {"steps": 6, "width": 768, "vae": None}, {"steps": 8, "dtype": "bfloat16"})
    assert profile == {**PROFILES["sdxl"], "steps": 8, "width": 768, "dtype": "bfloat16"}
    assert json.dumps(PROFILES) == before


@pytest.mark.parametrize(
    ("pipeline", "like"), [("StableDiffusionPipeline", "sd15"), ("StableDiffusionXLPipeline", "sdxl")]
)
def test_a_geometry_of_its_own_starts_like_its_kind_without_promises(pipeline: str, like: str) -> None:
    """Its LCM-LoRA is whatever is registered for it, and its number type the worker's."""
    promised = {"acceleration", "dtype"}
    expected = {key: value for key, value in PROFILES[like].items() if key not in promised}
    assert profile_of("sd-0123abcd", pipeline) == expected


def read(folder: Path, tmp_path: Path, **changes: Any) -> FoundModel:
    return read_checkpoint(folder, changes=changes, scratch=tmp_path / "scratch")


def test_the_number_type_that_a_person_names_becomes_part_of_the_model(sd_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sd_folder, tmp_path / "copy"))
    (folder / "profile.json").write_text('{"family": "walls", "steps": 6, "dtype": "float32"}')
    plain, changed = read(folder, tmp_path, steps=8), read(folder, tmp_path, steps=8, dtype="bfloat16")
    assert plain.hash != changed.hash, "other numbers, another model"
    assert (plain.profile["dtype"], changed.profile["dtype"]) == ("float32", "bfloat16")
    assert (changed.family, changed.profile["steps"]) == ("walls", 8)
    (kept,) = (file.source for file in changed.files if file.path == "profile.json")
    assert json.loads(kept.read_text()) == {"family": "walls", "steps": 6, "dtype": "bfloat16"}
    assert GPU.dtype_of(kept.parent) == torch.bfloat16
    assert GPU.dtype_of(folder) == torch.float32, "the folder itself is as it was"
    (folder / "profile.json").write_text('{"dtype": "float8"}')
    with pytest.raises(InvalidModel, match=r"profile\.json: dtype: Input should be 'float32', 'float16' or 'bfloat16'"):
        read(folder, tmp_path)


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (GPU, torch.bfloat16),
        (Device(GPU.place, torch.float16, 1, open=False), torch.float16),
        (Device(torch.device("cpu"), torch.float32, 1, open=True), torch.float32),
    ],
    ids=["left open", "said by the settings", "a CPU"],
)
def test_only_a_gpu_whose_settings_leave_it_open_follows_the_model(
    device: Device, expected: torch.dtype, tmp_path: Path
) -> None:
    assert device.dtype_of(tmp_path) == device.dtype, "no profile"
    (tmp_path / "profile.json").write_text("{}")
    assert device.dtype_of(tmp_path) == device.dtype, "a profile that does not say"
    (tmp_path / "profile.json").write_text('{"dtype": "bfloat16"}')
    assert device.dtype_of(tmp_path) == expected
