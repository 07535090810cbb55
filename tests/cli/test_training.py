"""`farm train`: options become the trainer's, wrong ones are named, and torch is left to the program it starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from farm.cli import train
from farm.training import VARIABLE, LcmLora, StyleLora, Training
from tests.cli.conftest import Run

NEEDED = ("--checkpoint", "base", "--data", "walls", "--out", "made")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, Any]]]:
    """What would have been started: command line and options."""
    found: list[tuple[list[str], dict[str, Any]]] = []

    def note(_: str, command: list[str], variables: dict[str, str]) -> None:
        found.append((command[2:], json.loads(variables[VARIABLE])))

    monkeypatch.setattr(os, "execve", note)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return found


@pytest.mark.parametrize(("name", "model"), [("lcm-lora", LcmLora), ("lora", StyleLora)])
def test_defaults_are_those_of_the_trainer(
    run: Run, started: list[tuple[list[str], dict[str, Any]]], name: str, model: type[Training]
) -> None:
    assert run("train", name, *NEEDED).exit_code == 0
    ((command, options),) = started
    assert command == ["-m", "workers.training.run"]
    assert model.model_validate(options) == model(checkpoint=Path("base"), data="walls", out=Path("made"))
    assert options["kind"] == name


def test_every_option_arrives(run: Run, started: list[tuple[list[str], dict[str, Any]]]) -> None:
    given = (
        "--target",
        "to_q",
        "--target",
        "conv1",
        "--format",
        "peft",
        "--cache",
        "--rate",
        "3e-5",
        "--size",
        "64x32",
    )
    assert run("train", "lcm-lora", *NEEDED, *given, "--guidance-low", "3", "--devices", "2").exit_code == 0
    ((command, options),) = started
    assert command == ["-m", "workers.training.launch", "2"]
    made = LcmLora.model_validate(options)
    assert (made.target, made.format, made.cache, made.rate) == (("to_q", "conv1"), ("peft",), True, 3e-5)
    assert (made.pixels, made.guidance_low) == ((64, 32), 3.0)


def test_a_process_of_a_launcher_launches_nothing(
    run: Run, started: list[tuple[list[str], dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert run("train", "lora", *NEEDED, "--devices", "2").exit_code == 0
    assert started[0][0] == ["-m", "workers.training.run"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--rank", "0"), "--rank"),
        (("--format", "pickle"), "--format"),
        (("--rate", "nan"), "--rate"),
        (("--size", "512*512"), "--size"),
        (("--cache", "--crop", "random"), "a cache holds one crop"),
        (("--sample-steps", "51"), "--sample-steps: Input should be less than or equal to 50"),
        (("--sample-every", "5"), "contact sheets need a prompt"),
        (("--guidance-low", "9", "--guidance-high", "3"), "guidance-low 9 is over guidance-high 3"),
        (("--loss", "l1"), "--loss"),
    ],
)
def test_wrong_options_are_named(
    run: Run, started: list[tuple[list[str], dict[str, Any]]], given: tuple[str, ...], said: str
) -> None:
    result = run("train", "lcm-lora", *NEEDED, *given)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.replace("│", " ").split())
    assert not started


def test_bytes_that_are_no_text_are_named(run: Run, started: list[tuple[list[str], dict[str, Any]]]) -> None:
    given = ["train", "lora", "--checkpoint", "a", "--data", "b", "--out", "c"]
    for option, value in (("--sample-prompt", "wall \udcff"), ("--checkpoint", "\udcff"), ("--out", "c\udcff")):
        done = run(*given, option, value)
        assert done.exit_code == 2
        assert option in done.stderr
        assert "bytes that are no UTF-8" in " ".join(done.stderr.replace("│", " ").split())
    assert not started


def test_without_torch_it_says_what_to_install(
    run: Run, started: list[tuple[list[str], dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "find_spec", lambda _: None)
    result = run("train", "lora", *NEEDED)
    assert result.exit_code == 2
    assert "lcm-farm[worker]" in result.stderr
    assert not started


@pytest.mark.timeout(300)
def test_the_whole_way_from_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    given = ("--checkpoint", str(tmp_path), "--data", "painter", "--out", str(tmp_path / "made"))
    done = subprocess.run(
        [sys.executable, "-m", "farm.cli", "train", "lora", *given],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("training stopped: ")
    assert "'FluxPipeline' is not one of ['StableDiffusionPipeline', 'StableDiffusionXLPipeline']" in done.stderr
    assert not (tmp_path / "made").exists()
