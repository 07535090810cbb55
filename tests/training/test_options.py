"""Options of the trainers that decide what is learned, each by what it changes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional

from farm.training import SCHEDULE, LcmLora, StyleLora
from tests.pipelines import toys
from tests.training.conftest import FEW, Folders, hush, weights
from workers.training import crack_tiny, diffusion, loop, objectives, run
from workers.training.base import Condition, open_base
from workers.training.distill import huber

pytestmark = pytest.mark.usefixtures("one_thread")
ALPHAS = DDIMScheduler(**toys.BETAS).alphas_cumprod
UNTOLD = Condition(None, None, None)
DATA = "painter:2"


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_snr_gamma_weighs_each_picture_by_its_timestep(kind: str, tmp_path: Path) -> None:
    base: Any = SimpleNamespace(alphas=ALPHAS, kind=kind)
    clean = torch.zeros(1, 4, 4, 4)

    def lost(gamma: float | None, seed: int) -> float:
        options = StyleLora(checkpoint=tmp_path, data=DATA, out=tmp_path, snr_gamma=gamma)
        torch.manual_seed(seed)
        found: Tensor = objectives.denoising(options, base)(lambda noisy, *_: 0.5 * noisy, clean, UNTOLD, UNTOLD)
        return float(found)

    for seed in range(5):
        # What the loss draws, in its order: noise, its shift, timesteps.
        torch.manual_seed(seed)
        torch.randn(clean.shape), torch.randn(1, 4, 1, 1)
        alpha = ALPHAS[torch.randint(0, len(ALPHAS), (1,))]
        ratio = float(alpha / (1 - alpha))
        weight = min(ratio, 5.0) / (ratio if kind == "epsilon" else ratio + 1)
        assert lost(5.0, seed) == pytest.approx(weight * lost(None, seed), rel=1e-5)


def test_the_loss_of_distillation_is_the_one_that_was_asked_for(
    bases: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    made, target = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    monkeypatch.setattr(objectives, "consistency", lambda *_: (made, target))
    base = open_base(bases["sd"])

    def lost(**more: Any) -> float:
        options = LcmLora(checkpoint=bases["sd"], data=DATA, out=tmp_path, **more)
        found: Tensor = objectives.distillation(options, base)(base.network, made, UNTOLD, UNTOLD)
        return float(found)

    assert lost(loss="l2") == float(functional.mse_loss(made, target))
    assert lost(loss="l2", huber_c=0.5) == lost(loss="l2")
    assert lost(huber_c=0.5) == float(huber(made, target, 0.5))
    assert lost() == float(huber(made, target, 0.001)) != lost(huber_c=0.5)


def test_samples_take_as_many_steps_as_their_scheduler_has(tmp_path: Path) -> None:
    # As checkpoints of SD 1.x have it.
    ddim = DDIMScheduler(**toys.BETAS, steps_offset=1)
    for kind, scheduler, most in ((LcmLora, LCMScheduler(**toys.BETAS), 50), (StyleLora, ddim, 999)):
        given = {"checkpoint": tmp_path, "data": DATA, "out": tmp_path}
        scheduler.set_timesteps(kind(**given, sample_steps=most).sample_steps)
        assert len(scheduler.timesteps) == most
        assert int(scheduler.timesteps.max()) < SCHEDULE
        with pytest.raises(ValidationError, match="sample_steps"):
            kind(**given, sample_steps=most + 1)


def test_weights_decay_as_much_as_was_asked_for(bases: Folders, tmp_path: Path) -> None:
    """In the first step nothing else happens to what goes into an adapter, as what comes out of it is still zero."""

    def trained(name: str, decay: float) -> dict[str, Tensor]:
        options = StyleLora(
            checkpoint=bases["sd"],
            data=DATA,
            out=tmp_path / name,
            **{**FEW, "steps": 1, "rate": 0.1, "warmup": 0, "decay": 0.0, "weight_decay": decay},
        )
        run.train(options, say=hush)
        return weights(options.out)

    none, some = trained("none", 0.0), trained("some", 0.5)
    downs = [name for name in none if "lora_A" in name]
    assert downs
    for name in downs:
        assert torch.allclose(some[name], none[name] * (1 - 0.1 * 0.5), rtol=1e-5, atol=1e-8)


def test_the_recipe_ends_after_a_stage_and_trains_as_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def toy(**more: Any) -> diffusion.Size:
        return SIZE(**{"channels": (16, 16, 32), "heads": 2, "text_width": 16, "text_layers": 1, **more})

    monkeypatch.setattr(diffusion, "Size", toy)
    monkeypatch.setattr(crack_tiny, "CAPTIONS", 300)
    compiled, precisions = list[Any](), list[torch.dtype]()
    real = diffusion.denoising_loss

    def watched(run: Any, *given: Any, **more: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=more["bf16"]):
            precisions.append((torch.ones(1, 1) @ torch.ones(1, 1)).dtype)
        return real(run, *given, **more)

    def compile_(module: Any) -> Any:
        compiled.append(module)
        return module

    monkeypatch.setattr(diffusion, "denoising_loss", watched)
    monkeypatch.setattr(torch, "compile", compile_)
    few = [word for stage in ("autoencoder", "refine", "words", "base") for word in (f"--{stage}-steps", "1")]
    command = ["--pool", "4", "--base-batch", "2", *few]
    for name, more, dtype in (("usual", [], torch.bfloat16), ("told", ["--compile", "--float32"], torch.float32)):
        work = tmp_path / name
        given = ["--work", str(work), *command, *more]
        assert crack_tiny.main([*given, "--stage", "words"]) == 0
        assert capsys.readouterr().out.endswith(f"{work}: words is done\n")
        assert (work / "words.pt").exists()
        assert not (work / "base.pt").exists()
        assert not compiled
        assert crack_tiny.main([*given, "--stage", "base"]) == 0
        assert loop.load(work / "base.pt")["step"] == 1
        assert not (work / "distil.pt").exists()
        assert not (work / "crack-tiny").exists()
        assert set(precisions) == {dtype}
        assert len(compiled) == len(more[:1])
        precisions.clear()
    # One precision does not go on with the other's.
    assert crack_tiny.main(["--work", str(tmp_path / "told"), *command, "--stage", "base"]) == 1
    assert "was made with bf16 False, not True: use another working folder" in capsys.readouterr().err


SIZE = diffusion.Size
