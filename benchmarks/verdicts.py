"""What is promised of `crack-tiny` in figures, and whether a report keeps it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

RATES = ("wall", "crack", "direction")
LEAST = {"wall": 0.95, "crack": 0.95, "direction": 0.90, "hairlines": 0.90}
OF_TEACHER = 0.95
EQUAL = 0.01
"""Rates of 500 pictures closer than this are the same: it is about one standard error."""
AS_NEAR = 0.3
"""Distances of two rows of 500 pictures closer than this are the same: the standard error of their difference, by
drawing 500 of 2,000 pictures anew, is 0.26 to 0.29."""
VARIED = (0.25, 0.75)
"""What captions leave open has to vary: so many of the diagonal cracks rise, the others fall."""
SECONDS = 1.0

Report = Mapping[str, Any]
Verdict = dict[str, Any]


def verdicts(report: Report) -> list[Verdict]:
    """`promise`, what was `found`, and whether it is `reached`, for every promise whose rows were measured."""
    rows = report["rows"]
    found = list(_speed(report["seconds"]))
    if "lcm-4" in rows:
        found += _alone(rows["lcm-4"])
        if "ddim-50-guided" in rows:
            found += _teacher(rows["lcm-4"], rows["ddim-50-guided"])
        for name, words in (("ddim-2-guided", "2 guided steps"), ("ddim-4", "4 unguided steps")):
            if name in rows:
                found += _ahead(rows["lcm-4"], rows[name], words)
        if "lcm-8" in rows:
            found += _more_steps(rows["lcm-4"], rows["lcm-8"])
    return found


def _verdict(promise: str, found: str, reached: bool) -> Verdict:
    return {"promise": promise, "found": found, "reached": bool(reached)}


def _alone(row: Report) -> Iterator[Verdict]:
    for name, least in LEAST.items():
        if row[name] is not None:
            yield _verdict(f"LCM-LoRA, 4 steps: {name} at least {least:.2f}", f"{row[name]:.3f}", row[name] >= least)
    if (share := row["rising"]) is not None:
        low, high = VARIED
        promise = f"LCM-LoRA, 4 steps: {low:.2f} to {high:.2f} of diagonal cracks rise to the right"
        yield _verdict(promise, f"{share:.3f}", low <= share <= high)


def _teacher(row: Report, teacher: Report) -> Iterator[Verdict]:
    for name in RATES:
        if row[name] is not None and teacher[name]:
            share = row[name] / teacher[name]
            promise = f"LCM-LoRA, 4 steps: {name} at least {OF_TEACHER:.2f} of the guided teacher's at 50 steps"
            yield _verdict(promise, f"{share:.3f}", share >= OF_TEACHER)


def _ahead(row: Report, other: Report, words: str) -> Iterator[Verdict]:
    """At equal UNet passes LCM-LoRA is ahead in every rate and nearer to painted pictures."""
    pairs = [(name, row[name], other[name]) for name in RATES if row[name] is not None]
    text = ", ".join(f"{name} {mine:.3f} to {theirs:.3f}" for name, mine, theirs in pairs)
    text += f", distance {row['distance']:.2f} to {other['distance']:.2f}"
    ahead = all(mine > theirs for _, mine, theirs in pairs) and row["distance"] < other["distance"]
    yield _verdict(f"4 UNet passes: LCM-LoRA ahead of the teacher's {words} in everything", text, ahead)


def _more_steps(four: Report, eight: Report) -> Iterator[Verdict]:
    pairs = [(name, four[name], eight[name]) for name in RATES if four[name] is not None]
    text = ", ".join(f"{name} {after:.3f} to {before:.3f}" for name, before, after in pairs)
    text += f", distance {eight['distance']:.2f} to {four['distance']:.2f}"
    kept = all(after >= before - EQUAL for _, before, after in pairs)
    kept = kept and eight["distance"] <= four["distance"] + AS_NEAR
    yield _verdict(f"LCM-LoRA: 8 steps not worse than 4 by more than {EQUAL}, nor {AS_NEAR} farther away", text, kept)


def _speed(seconds: Mapping[str, float]) -> Iterator[Verdict]:
    alone, together = seconds["alone"], seconds["together"]
    yield _verdict(f"4 steps of one picture in at most {SECONDS:g} s", f"{alone:.3f} s", alone <= SECONDS)
    text = f"{together:.3f} s each, {alone:.3f} s alone"
    yield _verdict("eight in a micro-batch cheaper than one alone", text, together < alone)
