"""What a person at a terminal sees while something takes its time. Lines elsewhere are in the commands' own tests."""

import io
import re

import pytest
from rich.console import Console

from farm.cli import display
from farm.cli.display import Bar, batch_note, waiting
from farm.views import BatchView
from tests.client.fake import batch_document
from tests.stack.watching import wait_until


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """All that is drawn on standard error, which is a terminal."""
    drawn = io.StringIO()
    console = Console(file=drawn, force_terminal=True, width=120, color_system=None, highlight=False)
    monkeypatch.setattr(display, "err", console)
    return drawn


def batch(**changed: object) -> BatchView:
    return BatchView.model_validate(batch_document(8) | changed)


RUNNING = batch(
    counts={"queued": 3, "running": 2, "succeeded": 2, "failed": 1}, images_per_second=2.468, eta_seconds=75.2
)


def test_a_bar_shows_how_many_of_how_many_at_which_rate_and_how_long_still(terminal: io.StringIO) -> None:
    with Bar("rendering", 8) as bar:
        bar.show(RUNNING)
        bar._progress.refresh()
        drawn = terminal.getvalue().splitlines()[-1].split("\r")[-1]
        assert "rendering" in drawn
        assert "3/8 2.5 images/s, 1 min 15 s left, 1 failed" in drawn
        bar.show(batch(counts={"succeeded": 7, "failed": 1}, images_per_second=2.0, eta_seconds=0.0))
    last = terminal.getvalue().rstrip("\x1b[?25h\n").splitlines()[-1]
    assert "8/8 2 images/s, 1 failed" in last
    assert "left" not in last, "nothing is left of what is done"


def test_waiting_shows_what_it_is_at_and_how_long_it_took(
    terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(display, "PATIENCE", 0.0)
    with waiting("starting the farm") as note:
        # Drawn by a thread of its own, a dozen times a second.
        wait_until(lambda: "starting the farm ..." in terminal.getvalue())
        note("postgres healthy")
        wait_until(lambda: "starting the farm ... postgres healthy" in terminal.getvalue())
    assert re.fullmatch(r"starting the farm: \d\.\d s\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("changed", "note"),
    [
        ({"images_per_second": 0.0, "eta_seconds": None}, ""),
        ({"images_per_second": 31.6, "eta_seconds": 7300.0}, "32 images/s, 2 h 1 min left"),
        ({"images_per_second": 1.5, "eta_seconds": None, "paused": True}, "1.5 images/s, paused"),
        ({"counts": {"failed": 5, "cancelled": 3}, "eta_seconds": 0.0, "stop_reason": "most failed"},
         "5 failed, 3 cancelled, stopped: most failed"),
    ],
)  # fmt: skip
def test_a_note_says_rate_time_left_and_what_went_wrong(changed: dict[str, object], note: str) -> None:
    assert batch_note(batch(**changed)) == note
