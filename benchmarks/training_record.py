"""What the training left behind: its settings, and from its logs the steps, last losses and hours of every stage.

Log lines are those of `workers.training.loop`: `base 350/14000 loss 0.0812 0.251 s/step 57.1 min left`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_LINE = re.compile(r"^([a-z]+)\S* (\d+)/(\d+) loss ([\d.]+) ([\d.]+) s/step")
_SAYS_EVERY = 50
STAGES = {
    "autoencoder": ("autoencoder_steps", "16 crops of 64x64, then 4 whole pictures", "autoencoder_rate"),
    "refine": ("refine_steps", "4 whole pictures", "refine_rate"),
    "words": ("words_steps", "64 captions", "words_rate"),
    "base": ("base_steps", "base_batch", "base_rate"),
    "distil": ("distil_steps", "distil_batch", "distil_rate"),
    "decode": ("decoder_steps", "4 whole pictures", "decoder_rate"),
    "reader": ("reader_steps", "64 latents", "reader_rate"),
    "sharpen": ("sharpen_steps", "distil_batch", "sharpen_rate"),
    "style": ("steps", "batch", "rate"),
}
"""A stage's settings: steps, pictures a step (a setting or words), learning rate."""
HONING = {
    "answers": ("words_steps", "64 captions", "words_rate"),
    "reader": ("reader_steps", "64 latents", "reader_rate"),
    "sharpen": ("sharpen_steps", "16", "sharpen_rate"),
    "style": STAGES["style"],
}
"""The same for what goes on from a finished model."""


class BadRecord(Exception):
    """A file of the training is missing or says something else than expected."""


def read_logs(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Steps done, last smoothed loss and hours by stage, over all logs in order; work lost to a stop counts too."""
    found: dict[str, dict[str, Any]] = {}
    for path in paths:
        last: dict[str, int] = {}
        for line in _text(path).splitlines():
            match = _LINE.match(line)
            if match:
                stage, step, pace = match[1], int(match[2]), float(match[5])
                gap = step - last.get(stage, 0)
                # A first line says nothing of where its run began: it covers one lap at most.
                lap = gap if 0 < gap <= _SAYS_EVERY else min(step, _SAYS_EVERY)
                last[stage] = step
                hours = found.get(stage, {}).get("hours", 0.0) + pace * lap / 3600
                found[stage] = {"steps": step, "of": int(match[3]), "loss": float(match[4]), "hours": hours}
    if not found:
        raise BadRecord(f"no line of a training stage in {', '.join(str(path) for path in paths)}")
    for stage in found.values():
        stage["hours"] = round(stage["hours"], 3)
    return found


def record(settings: Path, logs: Iterable[Path], hardware: str, style: Path | None, notes: list[str]) -> dict[str, Any]:
    """One JSON-able record of a training. Raises BadRecord with the file that is wrong."""
    made: dict[str, Any] = {"hardware": hardware, "notes": notes, "settings": _json(settings)}
    if style:
        made["style"] = _json(style)
    made["stages"] = read_logs(list(logs))
    return made


def rows(
    made: dict[str, Any], stages: Mapping[str, tuple[str, str, str]] = STAGES
) -> list[tuple[str, str, str, str, str, str]]:
    """Stage, steps, pictures a step, learning rate, last loss and hours, in the order of the recipe."""
    table = []
    for stage, (steps, batch, rate) in stages.items():
        settings = made.get("style", {}) if stage == "style" else made["settings"]
        if steps not in settings:
            continue
        log = made["stages"].get(stage)
        done = f"{settings[steps]:,}" if not log or log["steps"] == settings[steps] else f"{log['steps']:,}"
        told = (f"{log['loss']:.3f}", f"{log['hours']:.2f}") if log else ("not logged", "not logged")
        table.append((stage, done, str(settings.get(batch, batch)), f"{settings[rate]:g}", *told))
    return table


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError as error:
        raise BadRecord(f"{path} cannot be read: {error}") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_text(path))
    except ValueError as error:
        raise BadRecord(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadRecord(f"{path}: a JSON object is expected")
    return value
