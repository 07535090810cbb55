"""Room that is taken before it is written to, and caches that are made anew where they are not whole."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from farm import painter
from farm.training import StyleLora
from tests.training.conftest import FEW, Folders, hush
from tests.training.test_adapter_trouble import small_disk
from workers.training import disk, pool, run
from workers.training.disk import beside
from workers.training.errors import TrainingError


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("known", [True, False], ids=["linux", "macos"])
def test_room_is_taken_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    if not known:
        monkeypatch.delattr(os, "posix_fallocate")
        monkeypatch.setattr(disk, "PIECE", 1000)
    path, size = tmp_path / "new" / "file", 1_000_003
    disk.reserve(path, size, "a test", b"head")
    assert path.read_bytes() == b"head" + bytes(size)
    assert path.stat().st_blocks * 512 >= size
    with (
        small_disk(500_000),
        pytest.raises(TrainingError, match=rf"cannot take {size} bytes for a test .*new/file: File"),
    ):
        disk.reserve(path, size, "a test")
    assert not path.exists()
    disk.reserve(path, 0, "a test")
    assert path.read_bytes() == b""


def test_a_pool_has_its_room_before_the_first_wall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, taken, apparent = painter.paint, list[int](), list[int]()

    def watched(*given: Any) -> Any:
        (half,) = tmp_path.iterdir()
        taken.append(half.stat().st_blocks * 512)
        apparent.append(half.stat().st_size)
        return real(*given)

    monkeypatch.setattr(pool, "paint", watched)
    made = pool.open_pool(tmp_path, 40, 64, seed=1)
    assert taken[0] >= apparent[0] > 40 * 64 * 64 * 4
    assert made.pixels.shape == (40, 64, 64, 4)
    assert made.pixels[39, :, :, :3].any()
    # As numpy itself would have written it.
    (path,) = tmp_path.iterdir()
    np.save(tmp_path / "numpys.npy", np.asarray(made.pixels))
    assert path.read_bytes() == (tmp_path / "numpys.npy").read_bytes()


def test_a_pool_without_room_ends_in_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(TrainingError, match=r"cannot take 32768 bytes for the pool .*: No space left on device$"):
        pool.open_pool(tmp_path, 2, 64, seed=1)
    assert not list(tmp_path.iterdir())


def test_walls_of_another_painter_are_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = pool.open_pool(tmp_path, 4, 64, seed=1)
    assert np.array_equal(pool.open_pool(tmp_path, 4, 64, seed=1).pixels, before.pixels)
    real = painter.paint
    monkeypatch.setattr(pool, "paint", lambda scene, width, height, seed: real(scene, width, height, seed + 1))
    with pytest.raises(TrainingError, match=r"pool-4-64-1\.npy was painted by another release: use another working"):
        pool.open_pool(tmp_path, 4, 64, seed=1)


def half_note(cache: Path) -> None:
    note = cache / "cache.json"
    note.write_bytes(note.read_bytes()[:20])


def no_text(cache: Path) -> None:
    (cache / "cache.json").write_bytes(b"\xff\xfe")


def no_moments(cache: Path) -> None:
    (cache / "moments").unlink()


def short_moments(cache: Path) -> None:
    os.truncate(cache / "moments", 100)


@pytest.mark.usefixtures("one_thread")
def test_a_cache_that_is_not_whole_is_made_anew(bases: Folders, pictures: Path, tmp_path: Path) -> None:
    def encoded(steps: int) -> bool:
        said: list[str] = []
        given = {**FEW, "steps": steps, "cache": True, "out": tmp_path}
        run.train(StyleLora(checkpoint=bases["sd"], data=str(pictures), **given), say=said.append)
        return any(line.startswith("cache: ") for line in said)

    assert encoded(1)
    assert not encoded(1)
    moments = (tmp_path / "cache" / "moments").read_bytes()
    damages: list[Callable[[Path], None]] = [half_note, no_text, no_moments, short_moments]
    for damage in damages:
        damage(tmp_path / "cache")
        assert encoded(1), damage.__name__
        assert (tmp_path / "cache" / "moments").read_bytes() == moments
    assert not encoded(1)


@pytest.mark.usefixtures("one_thread")
def test_a_disk_that_fills_up_at_the_end_of_a_cache_blocks_nothing(
    bases: Folders, pictures: Path, tmp_path: Path
) -> None:
    given = {**FEW, "steps": 1, "cache": True, "out": tmp_path}
    options = StyleLora(checkpoint=bases["sd"], data=str(pictures), **given)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "cache.json.part").symlink_to("/dev/full")
    with pytest.raises(TrainingError, match=r"cannot write .*cache/cache\.json: No space left on device$"):
        run.train(options, say=hush)
    assert not (tmp_path / "cache" / "cache.json").exists()
    assert len(run.train(options, say=hush)) == 1, "with room again it goes on"
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [
        "cache.json", "moments", "pooled", "sizes", "states",
    ]  # fmt: skip


@pytest.mark.usefixtures("one_thread")
def test_a_cache_that_cannot_be_begun_is_named(bases: Folders, pictures: Path, tmp_path: Path) -> None:
    given = {**FEW, "steps": 1, "cache": True, "out": tmp_path}
    (tmp_path / "cache" / "cache.json").mkdir(parents=True)
    with pytest.raises(TrainingError, match=r"cannot remove .*cache/cache\.json: Is a directory$"):
        run.train(StyleLora(checkpoint=bases["sd"], data=str(pictures), **given), say=hush)


def test_a_folder_changes_only_when_all_of_the_new_one_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "weights").write_text("old")
    (folder / "README.md").write_text("a card")

    def stopped() -> None:
        with beside(folder) as half:
            (half / "unet").mkdir()
            (half / "unet" / "weights").write_text("new")
            raise TrainingError("no room")

    with pytest.raises(TrainingError, match="no room"):
        stopped()
    assert (folder / "unet" / "weights").read_text() == "old"
    with beside(folder) as half:
        assert list(half.iterdir()) == [], "nothing of the failed one is left"
        (half / "unet").mkdir()
        (half / "unet" / "weights").write_text("new")
        (half / "profile.json").write_text("{}")
    assert (folder / "unet" / "weights").read_text() == "new"
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "profile.json", "unet"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
