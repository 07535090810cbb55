"""What is not of the family of `crack-tiny` is refused by every trainer that goes on from one, before it works."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.training import test_style as style
from tests.training.conftest import Folders, hush
from workers.training import crack_tiny_control, crack_tiny_hone, crack_tiny_style, diffusion
from workers.training.errors import TrainingError
from workers.training.finished import check_finished, open_finished
from workers.training.pool import Pool

model = style.model
FOUND = {
    "sd": "in_channels is 4, not 8; .*sample_size is 8, not 16; .*addition_embed_type is None, not 'text'",
    "sdxl": "model_index.json: _class_name is 'StableDiffusionXLPipeline', not 'StableDiffusionPipeline'",
}
TRAINERS: dict[str, Callable[[Path, Path], object]] = {
    "to go on with": lambda folder, work: crack_tiny_hone.hone(
        folder, work, crack_tiny_hone.Settings(), work / "made.safetensors"
    ),
    "to learn a style on": lambda folder, work: crack_tiny_style.fit(
        folder, work, crack_tiny_style.Settings(), say=hush
    ),
    "to control": lambda folder, work: crack_tiny_control.fit(folder, work, crack_tiny_control.Settings(), say=hush),
}


@pytest.mark.parametrize("family", FOUND)
@pytest.mark.parametrize("purpose", TRAINERS)
def test_another_family_is_refused_before_anything_is_painted(
    bases: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, purpose: str
) -> None:
    def painted(*_: Any) -> Pool:
        raise AssertionError("walls were painted for nothing")

    monkeypatch.setattr("workers.training.pool.paint", painted)
    monkeypatch.setattr(crack_tiny_style, "paint_night", painted)
    # What honing looks for beside the model.
    folder = shutil.copytree(bases[family], tmp_path / family)
    (folder / crack_tiny_hone.LCM).touch()
    work = tmp_path / "work"
    with pytest.raises(TrainingError, match=rf"{family} is not a crack-tiny {purpose}: .*{FOUND[family]}"):
        TRAINERS[purpose](folder, work)
    assert not work.exists()


def put(name: str, **entries: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return change


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (put("unet/config.json", _class_name="UNet3DConditionModel"), "not 'UNet2DConditionModel'"),
        (put("unet/config.json", cross_attention_dim=768), "cross_attention_dim is 768, not the text encoder's 16"),
        (
            put("vae/config.json", _class_name="AutoencoderTiny"),
            "_class_name is 'AutoencoderTiny', not 'AutoencoderKL'",
        ),
        (put("vae/config.json", latent_channels=16), "latent_channels is 16, not 8"),
        (put("vae/config.json", block_out_channels=[8, 16]), r"block_out_channels is \[8, 16\], not 4 numbers"),
        (put("text_encoder/config.json", model_type="t5"), "model_type is 't5', not 'clip_text_model'"),
        (put("scheduler/scheduler_config.json", prediction_type="sample"), "'sample', not epsilon or v_prediction"),
        (lambda folder: (folder / "vae/config.json").unlink(), "vae/config.json: this file is missing"),
        (lambda folder: (folder / "unet/config.json").write_text("[]"), "a JSON object is expected"),
    ],
)
def test_what_does_not_go_together_is_named(
    model: Path, tmp_path: Path, spoil: Callable[[Path], object], said: str
) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    assert open_finished(folder, "to control").unet.config.in_channels == diffusion.Size().latent
    spoil(folder)
    with pytest.raises(TrainingError, match=rf"is not a crack-tiny to control: .*{said}"):
        check_finished(folder, "to control")


def test_the_shipped_model_is_one() -> None:
    check_finished(Path(__file__).parents[2] / "farm/assets/crack-tiny", "to go on with")
