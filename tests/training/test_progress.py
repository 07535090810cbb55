"""What the lines of progress say of pace and time left, by a clock that is set by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from farm.training import StyleLora
from workers.training import accelerated, loop


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (accelerated, loop):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def told(line: str) -> tuple[str, ...]:
    """The line without the loss."""
    place, _, figures = line.partition("  loss ")
    return (place, *figures.split("  ")[1:])


def test_an_adapters_progress(clock: Clock) -> None:
    options = StyleLora(checkpoint=Path("a"), data="b", out=Path("c"), steps=106, batch=3, accumulate=2)
    lines: list[str] = []
    pace = accelerated._Pace(options, 10, 4, lines.append)
    # Two seconds a step from the tenth, on which it resumed; later half of one.
    for done in range(11, 107):
        clock.now += 2.0 if done <= 46 else 0.5
        pace.step(done, 0.25)
    steady = ("2.00 s/step", "12.00 pictures/s")
    assert [told(line) for line in lines[:3]] == [
        ("step 11/106", *steady, "3.2 min left"),
        ("step 16/106", *steady, "3.0 min left"),
        ("step 21/106", *steady, "2.8 min left"),
    ]
    assert told(lines[8]) == ("step 66/106", "0.50 s/step", "48.00 pictures/s", "0.3 min left")
    assert told(lines[-1]) == ("step 106/106", "0.50 s/step", "48.00 pictures/s", "0.0 min left")
    assert all("loss 0.25000" in line for line in lines)
    assert pace.elapsed == 36 * 2.0 + 60 * 0.5


def test_the_progress_of_a_stage(clock: Clock, tmp_path: Path) -> None:
    model, lines = nn.Linear(1, 1), list[str]()

    def step(*_: Any) -> torch.Tensor:
        clock.now += 3.0
        return model(torch.ones(1, 1)).square().mean()

    path = tmp_path / "stage.pt"
    for steps in (25, 130):
        loop.train(step, {"model": model}, loop.Plan(steps, 0.0, say_every=50), path, say=lines.append)
    # The second goes on from 25; the last lap is short.
    assert [line.partition(" loss ")[0] + " " + line.partition(" s/step ")[2] for line in lines] == [
        "stage 25/25 0.0 min left",
        "stage 50/130 4.0 min left",
        "stage 100/130 1.5 min left",
        "stage 130/130 0.0 min left",
    ]
    assert all(" 3.000 s/step " in line for line in lines), lines
