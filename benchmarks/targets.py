"""What is promised of the engine's speed, and whether a report of `benchmarks.engine` keeps it. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

REACHED, MISSED, ELSEWHERE = "reached", "missed", "not measured here"

AT_ONE, AT_BEST = 2.0, 1.5
"""Times plain diffusers on an H200: one picture alone, and both at their best micro-batch."""
RATES = {"sd15": (60.0, 80.0), "sdxl": (8.0, 13.0)}
"""Images a second on an H200: what is promised, and what is aimed at."""
SWAPS = {"sd15": 0.03, "sdxl": 0.1}
"""Seconds of an adapter swap on an H200 at most."""
SLOTS, SLOT_COUNT, SLOT_RANK = 1.10, 8, 16
"""Times as long as one merged adapter, with so many different ones of this rank in a micro-batch of as many."""
ON_CPU, SWAP_TIMES = 1.3, 20.0
"""Times the plain loop image by image, and times as fast as unloading and loading, with crack-tiny on two cores."""
CORES = 2

SERVED = {"cuda": ("graphs", "compiled"), "cpu": ("parts",)}
"""The rung that workers render at: the first of these that was measured."""

Report = Mapping[str, Any]
"""What one model gave: `device` (cuda or cpu), `device_name`, `threads`, `dtype`, and of the parts that were measured
`ladder`, `swap` and `slots`."""
Verdict = dict[str, Any]
"""`promise`, `figure` (words, None where nothing was measured), `ratio` and `state`: reached, missed, or not measured
here. `aim` is True for what is hoped for and not promised."""


def verdicts(reports: Mapping[str, Report]) -> list[Verdict]:
    """One for each figure promised, whatever was measured. `reports` by the model's name."""
    found: list[Verdict] = []
    for model in RATES:
        report = reports.get(model, {})
        found += _gpu(model, report)
    found += _cpu(reports.get("crack-tiny", {}))
    return found


def missed(found: list[Verdict]) -> bool:
    """Whether anything promised, and not only aimed at, was measured and missed."""
    return any(one["state"] == MISSED and not one.get("aim") for one in found)


def line(one: Verdict) -> str:
    """A verdict for people."""
    state = f"{one['state']}{' (an aim)' if one.get('aim') else ''}"
    ratio = "" if one["ratio"] is None else f", {one['ratio']:.2f}"
    return f"{state:20} {one['promise']}" + (f": {one['figure']}{ratio}" if one["figure"] else "")


def rate(report: Report, rung: str, micro_batch: int | None = None) -> float | None:
    """Images a second of a rung: of one micro-batch, or the best of all. None where it was not measured.

    >>> rows = [{"rung": "plain", "micro_batch": n, "images_per_second": float(n)} for n in (1, 8)]
    >>> rate({"ladder": rows}, "plain"), rate({"ladder": rows}, "plain", 1), rate({"ladder": rows}, "parts")
    (8.0, 1.0, None)
    """
    rows = [row for row in report.get("ladder", ()) if row["rung"] == rung and "images_per_second" in row]
    return max((row["images_per_second"] for row in rows if micro_batch in {None, row["micro_batch"]}), default=None)


def _served(report: Report, micro_batch: int | None = None) -> float | None:
    for rung in SERVED.get(report.get("device", ""), ()):
        if (found := rate(report, rung, micro_batch)) is not None:
            return found
    return None


def _verdict(promise: str, here: bool, figure: str | None, ratio: float | None, kept: bool, **more: Any) -> Verdict:
    state = ELSEWHERE if figure is None or not here else REACHED if kept else MISSED
    return {"promise": promise, "figure": figure, "ratio": ratio, "state": state, **more}


def _beside(promise: str, here: bool, mine: float | None, other: float | None, least: float) -> Verdict:
    """Images a second beside plain diffusers' in the same run."""
    if mine is None or other is None:
        return _verdict(promise, here, None, None, False)
    return _verdict(promise, here, f"{mine:.2f} to {other:.2f} images/s", mine / other, mine / other >= least)


def _gpu(model: str, report: Report) -> Iterator[Verdict]:
    here = "H200" in report.get("device_name", "") and report.get("dtype") == "float16"
    who = f"{model} on an H200"
    alone, best = _served(report, 1), _served(report)
    yield _beside(
        f"{who}: at least {AT_ONE:g} times plain diffusers, one picture alone",
        here, alone, rate(report, "plain", 1), AT_ONE,
    )  # fmt: skip
    yield _beside(
        f"{who}: at least {AT_BEST:g} times plain diffusers, each at its best micro-batch",
        here, best, rate(report, "plain"), AT_BEST,
    )  # fmt: skip
    for bar, aim in zip(RATES[model], (False, True), strict=True):
        promise = f"{who}: {'aims at' if aim else 'at least'} {bar:g} images/s"
        if best is None:
            yield _verdict(promise, here, None, None, False, aim=aim)
        else:
            yield _verdict(promise, here, f"{best:.2f} images/s", best / bar, best >= bar, aim=aim)
    seconds = report.get("swap", {}).get("in_place_seconds")
    promise = f"{who}: an adapter swap in at most {SWAPS[model]:g} s"
    if seconds is None:
        yield _verdict(promise, here, None, None, False)
    else:
        yield _verdict(promise, here, f"{seconds:.4f} s", seconds / SWAPS[model], seconds <= SWAPS[model])
    yield _slots(who, here, report.get("slots", {}))


def _slots(who: str, here: bool, found: Report) -> Verdict:
    promise = f"{who}: {SLOT_COUNT} rank-{SLOT_RANK} adapters in slots at most {SLOTS:.2f} times as long as one merged"
    if (found.get("micro_batch"), found.get("rank")) != (SLOT_COUNT, SLOT_RANK):
        return _verdict(promise, here, None, None, False)
    figure = f"{found['slots_seconds']:.3f} to {found['merged_seconds']:.3f} s"
    return _verdict(promise, here, figure, found["ratio"], found["ratio"] <= SLOTS)


def _cpu(report: Report) -> Iterator[Verdict]:
    here = report.get("device") == "cpu" and report.get("threads") == CORES and report.get("dtype") == "float32"
    who, loop = f"crack-tiny on {CORES} cores", "the plain loop image by image"
    plain = rate(report, "plain", 1)
    yield _beside(
        f"{who}: at least {ON_CPU:g} times {loop}, one picture alone", here, _served(report, 1), plain, ON_CPU
    )
    yield _beside(f"{who}: at least {ON_CPU:g} times {loop}, at its best", here, _served(report), plain, ON_CPU)
    promise = f"{who}: a swap at least {SWAP_TIMES:g} times as fast as unloading and loading"
    if "swap" not in report:
        yield _verdict(promise, here, None, None, False)
    else:
        swap = report["swap"]
        figure = f"{swap['in_place_seconds'] * 1000:.1f} to {swap['reload_seconds'] * 1000:.1f} ms"
        yield _verdict(promise, here, figure, swap["times"], swap["times"] >= SWAP_TIMES)
