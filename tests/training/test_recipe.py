"""The recipe of `crack-tiny` from its command to a folder that stock diffusers renders with, at toy size."""

import functools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from workers.training import (
    crack_tiny,
    crack_tiny_control,
    crack_tiny_hone,
    crack_tiny_settings,
    crack_tiny_style,
    diffusion,
    loop,
    questions,
)
from workers.training.errors import UNFINISHED, TrainingError
from workers.training.export import export_lora

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
    assert {value.dtype for value in made.values()} == {torch.float16}, "on disk"
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float32}, "as stock diffusers loads it"
    pipe.load_lora_weights(out, weight_name="lcm-lora.safetensors")
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    picture = pipe("a crack", num_inference_steps=2, guidance_scale=1.0, height=64, width=64).images[0]
    assert picture.size == (64, 64)

    honed(out, tmp_path / "hone", capsys)

    # Once more: every stage is found finished.
    with monkeypatch.context() as patch:
        patch.setattr(loop, "seed_step", lambda *_: pytest.fail("there was nothing left to do"))
        assert crack_tiny.main(command) == 0
    again = weights(out)
    assert again.keys() == made.keys()
    assert all(torch.equal(value, again[name]) for name, value in made.items())

    # Another seed has data of its own, and does not go on with weights of this one; nor does another rate.
    assert crack_tiny.main([*command, "--seed", "2"]) == 1
    assert "was made with seed 5, not 6: use another working folder" in capsys.readouterr().err
    assert crack_tiny.main([*command, "--sharpen-rate", "0.5"]) == 1
    assert "sharpen.pt was made with sharpen_rate 0.0003, not 0.5: use another" in capsys.readouterr().err
    # What comes after a stage that went on is not taken for its product.
    assert crack_tiny.main([*command, "--base-steps", "2"]) == 1
    assert loop.load(work / "base.pt")["step"] == 2
    said = "distil.pt was made with base_steps 1, not 2: use another working folder, or delete this file to learn"
    assert said in capsys.readouterr().err
    assert crack_tiny.main(command) == 1
    assert "base.pt has gone 2 steps, more than 1: use another working folder" in capsys.readouterr().err


def honed(model: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was made is gone on with, from its folder alone."""
    before = weights(model)
    steps = [word for stage in ("words", "reader", "sharpen") for word in (f"--{stage}-steps", "1")]
    command = ["--model", str(model), "--work", str(work), "--pool", "24", *steps, "--direction", "2.5"]
    command += ["--crossed", "4", "--bent", "2", "--walks", "2", "1", "--deep", "2"]

    # Its adapter is taken as it is: written again, it is the same file but for what rounding to half did.
    unet = UNet2DConditionModel.from_pretrained(model / "unet", torch_dtype=torch.float32)
    crack_tiny_hone.adapt(unet, model / "lcm-lora.safetensors")
    export_lora(work / "again.safetensors", unet, {})
    was, again = load_file(model / "lcm-lora.safetensors"), load_file(work / "again.safetensors")
    assert was.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in was.items())

    assert crack_tiny_hone.main([*command, "--minutes", "0"]) == UNFINISHED
    assert "answers: 0 of 1 steps are done" in capsys.readouterr().err
    assert crack_tiny_hone.main(command) == 0
    made = load_file(work / "lcm-lora.safetensors")
    assert made.keys() == was.keys()
    ups = [name for name in made if name.endswith("lora_up.weight")]
    assert any(not torch.equal(made[name], was[name]) for name in ups)
    told = json.loads((work / "hone-settings.json").read_text("utf-8"))
    assert (told["direction"], told["crossed"], told["walks"]) == (2.5, 4, [2, 1])
    pipe = StableDiffusionPipeline.from_pretrained(model)
    pipe.load_lora_weights(work, weight_name="lcm-lora.safetensors")
    # What it was not made with is not written beside it.
    for name, was_made in (
        ("wet", "wet 3.0, not 9.0"),
        ("crossed", "crossed 4, not 9"),
        ("reader-steps", "reader_steps 1, not 9"),
    ):
        assert crack_tiny_hone.main([*command, f"--{name}", "9"]) == 1
        assert f"was made with {was_made}: use another working folder" in capsys.readouterr().err
    # Nor does a reader go on from other walls than it began with, be they as many.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crack_tiny_hone, "bent", questions.crossed)
        assert crack_tiny_hone.main(command) == 1
    assert re.search(r"reader\.pt was made with walls to learn \w{12}, not \w{12}: use", capsys.readouterr().err)
    assert json.loads((work / "hone-settings.json").read_text("utf-8")) == told
    first, second = (next(work.glob(f"hone-*/{name}.pt")) for name in ("reader", "reader-2"))
    assert (loop.load(first)["seed"], loop.load(second)["seed"]) == (7, 107), "two readers, not one twice"
    # The model itself is as it was.
    after = weights(model)
    assert all(torch.equal(value, after[name]) for name, value in before.items())

    half = {name: value for name, value in was.items() if "down_blocks" not in name}
    save_file(half, work / "half.safetensors")
    with pytest.raises(TrainingError, match="an adapter of this model has"):
        crack_tiny_hone.adapt(
            UNet2DConditionModel.from_pretrained(model / "unet", torch_dtype=torch.float32), work / "half.safetensors"
        )
    assert crack_tiny_hone.main(["--model", str(work), "--work", str(work)]) == 1
    assert "is not a crack-tiny to go on with: it has no model_index.json" in capsys.readouterr().err
    (model / "lcm-lora.safetensors").rename(model / "elsewhere.safetensors")
    assert crack_tiny_hone.main(command) == 1
    assert "is not a crack-tiny to go on with: it has no lcm-lora.safetensors" in capsys.readouterr().err
    (model / "elsewhere.safetensors").rename(model / "lcm-lora.safetensors")


@pytest.mark.parametrize("program", [crack_tiny, crack_tiny_hone, crack_tiny_style, crack_tiny_control])
def test_numbers_that_cannot_be_are_refused_before_work_begins(
    program: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = WRONG["every trainer"] | WRONG[program.__name__.rpartition(".")[2]]
    where = ["--work", str(tmp_path / "work")] + ([] if program is crack_tiny else ["--model", str(tmp_path)])
    for told, said in wrong.items():
        assert program.main([*where, *told.split()]) == 1, told
        error = capsys.readouterr().err
        assert error.startswith("training stopped: ")
        assert error.endswith(f"{said}\n"), told
        assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


WRONG = {
    "every trainer": {"--threads 0": "--threads 0: should be greater than or equal to 1"},
    "crack_tiny": {
        "--base-batch 0": "--base-batch 0: should be greater than or equal to 1",
        "--base-steps -1": "--base-steps -1: should be greater than or equal to 1",
        "--base-rate nan --seed -1": "--seed -1: should be greater than or equal to 0; --base-rate nan: "
        "should be a finite number",
        "--distil-rank 0": "--distil-rank 0: should be greater than or equal to 1",
        "--distil-skip 50": "--distil-skip 50: should be less than or equal to 49",
        "--distil-low 5 --distil-high 1": "--distil-low 5 is over --distil-high 1",
        "--decoder-share 7": "--decoder-share 7.0: should be less than or equal to 1",
        "--pool 0": "--pool 0: should be greater than or equal to 1",
    },
    "crack_tiny_hone": {
        "--walks 0": "--walks 0: should be greater than or equal to 1",
        "--walks 4 51": "--walks 51: should be less than or equal to 50",
        "--wet 0": "--wet 0.0: should be greater than 0",
        "--whole nan": "--whole nan: should be a finite number",
        "--crossed 0": "--crossed 0: should be greater than or equal to 1",
        "--bent 0": "--bent 0: should be greater than or equal to 1",
        "--readers 0": "--readers 0: should be greater than or equal to 1",
        "--reader-steps 0": "--reader-steps 0: should be greater than or equal to 1",
        "--deep 0": "--deep 0: should be greater than or equal to 1",
        "--remembered 0": "--remembered 0: should be greater than or equal to 2",
        "--direction -3": "--direction -3.0: should be greater than or equal to 0",
        "--sharpen-weight 0": "--sharpen-weight 0.0: should be greater than 0",
    },
    "crack_tiny_style": {
        "--steps 0": "--steps 0: should be greater than or equal to 1",
        "--pictures 0": "--pictures 0: should be greater than or equal to 1",
        "--rate nan": "--rate nan: should be a finite number",
    },
    "crack_tiny_control": {
        "--steps 0": "--steps 0: should be greater than or equal to 1",
        "--batch 0": "--batch 0: should be greater than or equal to 1",
        "--rate inf": "--rate inf: should be a finite number",
    },
}


def test_wet_walls_and_whole_ones_are_asked_for_more_often(tmp_path: Path) -> None:
    asked = crack_tiny_hone.Settings(wet=3.0, whole=2.0)
    recipe = crack_tiny_hone.Honing(tmp_path, replace(crack_tiny_settings.Settings(), pool=60), honing=asked)
    scenes, odds = recipe.pool().scenes, recipe.odds()
    assert odds.sum() == pytest.approx(1.0)
    for water, cracked, often in ((True, True, 3.0), (False, False, 2.0), (True, False, 6.0), (False, True, 1.0)):
        alike = odds[[scene.water is water and scene.cracked is cracked for scene in scenes]]
        assert len(alike) > 0
        assert alike == pytest.approx(often * odds.min())
