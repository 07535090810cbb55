"""The trainer as processes: signals that end it, and several devices."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from farm.training import VARIABLE, LcmLora, StyleLora
from tests.training import told
from tests.training.conftest import FEW, Folders, hush, weights
from tests.training.forks import Forks
from workers.training import loop, run

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("trainers"), pytest.mark.timeout(300)]
TERM, INT, KILL = signal.SIGTERM, signal.SIGINT, signal.SIGKILL


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks() as found:
        yield found


def test_signals_end_it_with_its_work_kept(forks: Forks, bases: Folders, pictures: Path, tmp_path: Path) -> None:
    def options(out: str) -> StyleLora:
        return StyleLora(
            checkpoint=bases["sd"], data=str(pictures), out=tmp_path / out, steps=5, rate=1e-2, save_every=2, **FEW
        )

    made, said = tmp_path / "stopped", tmp_path / "said"
    for signals, code, kept, words in (
        # Asked to stop it finishes the step it is in.
        ({1: [TERM]}, 130, 1, "stopped at step 1 of 5; the same command goes on\n"),
        ({3: [KILL]}, -KILL, 2, "loss"),
        ({1: [INT]}, 130, 3, "stopped at step 3 of 5; the same command goes on\n"),
        # Asked twice it does not.
        ({1: [INT, INT]}, 130, 3, "training stopped at once; it goes on from its last checkpoint\n"),
    ):
        said.unlink(missing_ok=True)
        assert forks.train(options("stopped"), said, signals=signals) == [code]
        assert words in said.read_text()
        assert loop.load(made / "checkpoint.pt")["step"] == kept
        assert not (made / "lora.safetensors").exists()
    assert forks.train(options("stopped"), said) == [0]
    assert f"wrote {made / 'lora.safetensors'}\n" in said.read_text()
    run.train(options("straight"), say=hush)
    straight, resumed = weights(tmp_path / "straight"), weights(made)
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())


def test_a_whole_group_that_is_told_to_end_keeps_its_work(
    forks: Forks, bases: Folders, pictures: Path, tmp_path: Path
) -> None:
    """As systemd and Slurm do it: processes that read pictures hear of it too."""
    options = StyleLora(
        checkpoint=bases["sd"], data=str(pictures), out=tmp_path / "made", steps=4, save_every=4, loaders=2, **FEW
    )
    said = tmp_path / "said"
    assert forks.train(options, said, signals={2: [TERM]}, group=True) == [130], said.read_text()
    assert said.read_text().endswith("stopped at step 2 of 4; the same command goes on\n")
    assert "Traceback" not in said.read_text()
    assert loop.load(options.out / "checkpoint.pt")["step"] == 2
    # Who reads ahead, and in how many processes, decides nothing.
    assert forks.train(options.model_copy(update={"loaders": 0}), said) == [0], said.read_text()
    run.train(options.model_copy(update={"loaders": 0, "out": tmp_path / "straight"}), say=hush)
    straight, resumed = weights(tmp_path / "straight"), weights(options.out)
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())


@pytest.fixture
def ranks(forks: Forks, tmp_path: Path) -> list[dict[str, str]]:
    """What the launcher tells each of two processes."""
    for ends, code in (("3", 3), (told.STOPPED, 130), ("0", 0)):
        assert forks.launch(tmp_path / "launched", **{told.FOLDER: str(tmp_path), told.ENDS: ends}) == code
    return [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)]


def meeting(ranks: list[dict[str, str]]) -> list[dict[str, str]]:
    """The same with a place to meet of their own: the launcher's went with it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    own = [{name: value for name, value in each.items() if not name.startswith("TORCHELASTIC")} for each in ranks]
    return [{**each, "MASTER_PORT": port} for each in own]


def test_two_devices_learn_what_one_does_in_two_passes(
    forks: Forks, bases: Folders, tmp_path: Path, ranks: list[dict[str, str]]
) -> None:
    """Processes on the CPU, as they are on GPUs: equal random numbers, equal pictures, gradients averaged."""
    given: dict[str, Any] = {**FEW, "checkpoint": bases["sd"], "data": "painter:3", "steps": 2, "rate": 0.01}
    options, said = LcmLora(**given, devices=2, out=tmp_path / "two"), tmp_path / "said"
    # One hears of it, and twice: from the terminal and from the launcher. All stop, after the same step.
    assert forks.train(options, said, *meeting(ranks), signals={1: [INT, INT]}) == [0, 130], said.read_text()
    assert loop.load(tmp_path / "two/checkpoint.pt")["step"] == 1
    assert forks.train(options, said, *meeting(ranks)) == [0, 0], said.read_text()
    assert said.read_text().count("step 2/2") == 1, "one process speaks"
    straight = LcmLora(**given, devices=2, out=tmp_path / "straight")
    assert forks.train(straight, said, *meeting(ranks)) == [0, 0], said.read_text()
    run.train(LcmLora(**given, accumulate=2, out=tmp_path / "one"), say=hush)
    two, one = weights(tmp_path / "two"), weights(tmp_path / "one")
    unstopped = weights(straight.out)
    assert all(torch.equal(value, unstopped[name]) for name, value in two.items()), "gone on with, as if never stopped"
    assert max(float(value.abs().max()) for name, value in one.items() if "lora_B" in name) > 0.005
    for name, value in one.items():
        assert torch.allclose(value, two[name], rtol=1e-4, atol=1e-6), name


def test_devices_that_are_not_at_one_refuse_to_go_on(
    forks: Forks, bases: Folders, tmp_path: Path, ranks: list[dict[str, str]]
) -> None:
    """As on two machines: each has its own disk, and only the first writes a checkpoint."""
    given: dict[str, Any] = {**FEW, "checkpoint": bases["sd"], "data": "painter:3", "steps": 4, "devices": 2}

    def trained(first: LcmLora, second: LcmLora) -> tuple[list[int], str]:
        said = tmp_path / "said"
        said.unlink(missing_ok=True)
        one, other = meeting(ranks)
        return forks.train(first, said, one, other | {VARIABLE: second.model_dump_json()}), said.read_text()

    here, there = LcmLora(**given, out=tmp_path / "here"), LcmLora(**given, out=tmp_path / "there")
    begun = here.model_copy(update={"steps": 1})
    codes, said = trained(begun, there.model_copy(update={"steps": 1}))
    assert codes == [0, 0], said
    assert not (there.out / "checkpoint.pt").exists()
    for second, words in (
        (there, "checkpoint.pt is at step 1 for device 0, at step 0 for device 1 (0: there is none): --out has to be"),
        (here.model_copy(update={"data": "painter:4"}), "data was "),
        (here.model_copy(update={"steps": 5}), "steps is 4 for device 0, 5 for device 1: all machines need the same"),
    ):
        codes, said = trained(here, second)
        assert codes == [1, 1], said
        assert said.count("training stopped: ") == 2, said
        assert said.count(words) == 2, said
    assert loop.load(here.out / "checkpoint.pt")["step"] == 1
