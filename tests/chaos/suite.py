"""The rows of the suite, their sizes, and how one is run."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from farm.stack import Servers
from tests.chaos.harness import Chaos
from tests.chaos.invariants import Violation

Size = Literal["short", "ci", "large"]
SLACK: Mapping[Size, float] = {"short": 15.0, "ci": 6.0, "large": 4.0}
"""Seconds that a machine may be late by: tests share theirs with other tests, the large run has one to itself."""


@dataclass(frozen=True)
class Row:
    """One row: what it does to a farm whose API and sweeper run, with how much for each size.

    `production`: the large run has the timers as they are shipped. `settings`: what else the farm is set to.
    `alone`: the row makes its own farms, by `make`, which takes settings as `Chaos` does. `lasts`: about how many
    seconds at CI size; where several run at a time, the longest begin first, or one would be left to itself at the end.
    `named`: run only where it is asked for by its name.
    """

    fault: str
    run: Callable[..., None]
    short: Mapping[str, Any]
    ci: Mapping[str, Any]
    large: Mapping[str, Any]
    production: bool = False
    real: bool = False
    alone: bool = False
    lasts: float = 0.0
    named: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    def sizes(self, size: Size) -> dict[str, Any]:
        return dict({"short": self.short, "ci": self.ci, "large": self.large}[size])

    def with_sizes(self, size: Size, changes: Mapping[str, Any]) -> "Row":
        """The same row with other numbers for a size. Raises KeyError for one that it does not have."""
        sizes = self.sizes(size)
        for name in changes:
            if name not in sizes:
                raise KeyError(f"this row has no {name!r}, only {', '.join(sizes) or 'nothing to set'}")
        return replace(self, **{size: sizes | dict(changes)})


@dataclass
class Report:
    """What became of one row. `recovery` and `bound` in seconds, as far as the row kills workers; `said` is what was
    measured of what is promised, in words."""

    row: str
    fault: str
    size: Size
    seed: int
    asked: dict[str, Any]
    seconds: float
    jobs: int
    counts: dict[str, float]
    said: dict[str, str]
    recovery: float | None
    bound: float
    violations: list[Violation]
    history: str

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1, default=str) + "\n", encoding="utf-8")


Make = Callable[..., Chaos]


def run_row(name: str, row: Row, servers: Servers, folder: Path, *, size: Size, seed: int) -> Report:
    """Run one row in `folder`, which will hold its logs, its history and its report."""
    folder.mkdir(parents=True, exist_ok=True)
    production = row.production and size == "large"

    def make(**changes: Any) -> Chaos:
        own = folder / str(changes.pop("name", "."))
        own.mkdir(exist_ok=True)
        options = {"seed": seed, "slack": SLACK[size], "production": production, "real": row.real}
        return Chaos(servers, own, **options, **(dict(row.settings) | changes))

    began = time.monotonic()
    asked = row.sizes(size)
    if row.alone:
        chaos = make()
        chaos.violations += row.run(make, **asked) or []
        with chaos:
            pass
    else:
        with make() as chaos:
            chaos.start("api")
            chaos.start("sweeper")
            try:
                row.run(chaos, **asked)
            except (AssertionError, TimeoutError) as error:
                chaos.fail(str(error))
            chaos.judge()
    recoveries = chaos.figures.recoveries
    report = Report(
        row=name,
        fault=row.fault,
        size=size,
        seed=seed,
        asked=asked,
        seconds=round(time.monotonic() - began, 1),
        jobs=chaos.client.accepted,
        counts=chaos.figures.counts,
        said=chaos.figures.said,
        recovery=round(max(back - killed for killed, back in recoveries), 2) if recoveries else None,
        bound=chaos.bound,
        violations=chaos.violations,
        history=chaos.history_path.name,
    )
    report.write(folder / "report.json")
    return report
