"""The recipe of `crack-tiny` from its command to a folder that stock diffusers renders with, at toy size."""

import functools
from pathlib import Path

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file

from workers.training import crack_tiny, diffusion, loop
from workers.training.errors import UNFINISHED

TOY = functools.partial(diffusion.Size, channels=(16, 16, 32), heads=2, text_width=16, text_layers=1)
STAGES = ("autoencoder", "refine", "words", "base", "distil", "decoder", "reader", "sharpen")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a model folder, by file and name."""
    files = folder.rglob("*.safetensors")
    return {f"{path.relative_to(folder)} {name}": value for path in files for name, value in load_file(path).items()}


@pytest.mark.usefixtures("one_thread")
def test_every_stage_runs_stops_by_the_clock_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(diffusion, "Size", TOY)
    monkeypatch.setattr(crack_tiny, "CAPTIONS", 300)
    work, out = tmp_path / "work", tmp_path / "model"
    steps = [word for stage in STAGES for word in (f"--{stage}-steps", "1")]
    command = [
        "--work",
        str(work),
        "--out",
        str(out),
        "--pool",
        "8",
        "--base-batch",
        "2",
        "--distil-batch",
        "2",
        *steps,
    ]

    # A stage that is not finished is not built upon: nothing comes after it.
    assert crack_tiny.main([*command, "--minutes", "0"]) == UNFINISHED
    assert "0 of 1 steps are done; the same command goes on" in capsys.readouterr().err
    assert not list(work.glob("latents-*"))
    assert not out.exists()

    assert crack_tiny.main(command) == 0
    made = weights(out)
    pipe = StableDiffusionPipeline.from_pretrained(out)
    pipe.load_lora_weights(out, weight_name="lcm-lora.safetensors")
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    picture = pipe("a crack", num_inference_steps=2, guidance_scale=1.0, height=64, width=64).images[0]
    assert picture.size == (64, 64)

    # Once more: every stage is found finished.
    monkeypatch.setattr(loop, "seed_step", lambda *_: pytest.fail("there was nothing left to do"))
    assert crack_tiny.main(command) == 0
    again = weights(out)
    assert again.keys() == made.keys()
    assert all(torch.equal(value, again[name]) for name, value in made.items())

    # Another seed has data of its own, and does not go on with weights of this one.
    assert crack_tiny.main([*command, "--seed", "2"]) == 1
    assert "was made with seed 5, not 6: use another working folder" in capsys.readouterr().err
