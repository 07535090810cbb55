"""The style's recipe on a toy model: the loss falls, a stop changes nothing, other models' work is not continued."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from farm.painter import caption, sample_scene
from workers.training import autoencoder, crack_tiny_style, diffusion, tokens
from workers.training.crack_tiny_style import Settings, fit
from workers.training.errors import TrainingError
from workers.training.export import export_pipeline

SIZE = diffusion.Size(channels=(16, 16, 32), heads=2, text_width=16, text_layers=1)


def hush(_: str) -> None:
    """Say nothing."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    rng = np.random.default_rng(0)
    texts = [caption(sample_scene(rng), rng) for _ in range(100)]
    tokenizer = tokens.build(texts, folder / "words", merges=40)
    torch.manual_seed(0)
    export_pipeline(
        folder,
        vae=autoencoder.build((8, 8, 8, 16)),
        text=diffusion.build_text(SIZE, tokenizer),
        tokenizer=tokenizer,
        unet=diffusion.build_unet(SIZE),
        schedule=diffusion.scheduler(),
    )
    return folder


def test_the_loss_falls_and_the_base_stays(model: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    settings = Settings(pictures=8, steps=50, rate=3e-3, batch=8, rank=4, bf16=False)
    unet = fit(model, tmp_path, settings, say=lines.append)
    losses = [float(line.split("loss ")[1].split()[0]) for line in lines]
    assert losses[-1] < losses[0]
    before = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    unet.unload_lora()
    assert all(torch.equal(value.float(), unet.state_dict()[name]) for name, value in before.items())


def test_a_stopped_style_equals_one_that_never_stopped(model: Path, tmp_path: Path) -> None:
    settings = Settings(pictures=4, steps=4, batch=2, rank=2, bf16=False)
    straight = fit(model, tmp_path / "straight", settings, say=hush)
    fit(model, tmp_path / "stopped", Settings(pictures=4, steps=2, batch=2, rank=2, bf16=False), say=hush)
    resumed = fit(model, tmp_path / "stopped", settings, say=hush)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_the_command_writes_an_adapter(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    out = tmp_path / "style-night.safetensors"
    given = ["--model", str(model), "--work", str(tmp_path), "--out", str(out)]
    assert crack_tiny_style.main([*given, "--steps", "2", "--pictures", "4"]) == 0
    assert all(key.startswith("lora_unet_") for key in load_file(out))
    assert (tmp_path / "style-settings.json").exists()
    assert crack_tiny_style.main([*given, "--pictures", "0"]) == 1
    assert "--pictures 0: should be greater than or equal to 1" in capsys.readouterr().err


def test_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"no model_index\.json"):
        fit(tmp_path, tmp_path, Settings(), say=hush)


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
def test_a_perfect_guess_costs_nothing(kind: str) -> None:
    """Whatever a UNet predicts, the loss wants what the schedule says."""
    alphas = diffusion.scheduler().alphas_cumprod.clamp(min=1e-3)
    clean = torch.randn(4, 4, 2, 2)

    class Knows(torch.nn.Module):
        def forward(self, noisy: torch.Tensor, times: torch.Tensor, encoder_hidden_states: torch.Tensor) -> object:
            alpha = alphas[times].view(-1, 1, 1, 1)
            noise = (noisy - alpha.sqrt() * clean) / (1 - alpha).sqrt()
            guess = noise if kind == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
            return type("Output", (), {"sample": guess + encoder_hidden_states})()

    def loss(error: float) -> float:
        return float(diffusion.denoising_loss(Knows(), clean, torch.tensor(error), alphas, kind=kind, bf16=False))

    assert loss(0.0) == pytest.approx(0.0, abs=1e-8)
    assert loss(0.1) > 1e-4
    with pytest.raises(TrainingError, match="'sample' cannot be trained"):
        diffusion.denoising_loss(Knows(), clean, torch.tensor(0.0), alphas, kind="sample")
