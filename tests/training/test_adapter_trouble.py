"""What stops the trainers of adapters, what they say, and what they leave whole."""

from __future__ import annotations

import errno
import itertools
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from farm.training import LcmLora, StyleLora
from tests.training.conftest import FEW, Folders, hush, weights
from workers.training import accelerated, loop, objectives, run
from workers.training.errors import TrainingError
from workers.training.formats import export

pytestmark = pytest.mark.usefixtures("one_thread")


@contextmanager
def small_disk(room: int) -> Iterator[None]:
    """No file may grow beyond `room` bytes: what a full disk does, without filling one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def poisoned(real: Callable[..., Any], spoil: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    """A maker of losses the third of which is spoilt."""

    def made(*given: Any) -> Callable[..., Any]:
        loss, passes = real(*given), itertools.count(1)

        def spoilt(*batch: Any) -> Any:
            value = loss(*batch)
            return spoil(value) if next(passes) == 3 else value

        return spoilt

    return made


def test_nan_ends_the_run_and_keeps_the_weights_before_it(
    bases: Folders, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def options(steps: int, out: str) -> StyleLora:
        given = {**FEW, "steps": steps, "rate": 1e-2, "save_every": 1, "out": tmp_path / out}
        return StyleLora(checkpoint=bases["sd"], data=str(pictures), **given)

    run.train(options(2, "good"), say=hush)
    good = weights(tmp_path / "good")
    assert any(value.abs().max() > 0 for name, value in good.items() if "lora_B" in name)
    spoilt: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "loss": lambda value: value * float("nan"),
        # Zero, but of a slope that is not finite.
        "gradient": lambda value: (value - value.detach()).sqrt(),
    }
    real = objectives.denoising
    for what, spoil in spoilt.items():
        monkeypatch.setattr(objectives, "denoising", poisoned(real, spoil))
        with pytest.raises(TrainingError, match=rf"{what} is nan at step 2.*{what}/checkpoint\.pt"):
            run.train(options(5, what), say=hush)
        kept = weights(tmp_path / what)
        assert all(value.isfinite().all() and torch.equal(value, good[name]) for name, value in kept.items())
        assert loop.load(tmp_path / what / "checkpoint.pt")["step"] == 2


def test_a_full_disk_keeps_the_last_good_checkpoint(bases: Folders, pictures: Path, tmp_path: Path) -> None:
    def options(steps: int) -> StyleLora:
        return StyleLora(checkpoint=bases["sd"], data=str(pictures), out=tmp_path, steps=steps, save_every=2, **FEW)

    run.train(options(2), say=hush)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.part").symlink_to("/dev/full")
    with pytest.raises(TrainingError, match=r"cannot write checkpoint .*checkpoint\.pt"):
        run.train(options(4), say=hush)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert len(run.train(options(4), say=hush)) == 1, "with room again it goes on"


def test_a_full_disk_keeps_the_last_adapter_and_starts_no_cache(
    bases: Folders, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def options(**more: Any) -> StyleLora:
        given = {**FEW, "rank": 256, "steps": 1, "out": tmp_path, **more}
        return StyleLora(checkpoint=bases["sd"], data=str(pictures), **given)

    (path,) = run.train(options(), say=hush)
    before, real = path.read_bytes(), export

    def little_room(*given: Any, **more: Any) -> Any:
        with small_disk(200_000):
            return real(*given, **more)

    monkeypatch.setattr(run, "export", little_room)
    for form in ("kohya", "diffusers", "peft"):
        with pytest.raises(TrainingError, match="cannot write the adapter"):
            run.train(options(format=(form,)), say=hush)
    assert path.read_bytes() == before

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(TrainingError, match=r"cannot take \d+ bytes for the cache .*: No space left"):
        run.train(options(cache=True, out=tmp_path / "new"), say=hush)


@pytest.mark.parametrize("form", ["kohya", "diffusers", "peft"])
def test_an_adapter_that_cannot_be_put_in_place_leaves_the_one_before(
    bases: Folders, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Any
) -> None:
    def options(steps: int) -> StyleLora:
        given = {**FEW, "rate": 1e-2, "steps": steps, "out": tmp_path, "format": (form,)}
        return StyleLora(checkpoint=bases["sd"], data=str(pictures), **given)

    def held(path: Path) -> dict[str, bytes]:
        files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
        return {str(each.relative_to(path)): each.read_bytes() for each in files}

    (made,) = run.train(options(1), say=hush)
    before = held(made)
    with monkeypatch.context() as patch:
        for name in ("rename", "replace"):
            real = getattr(os, name)

            def moved(source: Any, target: Any, real: Callable[..., None] = real) -> None:
                if Path(target) == made and str(source).endswith(".part"):
                    raise OSError(errno.EIO, "Input/output error")
                real(source, target)

            patch.setattr(os, name, moved)
        with pytest.raises(TrainingError, match=r"cannot write the adapter .*Input/output error"):
            run.train(options(2), say=hush)
    assert held(made) == before
    assert run.train(options(2), say=hush) == [made]
    assert held(made).keys() == before.keys()
    assert held(made) != before
    assert not [*tmp_path.glob("*.part"), *tmp_path.glob("*.old")]


def test_other_options_are_told_apart_from_a_resumption(bases: Folders, pictures: Path, tmp_path: Path) -> None:
    given = {**FEW, "checkpoint": bases["sd"], "data": str(pictures), "out": tmp_path, "steps": 1}
    run.train(StyleLora(**given), say=hush)
    with pytest.raises(TrainingError, match=r"rank was 2, is 3; .* another --out"):
        run.train(StyleLora(**{**given, "rank": 3, "seed": 9}), say=hush)
    with pytest.raises(TrainingError, match="data was '"):
        run.train(StyleLora(**{**given, "data": "painter:4"}), say=hush)
    (tmp_path / "checkpoint.pt").write_bytes(b"half a checkpoint")
    with pytest.raises(TrainingError, match="cannot read checkpoint"):
        run.train(StyleLora(**given), say=hush)


def test_what_auto_stood_for_is_kept(bases: Folders, pictures: Path, tmp_path: Path) -> None:
    """On another device it stands for something else, and would go on unnoticed."""
    given = {**FEW, "checkpoint": bases["sd"], "data": str(pictures)}
    run.train(StyleLora(**given, out=tmp_path / "bf16", steps=1, precision="bf16"), say=hush)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(TrainingError, match=r"precision was 'bf16', is 'no' \(auto is that of this device\)\. Give"):
        run.train(StyleLora(**given, out=tmp_path / "bf16", steps=2, precision="auto"), say=hush)
    run.train(StyleLora(**given, out=tmp_path / "auto", steps=1), say=hush)
    assert run.train(StyleLora(**given, out=tmp_path / "auto", steps=2, precision="no"), say=hush)


def test_pictures_or_noise_that_changed_are_told_apart_from_a_resumption(
    bases: Folders, pictures: Path, tmp_path: Path
) -> None:
    base, walls = (shutil.copytree(each, tmp_path / each.name) for each in (bases["sd"], pictures))

    def options(steps: int) -> StyleLora:
        return StyleLora(checkpoint=base, data=str(walls), out=tmp_path / "out", steps=steps, **FEW)

    run.train(options(1), say=hush)
    # What says nothing of the weights may change, and so may times.
    (base / "profile.json").write_text("{}")
    os.utime(walls / "0.png", (0, 0))
    assert run.train(options(2), say=hush)
    before = (walls / "0.png").read_bytes()
    Image.new("RGB", (24, 20)).save(walls / "0.png")
    with pytest.raises(TrainingError, match=r"other options: data was '[^;]*$"):
        run.train(options(3), say=hush)
    (walls / "0.png").write_bytes(before)
    noise = base / "scheduler/scheduler_config.json"
    noise.write_text(json.dumps(json.loads(noise.read_text()) | {"prediction_type": "v_prediction"}))
    with pytest.raises(TrainingError, match=r"other options: checkpoint was '[^;]*$"):
        run.train(options(3), say=hush)


def test_a_checkpoint_of_a_release_that_kept_less_is_refused(bases: Folders, pictures: Path, tmp_path: Path) -> None:
    options = StyleLora(checkpoint=bases["sd"], data=str(pictures), out=tmp_path, steps=1, **FEW)
    run.train(options, say=hush)
    state = loop.load(tmp_path / "checkpoint.pt")
    facts = json.loads(state["facts"])
    del facts["known"]
    loop.save(tmp_path / "checkpoint.pt", state | {"facts": json.dumps(facts | {"precision": "auto"})})
    with pytest.raises(
        TrainingError, match=r"begun by another release, .*: finish it with that release, or give anoth"
    ):
        run.train(options, say=hush)


def test_unknown_targets_are_refused_with_near_names(bases: Folders, pictures: Path, tmp_path: Path) -> None:
    given = {**FEW, "target": ("to_q", "to_kk"), "steps": 1}
    with pytest.raises(TrainingError, match=r"no linear or convolution layer 'to_kk' \(near: .*to_k"):
        run.train(LcmLora(checkpoint=bases["sd"], data=str(pictures), out=tmp_path, **given), say=hush)


@pytest.mark.parametrize("kind", [LcmLora, StyleLora])
def test_float16_on_a_processor_is_refused_before_anything_is_loaded(tmp_path: Path, kind: type[Any]) -> None:
    given = {**FEW, "checkpoint": tmp_path, "data": "painter:2", "out": tmp_path / "out", "precision": "fp16"}
    with pytest.raises(TrainingError, match=r"^--precision fp16 needs a GPU; on a processor bf16 or no would do$"):
        run.train(kind(**given), say=hush)
    assert not (tmp_path / "out").exists()


def test_a_log_outlives_a_full_disk_and_keeps_what_a_failing_one_left_of_it(
    bases: Folders, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def options(steps: int) -> StyleLora:
        return StyleLora(checkpoint=bases["sd"], data=str(pictures), out=tmp_path, steps=steps, **FEW)

    run.train(options(3), say=hush)
    log = tmp_path / "log.ndjson"
    first, second, third = log.read_bytes().splitlines(keepends=True)
    # As after a power cut: no UTF-8, what ends lines for text but not for bytes, and a last line without its end.
    damaged = first + b"\xff\0\x0c\r" + second + third.rstrip()
    log.write_bytes(damaged)
    real = accelerated.Run._forget_after

    def little_room(*given: Any) -> None:
        with small_disk(50):
            real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(accelerated.Run, "_forget_after", little_room)
        with pytest.raises(TrainingError, match=r"cannot write .*log\.ndjson: File too large$"):
            run.train(options(4), say=hush)
    assert log.read_bytes() == damaged
    assert not [*tmp_path.glob("*.part")]
    # A step that the checkpoint does not hold is taken again.
    log.write_bytes(damaged + b"\n" + third)
    run.train(options(4), say=hush)
    assert log.read_bytes().startswith(damaged + b"\n")
    (line,) = log.read_bytes().removeprefix(damaged + b"\n").splitlines()
    assert json.loads(line)["step"] == 4
