"""A device that renders the canary otherwise than before takes no work."""

from pathlib import Path

import pytest

from farm.settings import Settings
from tests.stub_worker import StubRenderer
from workers import canary
from workers.canary import sings

CHECKPOINT = "a" * 64


class Sick(StubRenderer):
    def canary(self, checkpoint: str) -> bytes:
        return b"something else"


class OtherDevice(Sick):
    device = "stub:1"


def test_the_first_song_is_remembered_and_another_refused(settings: Settings) -> None:
    assert sings(StubRenderer(), CHECKPOINT, settings) is None
    assert sings(StubRenderer(), CHECKPOINT, settings) is None
    wrong = sings(Sick(), CHECKPOINT, settings)
    assert wrong is not None
    (recorded,) = (settings.cache_dir / "canaries").iterdir()
    assert str(recorded) in wrong, "it says what to remove after a change on purpose"


def test_other_devices_and_checkpoints_have_songs_of_their_own(settings: Settings) -> None:
    assert sings(StubRenderer(), CHECKPOINT, settings) is None
    assert sings(OtherDevice(), CHECKPOINT, settings) is None
    assert sings(StubRenderer(), "b" * 64, settings) is None


def test_an_upgraded_engine_has_a_song_of_its_own(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tmp_path / "render.py"
    engine.write_text("STEPS = 4\n")
    monkeypatch.setattr(canary, "ENGINE", tmp_path)
    assert sings(StubRenderer(), CHECKPOINT, settings) is None
    assert sings(Sick(), CHECKPOINT, settings) is not None
    engine.write_text("STEPS = 5\n")
    assert sings(Sick(), CHECKPOINT, settings) is None


def test_another_number_of_threads_has_a_song_of_its_own(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert sings(StubRenderer(), CHECKPOINT, settings) is None
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert sings(Sick(), CHECKPOINT, settings) is None
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert sings(Sick(), CHECKPOINT, settings) is not None
