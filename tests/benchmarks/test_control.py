"""The measure of alignment is right where the answer is known, and the benchmark runs on an untrained ControlNet."""

import argparse
from pathlib import Path

import numpy as np
import orjson
import pytest
from diffusers import UNet2DConditionModel

from benchmarks import control
from benchmarks.analyser import read_crack
from benchmarks.geometry import CRACK_TINY
from farm.painter import Scene, paint, sample_scene
from workers.training.crack_tiny_control import controlnet_for


def line(row: int, side: int = 32) -> control.Mask:
    mask = np.zeros((side, side), bool)
    mask[row] = True
    return mask


def test_a_shift_within_the_tolerance_is_none() -> None:
    assert control.alignment([line(10)], [line(10)], 0) == {"precision": 1.0, "recall": 1.0, "f1": 1.0, "seen": 1.0}
    assert control.alignment([line(13)], [line(10)], 3)["f1"] == 1.0
    assert control.alignment([line(14)], [line(10)], 3)["precision"] == 0.0
    both = line(10) | line(20)
    assert control.alignment([both], [line(10)], 2) == {"precision": 0.5, "recall": 1.0, "f1": 0.6667, "seen": 1.0}
    assert control.alignment([line(10)], [both], 2) == {"precision": 1.0, "recall": 0.5, "f1": 0.6667, "seen": 1.0}
    nothing = np.zeros((32, 32), bool)
    assert control.alignment([nothing], [line(10)], 2) == {"precision": None, "recall": 0.0, "f1": None, "seen": 0.0}


def test_the_analyser_finds_painted_cracks_where_they_are() -> None:
    rng = np.random.default_rng(5)
    scenes: list[Scene] = [scene for scene in (sample_scene(rng) for _ in range(40)) if scene.cracked]
    painted = [paint(scene, 128, 128, number) for number, scene in enumerate(scenes)]
    found = control.alignment([read_crack(one.picture) for one in painted], [one.mask for one in painted], 3)
    assert (found["f1"] or 0) > 0.8
    turned = control.alignment([read_crack(one.picture) for one in painted], [one.mask[::-1] for one in painted], 3)
    assert (turned["f1"] or 0) < (found["f1"] or 0) / 2, "elsewhere it finds little"


def test_it_runs_on_the_shipped_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = controlnet_for(UNet2DConditionModel.from_pretrained(CRACK_TINY / "unet"), 3)
    net.save_pretrained(tmp_path / "net", safe_serialization=True)
    out = tmp_path / "figures.json"
    given = ["--model", str(CRACK_TINY), "--control", str(tmp_path / "net"), "--count", "2", "--out", str(out)]
    assert control.main(given) == 0
    told = orjson.loads(out.read_bytes())
    assert told["pictures"] == 2
    # Untrained, it changes nothing: what it follows is what it would have drawn anyway.
    assert told["alignment"]["with control"] == told["alignment"]["without"]
    assert "precision" in capsys.readouterr().out


def test_the_shipped_one_makes_cracks_run_where_masks_have_them() -> None:
    """One micro-batch of four; the model card has the figures of 64."""
    options = argparse.Namespace(
        model=CRACK_TINY, control=CRACK_TINY / "control-mask", count=4, steps=4, weight=1.0, tolerance=3
    )
    found = control.run(options)["alignment"]
    assert found["with control"]["seen"] == 1.0
    assert found["with control"]["f1"] > 0.85
    assert (found["without"]["f1"] or 0.0) < 0.6


def test_without_options_it_measures_what_is_shipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[argparse.Namespace] = []

    def run(options: argparse.Namespace) -> dict[str, object]:
        asked.append(options)
        return {"pictures": options.count, "alignment": {}}

    monkeypatch.setattr(control, "run", run)
    assert control.main(["--count", "64"]) == 0
    assert (asked[0].model.resolve(), asked[0].control.resolve()) == (
        CRACK_TINY.resolve(),
        (CRACK_TINY / "control-mask").resolve(),
    )
    assert control.main(["--model", str(tmp_path)]) == 0
    assert asked[1].control == tmp_path / "control-mask"
