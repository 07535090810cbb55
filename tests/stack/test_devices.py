"""One worker a device: which devices are found, and what their workers are called."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from farm.stack import devices as found
from farm.stack.datadir import stop_rank
from farm.stack.devices import devices
from farm.stack.stack import Stack


class Machine:
    """Device files in a folder, and what torch answers when it is asked."""

    def __init__(self, folder: Path) -> None:
        self.dev = folder
        self.torch: str | Exception = ""
        self.asked = 0

    def path(self, name: str) -> Path:
        assert name == "/dev"
        return self.dev

    def run(self, command: list[str], **_options: Any) -> Any:
        assert (command[0], "cuda.device_count" in command[-1]) == (sys.executable, True)
        self.asked += 1
        if isinstance(self.torch, Exception):
            raise self.torch
        return subprocess.CompletedProcess(command, 0, self.torch)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(tmp_path)
    monkeypatch.delenv("FARM_DEVICE", raising=False)
    monkeypatch.setattr(found, "Path", made.path)
    monkeypatch.setattr("farm.stack.devices.subprocess.run", made.run)
    return made


def test_without_device_files_torch_is_not_asked(machine: Machine) -> None:
    for name in ("nvidiactl", "nvidia-uvm", "null"):
        (machine.dev / name).touch()
    assert devices() == ["auto"]
    assert machine.asked == 0


def test_every_gpu_that_torch_can_use_is_one(machine: Machine) -> None:
    for number in range(3):
        (machine.dev / f"nvidia{number}").touch()
    machine.torch = "2\n"
    assert devices() == ["cuda:0", "cuda:1"], "a file is not yet a device"


@pytest.mark.parametrize(
    "answer",
    ["0\n", "", "no number", OSError(), subprocess.TimeoutExpired("python", 60), subprocess.CalledProcessError(1, "")],
    ids=repr,
)
def test_the_worker_decides_where_torch_does_not_say(machine: Machine, answer: str | Exception) -> None:
    (machine.dev / "nvidia0").touch()
    machine.torch = answer
    assert devices() == ["auto"]


def test_what_is_set_by_hand_counts(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine.dev / "nvidia0").touch()
    monkeypatch.setenv("FARM_DEVICE", "cuda:1")
    assert devices() == ["cuda:1"]
    assert machine.asked == 0


@pytest.mark.parametrize(
    ("names", "workers"),
    [(["auto"], {"worker": "auto"}), (["cuda:0", "cuda:1"], {"worker-0": "cuda:0", "worker-1": "cuda:1"})],
)
def test_workers_are_numbered_where_there_are_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], workers: dict[str, str]
) -> None:
    class EnoughError(Exception):
        """Nothing else is to start."""

    launched: dict[str, str] = {}

    def enough(*_: Any) -> None:
        raise EnoughError

    stack = Stack(tmp_path, 0)
    stack.directory.create()
    monkeypatch.setattr("farm.stack.stack.devices", lambda: names)
    monkeypatch.setattr("farm.stack.stack.Database", lambda *_, **__: None)
    monkeypatch.setattr(stack, "_settings", object())
    monkeypatch.setattr(stack, "_launch_worker", lambda name, device, _database: launched.update({name: device}))
    monkeypatch.setattr(stack, "_launch", enough)
    with pytest.raises(EnoughError):
        stack._start_processes()
    assert launched == workers
    assert {stop_rank(name) for name in launched} == {stop_rank("worker")}, "stopped where a worker is"
