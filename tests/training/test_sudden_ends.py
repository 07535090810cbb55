"""What stops a trainer from outside ends in one sentence that says what is kept and what may help, in no traceback."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from farm.training import VARIABLE, LcmLora, StyleLora
from tests.training.conftest import FEW, Folders
from workers.training import data, loop, objectives, run
from workers.training.errors import TrainingError, exit_status

pytestmark = pytest.mark.usefixtures("one_thread")
ENDLESS = "/proc/self/mem"
"""A file that is there and gives an I/O error whoever reads it."""
NO_ROOM = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB.\nAnd so on."


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Callable[[StyleLora], int]:
    """The trainer's program in this process, whose signals stay as they are."""
    named = SimpleNamespace(SIGTERM=signal.SIGTERM, SIGINT=signal.SIGINT, signal=lambda *_: None)
    monkeypatch.setattr(run, "signal", named)

    def started(options: StyleLora) -> int:
        monkeypatch.setenv(VARIABLE, options.model_dump_json())
        return run.main()

    return started


def disturbed(monkeypatch: pytest.MonkeyPatch, disturb: Callable[[], None]) -> None:
    """In the third pass something happens."""
    real, passes = objectives.denoising, iter(range(1, 100))

    def made(*given: Any) -> Callable[..., Any]:
        loss = real(*given)

        def counted(*batch: Any) -> Any:
            if next(passes) == 3:
                disturb()
            return loss(*batch)

        return counted

    monkeypatch.setattr(objectives, "denoising", made)


def no_room() -> None:
    raise torch.OutOfMemoryError(NO_ROOM)


def dead_reader() -> None:
    for each in multiprocessing.active_children():
        assert each.pid is not None
        os.kill(each.pid, signal.SIGKILL)
    # torch hears of it in the handler of a signal: here, and not while a checkpoint is written.
    time.sleep(20)


NO_MEMORY = (
    "training stopped: no memory is left (CUDA out of memory. Tried to allocate 2.00 GiB): less is needed with "
    "--batch 1 --accumulate 2, --gradient-checkpointing, --cache, a smaller --size; each begins anew in another --out. "
)
NO_READER = "training stopped: a process that reads pictures died (DataLoader worker (pid"


@pytest.mark.parametrize(
    ("disturb", "loaders", "said"), [(no_room, 0, NO_MEMORY), (dead_reader, 1, NO_READER)], ids=["memory", "reader"]
)
def test_it_says_why_and_what_is_kept(
    program: Callable[[StyleLora], int],
    bases: Folders,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    disturb: Callable[[], None],
    loaders: int,
    said: str,
) -> None:
    disturbed(monkeypatch, disturb)
    given = {**FEW, "steps": 50, "save_every": 1, "out": tmp_path, "loaders": loaders}
    assert program(StyleLora(checkpoint=bases["sd"], data=str(pictures), **given)) == 1
    error = capsys.readouterr().err
    checkpoint = tmp_path / "checkpoint.pt"
    assert error.startswith(said)
    assert error.endswith(f". Last checkpoint: {checkpoint}; the same command goes on from it\n")
    assert error.count("\n") == 1
    assert loop.load(checkpoint)["step"] >= 2


def test_only_what_is_not_chosen_yet_is_advised(tmp_path: Path) -> None:
    def advised(**more: Any) -> str:
        options = StyleLora(checkpoint=tmp_path, data="painter", out=tmp_path, **more)
        return str(run._said(torch.OutOfMemoryError(NO_ROOM), options)).partition("less is needed with ")[2]

    assert advised(batch=1, gradient_checkpointing=True, cache=True).startswith("a smaller --size; ")
    assert advised(batch=5, accumulate=3, crop="random").startswith("--batch 2 --accumulate 6, --gradient-checkp")
    assert "--cache" not in advised(crop="random") + advised(train_text=True)
    assert "--cache" in advised()
    assert "Last checkpoint" not in advised()


def test_a_workspace_without_room_is_memory_too(tmp_path: Path) -> None:
    error = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    said = str(run._said(error, StyleLora(checkpoint=tmp_path, data="painter", out=tmp_path)))
    assert said.startswith(f"no memory is left ({error}): less is needed with --batch 2")


def test_a_fault_of_the_program_keeps_its_traceback(
    program: Callable[[StyleLora], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("size mismatch")

    monkeypatch.setattr(run, "train", broken)
    with pytest.raises(RuntimeError, match="size mismatch"):
        program(StyleLora(checkpoint=tmp_path, data="painter", out=tmp_path))


def test_bad_options_and_places_end_in_a_sentence(
    program: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", "somewhere")

    monkeypatch.setattr(run, "train", forbidden)
    assert program(LcmLora(checkpoint=tmp_path, data="painter", out=tmp_path)) == 1
    assert capsys.readouterr().err == "training stopped: somewhere: Permission denied\n"
    monkeypatch.setenv(VARIABLE, "{}")
    assert run.main() == 1
    assert capsys.readouterr().err.startswith("training stopped: ")


def full_weights(folder: Path) -> str:
    (folder / "w.safetensors").mkdir()
    save_file({"a": torch.zeros(2)}, folder / "w.safetensors")
    return "written"


def full_memory(_: Path) -> str:
    raise MemoryError


def full_host(_: Path) -> str:
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried")


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (full_weights, "training stopped: cannot read or write weights: "),
        (full_memory, "training stopped: no memory is left (MemoryError)"),
        (full_host, "training stopped: no memory is left ([enforce fail at alloc_cpu.cpp:121] . Def"),
    ],
)
def test_programs_of_crack_tiny_do_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], work: Callable[[Path], str], said: str
) -> None:
    assert exit_status(lambda: work(tmp_path)) == 1
    error = capsys.readouterr().err
    assert error.startswith(said)
    assert error.count("\n") == 1


def test_faults_of_those_programs_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        exit_status(lambda: str(1 // 0))


@pytest.mark.parametrize("name", ["a.txt", "metadata.jsonl", "metadata.csv", "x.tar"])
def test_data_that_the_disk_does_not_give_are_named(tmp_path: Path, pictures: Path, name: str) -> None:
    (tmp_path / "a.png").write_bytes((pictures / "0.png").read_bytes())
    (tmp_path / name).symlink_to(ENDLESS)
    with pytest.raises(TrainingError, match=rf"{name} cannot be read: Input/output error$"):
        data.open_source(str(tmp_path), "text", (32, 32), 0)
