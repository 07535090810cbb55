"""A ControlNet that was shipped once stays whole until another one is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel

from tests.training import test_style as style
from tests.training.test_adapter_trouble import small_disk
from workers.training import crack_tiny_control, diffusion
from workers.training.crack_tiny_control import controlnet_for, export
from workers.training.errors import TrainingError


def net(value: float) -> ControlNetModel:
    """A ControlNet that can be told from others."""
    made = controlnet_for(diffusion.build_unet(style.SIZE), 3)
    torch.nn.init.constant_(made.controlnet_mid_block.weight, value)
    return made


def held(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_cannot_be_shipped_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "deep" / "control"
    export(folder, net(0.25))
    before = held(folder)
    assert set(before) == {"config.json", "diffusion_pytorch_model.safetensors"}
    with small_disk(10_000), pytest.raises(TrainingError, match=rf"cannot write the ControlNet to {folder}: "):
        export(folder, net(0.5))
    assert held(folder) == before
    monkeypatch.setattr(crack_tiny_control, "LARGEST", 1000)
    with pytest.raises(TrainingError, match=r"the ControlNet has 0\.\d MB of weights, 0 at most may be shipped"):
        export(folder, net(0.5))
    assert held(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["control"], "nothing is left beside it"


def test_a_new_one_takes_its_place_and_leaves_what_else_is_there(tmp_path: Path) -> None:
    real, folder = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    folder.symlink_to(real)
    (real / "README.md").write_text("what it is")
    # As a process that was killed leaves it.
    (tmp_path / "real.part").mkdir()
    (tmp_path / "real.part" / "other.bin").write_bytes(b"half")
    for value in (0.25, 0.5):
        size = export(folder, net(value))
        assert size == (real / "diffusion_pytorch_model.safetensors").stat().st_size
        back = ControlNetModel.from_pretrained(folder)
        assert torch.equal(back.controlnet_mid_block.weight, torch.full_like(back.controlnet_mid_block.weight, value))
    assert set(held(real)) == {"README.md", "config.json", "diffusion_pytorch_model.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == {"real", "link"}
