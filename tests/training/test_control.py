"""The ControlNet's recipe on toy models: it changes nothing at first, the loss falls, a stop changes nothing, and what
is written is a ControlNet that the farm and stock diffusers take."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from farm.modelfiles import read_json
from tests.training import test_style as style
from workers.pipelines.structure import controls
from workers.training import crack_tiny_control, diffusion
from workers.training.crack_tiny_control import Controlled, Settings, controlnet_for, fit, masks_of
from workers.training.errors import TrainingError

SIZE = style.SIZE
model = style.model
"""The toy model that the style's recipe is tested on."""
SMALL = {"pictures": 2, "batch": 2, "bf16": False}


def hush(_: str) -> None:
    """Say nothing."""


def unet_with(**changes: object) -> UNet2DConditionModel:
    torch.manual_seed(0)
    config = dict(diffusion.build_unet(SIZE).config)
    return UNet2DConditionModel.from_config({**config, **changes})


@pytest.mark.parametrize(
    "changes", [{"addition_embed_type": None}, {"addition_embed_type": "text", "addition_embed_type_num_heads": 2}]
)
def test_before_training_nothing_changes_whatever_the_unet_adds_up(changes: dict[str, object]) -> None:
    unet = unet_with(**changes)
    net = controlnet_for(unet, 3)
    assert net.config.addition_embed_type_num_heads == unet.config.addition_embed_type_num_heads
    noisy, times, states = torch.randn(2, SIZE.latent, 16, 16), torch.tensor([10, 900]), torch.randn(2, 77, 16)
    with torch.no_grad():
        plain = unet(noisy, times, encoder_hidden_states=states).sample
        masks = masks_of(np.full((2, 128, 128), 255, np.uint8))
        controlled = Controlled(unet, net, masks)(noisy, times, encoder_hidden_states=states).sample
        assert torch.equal(plain, controlled)
        # What the copy computes on its way is what the UNet computes: the same words pooled by the same heads.
        for block in (net.controlnet_mid_block, *net.controlnet_down_blocks):
            torch.nn.init.normal_(block.weight, std=0.2)
        assert not torch.equal(plain, Controlled(unet, net, masks)(noisy, times, encoder_hidden_states=states).sample)
        if unet.config.addition_embed_type == "text":
            assert torch.equal(net.add_embedding(states), unet.add_embedding(states))


def test_the_loss_falls_and_the_base_stays(model: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    before = (model / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    settings = Settings(pictures=8, steps=50, rate=3e-3, batch=8, bf16=False)
    net = fit(model, tmp_path, settings, say=lines.append)
    losses = [float(line.split("loss ")[1].split()[0]) for line in lines]
    assert losses[-1] < losses[0]
    assert net.controlnet_mid_block.weight.abs().max() > 0, "it learnt to say something"
    assert (model / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == before


def test_a_stopped_one_equals_one_that_never_stopped(model: Path, tmp_path: Path) -> None:
    settings = Settings(steps=4, **SMALL)
    straight = fit(model, tmp_path / "straight", settings, say=hush)
    fit(model, tmp_path / "stopped", Settings(steps=2, **SMALL), say=hush)
    resumed = fit(model, tmp_path / "stopped", settings, say=hush)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_the_command_writes_what_is_taken(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    given = ["--model", str(model), "--work", str(tmp_path), "--batch", "2"]
    assert crack_tiny_control.main([*given, "--steps", "2", "--pictures", "4"]) == 0
    made = tmp_path / "control-mask"
    assert ControlNetModel.from_pretrained(made).config.in_channels == SIZE.latent
    assert controls(read_json(made / "config.json"), read_json(model / "unet" / "config.json")) is None
    assert not list(made.glob("*.bin"))
    monkeypatch.setattr(crack_tiny_control, "LARGEST", 1000)
    assert crack_tiny_control.main([*given, "--steps", "2", "--pictures", "4"]) == 1
    assert "may be shipped" in capsys.readouterr().err
    assert crack_tiny_control.main([*given, "--pictures", "0"]) == 1


def test_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"no model_index\.json"):
        fit(tmp_path, tmp_path, Settings(), say=hush)
    with pytest.raises(TrainingError, match="halves 9 times"):
        controlnet_for(unet_with(), 9)
