"""What adapters learn by, held against truth that is known; and checkpoints nothing can be learned on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.geometry import SD_UNET, SDXL_UNET
from farm.errors import FarmError
from farm.training import LcmLora, StyleLora
from tests.pipelines import toys
from workers.training import objectives
from workers.training.base import Condition, attach, open_base
from workers.training.distill import TARGETS, Draw, Solver, consistency, huber
from workers.training.errors import TrainingError

ALPHAS = DDIMScheduler(**toys.BETAS).alphas_cumprod
UNTOLD = Condition(None, None, None)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [50, 25])
def test_a_student_that_knows_the_picture_is_told_nothing_new(kind: str, steps: int) -> None:
    torch.manual_seed(0)
    clean, solver = torch.randn(3, 4, 4, 4), Solver(ALPHAS, kind, steps)

    def knows(latents: Tensor, times: Tensor) -> Tensor:
        signal, sigma = solver.roots(times, latents)
        noise = (latents - signal * clean) / sigma
        return noise if kind == "epsilon" else signal * noise - sigma * clean

    stride = 1000 // steps
    assert solver.stride == stride
    draw = Draw(torch.tensor([2 * stride - 1, 499, 999]), torch.randn_like(clean), torch.full((3, 1, 1, 1), 7.5))
    made, target = consistency(solver, clean, draw, knows, lambda *given: (knows(*given), knows(*given)))
    assert torch.allclose(made, clean, atol=2e-3)
    assert torch.allclose(target, clean, atol=2e-3)


@pytest.mark.parametrize(("jump", "end"), [(1, 479), (4, 419)])
def test_guidance_pushes_the_target_away_from_what_is_said_without_the_prompt(jump: int, end: int) -> None:
    """Against the formula of the paper, written out with the teacher's x0 and noise guided one by one."""
    torch.manual_seed(0)
    clean, noise, asked, free = (torch.randn(1, 4, 4, 4) for _ in range(4))
    start, w = 499, 6.0
    solver = Solver(ALPHAS, "epsilon", 50, jump)
    draw = Draw(torch.tensor([start]), noise, torch.full((1, 1, 1, 1), w))
    _, target = consistency(solver, clean, draw, lambda *_: torch.zeros_like(clean), lambda *_: (asked, free))
    a, b = ALPHAS[start], ALPHAS[end]
    noisy = a.sqrt() * clean + (1 - a).sqrt() * noise
    x_asked, x_free = ((noisy - (1 - a).sqrt() * each) / a.sqrt() for each in (asked, free))
    near = b.sqrt() * (x_asked + w * (x_asked - x_free)) + (1 - b).sqrt() * (asked + w * (asked - free))
    skip, out = 0.25 / ((10 * end) ** 2 + 0.25), 10 * end / ((10 * end) ** 2 + 0.25) ** 0.5
    assert torch.allclose(target, skip * near + out * near / b.sqrt(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("steps", "timesteps", "last"),
    [(4, 1000, 999), (12, 1000, 995), (50, 1000, 999), (500, 1000, 999), (33, 100, 98), (100, 100, 99)],
)
def test_what_is_learnt_reaches_the_noise_that_samplers_start_from(steps: int, timesteps: int, last: int) -> None:
    """The timesteps are those of the reference scripts, where less than a stride of them is left over."""
    torch.manual_seed(0)
    solver = Solver(ALPHAS[:timesteps], "epsilon", steps)
    starts = solver.starts(20_000)
    whole = np.arange(1, steps + 1) * (timesteps // steps) - 1
    assert set(starts.tolist()) == set(whole.tolist())
    assert int(starts.max()) == last > timesteps - 1 - solver.stride


@pytest.mark.parametrize(
    ("steps", "timesteps", "said"),
    [
        (36, 1000, "971 of 999, .*; 35 or 37 would do"),
        (350, 1000, "699 of 999, .*; 333 or 500 would do"),
        (600, 1000, "599 of 999, .*; 500 or 1000 would do"),
        (1001, 1000, "-1 of 999, .*; 1000 would do"),
    ],
)
def test_a_solver_that_leaves_the_noise_unlearnt_is_refused(steps: int, timesteps: int, said: str) -> None:
    with pytest.raises(TrainingError, match=f"solver {steps}: the noisiest of {steps} timesteps would be {said}"):
        Solver(ALPHAS[:timesteps], "epsilon", steps)


def test_options_with_such_a_solver_are_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ValidationError, match="solver 600: the noisiest of 600 timesteps would be 599 of 999"):
        LcmLora(checkpoint=Path("a"), data="b", out=Path("c"), solver=600)
    for solver in (4, 12, 50, 333, 500, 1000):
        assert LcmLora(checkpoint=Path("a"), data="b", out=Path("c"), solver=solver).solver == solver


def test_pseudo_huber_is_square_near_zero_and_linear_far_away() -> None:
    zero = torch.zeros(1)
    assert huber(torch.tensor([1e-2]), zero, 1.0).item() == pytest.approx(1e-4 / 2, rel=0.01)
    assert huber(torch.tensor([50.0]), zero, 0.1).item() == pytest.approx(49.9, rel=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_style_loss_is_that_of_diffusers_script(kind: str) -> None:
    schedule = DDIMScheduler(**toys.BETAS, prediction_type=kind)
    base: Any = SimpleNamespace(alphas=schedule.alphas_cumprod, kind=kind)
    options = StyleLora(checkpoint=Path("a"), data="b", out=Path("c"), noise_offset=0.1)
    clean, seen = torch.randn(3, 4, 8, 8), list[tuple[Tensor, Tensor]]()

    def network(latents: Tensor, times: Tensor, _: Condition) -> Tensor:
        seen.append((latents, times))
        return torch.full_like(latents, 0.25)

    torch.manual_seed(7)
    got = objectives.denoising(options, base)(network, clean, UNTOLD, UNTOLD)
    ((noisy, times),) = seen
    torch.manual_seed(7)
    noise = torch.randn(clean.shape) + 0.1 * torch.randn(3, 4, 1, 1)
    assert torch.allclose(noisy, schedule.add_noise(clean, noise, times), atol=1e-5)
    target = noise if kind == "epsilon" else schedule.get_velocity(clean, noise, times)
    assert torch.allclose(got, functional.mse_loss(torch.full_like(clean, 0.25), target), rtol=1e-4)


def test_the_range_of_guidance_follows_the_family_unless_given() -> None:
    plain = LcmLora(checkpoint=Path("a"), data="b", out=Path("c"))
    assert objectives.guidance(plain, xl=False) == (5.0, 15.0)
    assert objectives.guidance(plain, xl=True) == (3.0, 15.0)
    given = plain.model_copy(update={"guidance_low": 0.0, "guidance_high": 2.0})
    assert objectives.guidance(given, xl=True) == (0.0, 2.0)


@pytest.fixture
def sd(tmp_path: Path) -> Path:
    return toys.sd(tmp_path)


def change(path: Path, **entries: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def flow(folder: Path) -> None:
    name = "FlowMatchEulerDiscreteScheduler"
    change(folder / "model_index.json", scheduler=["diffusers", name])
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps({"_class_name": name}))


def inpainting(folder: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.unet = toys.unet(in_channels=9)
    pipeline.save_pretrained(folder)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda f: change(f / "model_index.json", _class_name="StableDiffusion3Pipeline"),
            r"'StableDiffusion3Pipeline' is not one of",
        ),
        (inpainting, "9 input channels for latents of 4: made for inpainting alone"),
        (flow, "FlowMatchEulerDiscreteScheduler is no schedule of DDPM noise"),
        (
            lambda f: change(f / "scheduler/scheduler_config.json", prediction_type="sample"),
            "prediction_type 'sample' cannot be trained",
        ),
        (
            lambda f: change(f / "scheduler/scheduler_config.json", rescale_betas_zero_snr=True),
            "needs v_prediction, not epsilon",
        ),
        (lambda f: (f / "unet/diffusion_pytorch_model.safetensors").unlink(), r"unet: no \.safetensors file"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(sd: Path, spoil: Callable[[Path], object], said: str) -> None:
    assert open_base(sd).native == 64
    spoil(sd)
    with pytest.raises((TrainingError, FarmError), match=said):
        open_base(sd)


def test_a_file_or_nothing_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(TrainingError, match="convert it to a diffusers folder"):
        open_base(tmp_path / "model.safetensors")
    with pytest.raises(TrainingError, match="no such folder"):
        open_base(tmp_path / "nothing")


def test_sizes_fit_the_autoencoder(sd: Path) -> None:
    base = open_base(sd)
    base.check_size(64, 40)
    with pytest.raises(TrainingError, match="height 44 is no multiple of 8; 48 would be"):
        base.check_size(64, 44)


def learnt(unet: UNet2DConditionModel, rank: int) -> int:
    """Weights of an adapter of that rank on every usual layer: of what goes in, and of what comes out."""
    layers = [
        part
        for path, part in unet.named_modules()
        if isinstance(part, nn.Linear | nn.Conv2d) and f".{path}".endswith(tuple(f".{name}" for name in TARGETS))
    ]
    return rank * sum(layer.weight[0].numel() + layer.weight.shape[0] for layer in layers)


def test_as_many_weights_learn_as_the_documentation_says() -> None:
    """Counted on models of true geometry that take no memory; and that it is counted right, on a toy."""
    toy = toys.unet()
    count = learnt(toy, 64)
    base: Any = SimpleNamespace(network=SimpleNamespace(unet=toy, texts=[]))
    attach(base, TARGETS, chosen=False, rank=64, alpha=64, text=False)
    assert sum(weight.numel() for weight in toy.parameters() if weight.requires_grad) == count
    with torch.device("meta"):
        small, large = (learnt(UNet2DConditionModel(**config), 64) for config in (SD_UNET, SDXL_UNET))
    # In float32, with AdamW's two moments of each.
    said = (
        f"| trainable weights at rank 64 | {small / 1e6:.1f} million: {small * 12 / 1e9:.1f} GB with optimizer "
        f"| {large / 1e6:.0f} million: {large * 12 / 1e9:.1f} GB with optimizer |"
    )
    assert said in (Path(__file__).parents[2] / "docs/training.md").read_text().splitlines()
