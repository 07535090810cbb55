"""Writes the README of `crack-tiny` from what was measured and how it was trained.

    python -m benchmarks.model_card --settings WORK/settings.json --log WORK.log... --hardware "2 cores of ..."
        [--style WORK/style-settings.json] [--note TEXT]... [--report benchmarks/out/crack_tiny.json] [--docs docs]
        [--control CONTROL.json]
    python -m benchmarks.model_card --honed WORK/hone-settings.json --log LOG... --hardware "2 cores of ..."
        [--style WORK/style-settings.json] [--note TEXT]...       # how it was gone on with, in the card there is
    python -m benchmarks.model_card --report REPORT.json          # what was measured alone, likewise
    python -m benchmarks.model_card --control CONTROL.json        # that section alone, too

No figure in the card is typed by hand: the table and the promises come from the benchmark's report, the recipe from
the training's settings and logs, sizes from the files. `--control` is the report of `benchmarks.control
--out`. `--docs` also puts the contact sheets there, as WebP.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import safe_open

from benchmarks.control import net_key
from benchmarks.geometry import CRACK_TINY
from benchmarks.stock import model_key, style_of
from benchmarks.training_record import HONING, BadRecord, record, rows
from workers.training.crack_tiny_hone import options

REPORT = Path("benchmarks/out/crack_tiny.json")
COLUMNS = ("wall", "crack", "whole", "direction", "hairlines", "rising", "bent", "distance", "sharpness")
COARSE = ("distance", "sharpness")
SHEETS = {
    "crack_tiny_prompts.png": "crack-tiny-prompts.webp",
    "crack_tiny_prompts_style_1.png": "crack-tiny-night.webp",
    "crack_tiny_steps.png": "crack-tiny-steps.webp",
}

INTRODUCTION = """# crack-tiny

A small latent diffusion model of walls and cracks with its own LCM-LoRA, licence Apache-2.0. It is an unmodified
diffusers `StableDiffusionPipeline` folder; `lcm-lora.safetensors` beside it (official key names) makes it render in
four steps. {style}

```python
pipe = StableDiffusionPipeline.from_pretrained(folder)
pipe.load_lora_weights(folder, weight_name="lcm-lora.safetensors")
pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
pipe("A vertical crack on a grey concrete wall", num_inference_steps=4, guidance_scale=1.0)
```

Without the LCM-LoRA: `DDIMScheduler`, {teacher_steps} steps, guidance {guidance:g}.

This file is written by `python -m benchmarks.model_card` from the benchmark's report and the training's logs."""

STYLE = "`{name}` is a style adapter: night light, by its weight (0.5 to 1), together with the LCM-LoRA or without."

FILES_TITLE = "## What it is"

DATA = """## Data

{pool:,} pictures of 128x128 pixels from `farm.painter`, seed {seed}: five walls, cracks in three directions, three
widths and four forms, light, water, age. Every training step words its captions anew. Nothing else was used: no
photographs, no pretrained weights.{night}"""

NIGHT = """ The style learned from {pictures:,} of the painter's walls by night, seed {seed}."""

STYLE_COMMAND = "python -m workers.training.crack_tiny_style --model FOLDER --work DIR"
HEAD = ("stage", "steps", "pictures a step", "rate", "last loss (smoothed)", "hours")
RECIPE = """## Recipe

    python -m workers.training.crack_tiny --work DIR --out FOLDER{style}

Seeds {seed} (autoencoder), {base} (base), {distil} (LCM-LoRA), {words} (words) and on; {precision}. Hardware:
{hardware}; {hours:.1f} hours in all, as the logs tell.

{table}

`docs/crack-tiny.md` in the repository explains the stages."""

HONED_TITLE = "## Gone on with"
HONED = (
    HONED_TITLE
    + """

    python -m workers.training.crack_tiny_hone --model FOLDER --work DIR{options}{style}

The LCM-LoRA of the table above was then sharpened further, from the finished model's folder alone. Readers:
{readers}, which learned from {pool:,} pictures, {crossed:,} whose cracks were put together from two and {bent:,} with
the halves of two diagonal ones, seed {seed}. The direction of a crack counts {direction:g} times, whether a diagonal
one rises {lean:g} times, the wall {wall:g} times; wet walls are asked for {wet:g} times as often as others and walls
without cracks {whole:g} times. Walks are of {walks} steps, and
diagonal cracks have to rise or to fall, enough of them each.{styled}
Hardware: {hardware}; {hours:.1f} hours in all, as the logs tell.{notes}

{table}"""
)

MEASURED = """## Measured

`python -m benchmarks.crack_tiny --count {count}`, model {model}: {count} pictures a row, prompts and seeds that were
never trained on, with all kinds of walls and cracks as often as the painter draws them. An analyser reads wall colour,
whether there is a crack, how many of the walls that were asked for without one are whole, the direction (of cracks
that were asked for) and how many of the hairline cracks asked for are seen; on {judged} painted pictures of each of
{seeds} seeds it is right in at least {wall:.3f}, {crack:.3f} and {direction:.3f} of walls, cracks and directions.
Rising: how many of the diagonal cracks go up from left to right; captions do not say, the painter lets half of them.
Bent: how many of the single diagonal cracks rise as much as they fall, like a V; the painter draws few. Distance:
Frechet distance to painted pictures of the same scenes in the {size} features of a small
classifier trained on painted pictures (benchmarks/features.py; it names walls right in {named:.2f} and directions in
{turned:.2f}). Sharpness: mean Laplacian, painted pictures are 1. A rate near 0.95 has a standard error of {error:.3f}.
Seconds are those of one of eight pictures in a micro-batch on {machine}.

{table}

One picture alone in 4 LCM-LoRA steps: {alone:.3f} s; each of eight together: {together:.3f} s.
{nights}
What was promised:

{verdicts}"""

CONTROL_TITLE = "## Cracks that follow a mask"
CONTROL = (
    CONTROL_TITLE
    + """

`python -m benchmarks.control --count {pictures}`, model {model}, ControlNet {control} (`control-mask`): {pictures}
masks that nobody trained on, {steps} LCM-LoRA steps, weight {weight:g}. Precision: the share of the crack pixels an
analyser finds in a picture that lie within {tolerance} pixels of the mask; recall: the share of the mask's pixels with
a found one as near.

{table}"""
)
LOOKS = {"painted": "painted pictures", "with control": "with the ControlNet", "without": "without"}
"""What was looked at, as the card calls it."""

MEASURED_TITLE, LIMITS_TITLE = "## Measured", "## Limits"
LIMITS = """## Limits

{notes}- It knows painted walls, not photographs, and the words of the painter's captions; other words are guessed at.
- Trained at 128x128. Other sizes from 64 to 256 are accepted; they were not measured.
- The rates are an analyser's, which errs itself, and the classifier behind the distances learned from the same painter
  as the model."""


def with_measured(text: str, report: dict[str, Any], folder: Path, notes: Sequence[str]) -> str:
    """A card with another report's figures in it, and what they miss among its limits; all else stays as it was.

    `notes` take the place of those there are, if there are any. Raises BadRecord when the report is about another
    model, or the text is no card.
    """
    refuse_another(report, folder)
    if any(text.count(f"\n{title}\n") != 1 for title in (MEASURED_TITLE, LIMITS_TITLE)):
        raise BadRecord(f"the card has no section {MEASURED_TITLE!r} before one {LIMITS_TITLE!r}")
    before, _, rest = text.partition(f"\n{MEASURED_TITLE}\n")
    between, _, limits = rest.partition(f"\n{LIMITS_TITLE}\n")
    control = between.partition(f"\n{CONTROL_TITLE}\n")
    always = LIMITS.format(notes="").partition(f"{LIMITS_TITLE}\n\n")[2]
    kept = [line.removeprefix("- ") for line in limits.partition(always)[0].split("\n") if line.startswith("- ")]
    kept = list(notes) or [note for note in kept if not note.startswith("Not reached: ")]
    parts = [
        before,
        f"{_measured(report)}\n",
        *([f"{CONTROL_TITLE}\n{control[2]}"] if control[1] else []),
        LIMITS.format(notes="".join(f"- {note}\n" for note in [*_missed(report), *kept])),
    ]
    return "\n".join(parts) + "\n"


def with_honing(text: str, made: dict[str, Any]) -> str:
    """A card that also tells how its model was gone on with, before what was measured, in place of an earlier such
    section. A style that was trained along is no longer told of above. Raises BadRecord when the text is no card."""
    if text.count(f"\n{MEASURED_TITLE}\n") != 1:
        raise BadRecord(f"the card has no section {MEASURED_TITLE!r}, before which this one belongs")
    before, _, after = text.partition(f"\n{MEASURED_TITLE}\n")
    before = before.partition(f"\n{HONED_TITLE}\n")[0]
    if "style" in made:
        lines = before.splitlines(keepends=True)
        before = "".join(line for line in lines if not line.startswith("| style |") and STYLE_COMMAND not in line)
    section = HONED.format(
        **{**made["settings"], "walks": ", ".join(map(str, made["settings"]["walks"]))},
        options="".join(f" {option}" for option in options(made["settings"])),
        style=f"\n    {STYLE_COMMAND}" if "style" in made else "",
        styled=" After that the style was trained." if "style" in made else "",
        hardware=made["hardware"],
        hours=sum(stage["hours"] for stage in made["stages"].values()),
        notes="".join(f" {note}" for note in made["notes"]),
        table=table(HEAD, rows(made, HONING)),
    )
    return f"{before.rstrip()}\n\n{section}\n\n{MEASURED_TITLE}\n{after}"


def with_control(text: str, report: dict[str, Any], folder: Path) -> str:
    """A card with the section about the ControlNet in it, before its limits, in place of an earlier one.

    Raises BadRecord when the report is about another model or ControlNet, or the text is no card.
    """
    refuse_another(report, folder)
    if (found := net_key(folder / "control-mask")) != report["control"]:
        raise BadRecord(f"the report is about ControlNet {report['control']}, but {folder} has {found}")
    if text.count(f"\n{LIMITS_TITLE}\n") != 1:
        raise BadRecord(f"the card has no section {LIMITS_TITLE!r}, before which this one belongs")
    before, _, limits = text.partition(f"\n{LIMITS_TITLE}\n")
    before = before.partition(f"\n{CONTROL_TITLE}\n")[0]
    lines = [
        (LOOKS[name], *("-" if rates[one] is None else f"{rates[one]:.3f}" for one in ("precision", "recall", "f1")),
         "-" if rates["seen"] is None else f"{rates['seen']:.0%}")
        for name, rates in report["alignment"].items()
    ]  # fmt: skip
    head = ("", "precision", "recall", "F1", "pictures in which a crack is found")
    section = CONTROL.format(**report, table=table(head, lines))
    return f"{before}\n{section}\n\n{LIMITS_TITLE}\n{limits}"


def with_files(text: str, folder: Path) -> str:
    """A card that tells what files there are now. Raises BadRecord when the text is no card."""
    if text.count(f"\n{FILES_TITLE}\n") != 1:
        raise BadRecord(f"the card has no section {FILES_TITLE!r}")
    before, _, after = text.partition(f"\n{FILES_TITLE}\n")
    return f"{before}\n{FILES_TITLE}\n\n{_parts(folder)}\n\n## {after.partition(chr(10) + '## ')[2]}"


def refuse_another(report: dict[str, Any], folder: Path) -> None:
    """Raises BadRecord when the report is about another model."""
    if report["model"] != model_key(folder):
        raise BadRecord(f"the report is about model {report['model']}, but {folder} is {model_key(folder)}")


def card(report: dict[str, Any], made: dict[str, Any], folder: Path) -> str:
    """The README of the model in `folder`. Raises BadRecord when the report is about another model."""
    refuse_another(report, folder)
    profile = json.loads((folder / "profile.json").read_text("utf-8"))
    style, settings = style_of(folder), made["settings"]
    seed = int(settings["seed"])
    parts = [
        INTRODUCTION.format(
            style=STYLE.format(name=style.name) if style else "",
            teacher_steps=profile["teacher_steps"],
            guidance=profile["teacher_guidance_scale"],
        ).replace(" \n", "\n"),
        f"{FILES_TITLE}\n\n{_parts(folder)}",
        DATA.format(**settings, night=NIGHT.format(**made["style"]) if style and "style" in made else ""),
        RECIPE.format(
            style=f"\n    {STYLE_COMMAND}" if style else "",
            seed=seed, base=seed + 1, distil=seed + 2, words=seed + 4, hardware=made["hardware"],
            precision="bfloat16 autocast" if settings["bf16"] else "float32",
            hours=sum(stage["hours"] for stage in made["stages"].values()),
            table=table(HEAD, rows(made)),
        ),
        _measured(report),
        LIMITS.format(notes="".join(f"- {note}\n" for note in [*_missed(report), *made["notes"]])),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _nights(found: dict[str, Any]) -> str:
    """By which weight the style makes how much of a night."""
    light = ", ".join(f"{value:.2f} at weight {weight}" for weight, value in found["weights"].items())
    return (
        f"\nBy night: the mean brightness of {found['count']} pictures (0 to 1) in 4 LCM-LoRA steps is {light}; "
        f"painted by night it is {found['painted']:.2f}.\n"
        f"{found['bright']:.2f} of them are brighter, at the greatest weight, than 19 of 20 painted nights.\n"
    )


def _measured(report: dict[str, Any]) -> str:
    machine, judge, right = report["machine"], report["analyser"], report["features"]["right"]
    lines = [("painted pictures, other seeds", "", *_figures(report["painted"]), "")]
    lines += [("painted, through the autoencoder", "", *_figures(report["autoencoder"]), "")]
    for row in sorted(report["rows"].values(), key=lambda row: (not row["lcm"], row["guidance"], row["steps"])):
        kind = "LCM-LoRA" if row["lcm"] else f"DDIM, guidance {row['guidance']:g}"
        steps = f"{row['steps']} step{'s' if row['steps'] > 1 else ''}"
        lines.append((f"{kind}, {steps}", str(row["passes"]), *_figures(row), f"{row['seconds']:.2f}"))
    promises = [f"- {'reached' if v['reached'] else '**not reached**'}: {v['promise']} ({v['found']})"
                for v in report["verdicts"]]  # fmt: skip
    return MEASURED.format(
        count=report["count"], model=report["model"], judged=judge["count"], seeds=judge["seeds"],
        size=report["features"]["size"], wall=judge["wall"], crack=judge["crack"], direction=judge["direction"],
        named=right["wall"], turned=right["direction"], error=(0.95 * 0.05 / report["count"]) ** 0.5,
        machine=f"{machine['threads']} thread{'s' * (machine['threads'] > 1)} of {machine['processor']}, "
        f"device {machine['device']}, load "
        f"{machine['load']} before (torch {machine['torch']}, diffusers {machine['diffusers']})",
        table=table(("", "UNet passes", *COLUMNS, "seconds"), lines),
        nights=_nights(report["nights"]) if "nights" in report else "",
        alone=report["seconds"]["alone"], together=report["seconds"]["together"], verdicts="\n".join(promises),
    )  # fmt: skip


def _figures(row: dict[str, Any]) -> list[str]:
    return ["-" if row[name] is None else f"{row[name]:.{2 if name in COARSE else 3}f}" for name in COLUMNS]


def _missed(report: dict[str, Any]) -> list[str]:
    missed = [f"{line['promise']}: {line['found']}" for line in report["verdicts"] if not line["reached"]]
    return [f"Not reached: {line}." for line in missed]


def _parts(folder: Path) -> str:
    lines = []
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            slices = [file.get_slice(key) for key in file.keys()]  # noqa: SIM118 - not a dict
            count = sum(_product(one.get_shape()) for one in slices)
            kinds = sorted({one.get_dtype() for one in slices})
        size = f"{path.stat().st_size / 1e6:.1f} MB"
        lines.append((str(path.relative_to(folder)), f"{count / 1e6:.2f} M", f"{', '.join(kinds)}, {size}"))
    return table(("file", "weights", "stored"), lines)


def _product(shape: Sequence[int]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    all_lines = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in all_lines)


def main(arguments: list[str] | None = None) -> int:
    """Write the card; 1 and a reason when something is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model_card")
    parser.add_argument(
        "--report", type=Path, help=f"of benchmarks.crack_tiny (default: {REPORT}); alone: in the card there is"
    )
    parser.add_argument("--model", type=Path, default=CRACK_TINY)
    parser.add_argument("--settings", type=Path, help="settings.json of the training")
    parser.add_argument("--honed", type=Path, help="hone-settings.json of what went on from there")
    parser.add_argument("--style", type=Path, help="style-settings.json of the style's training")
    parser.add_argument("--log", type=Path, action="append", help="logs in order, repeat")
    parser.add_argument("--hardware")
    parser.add_argument("--control", type=Path, help="report of benchmarks.control; alone: only its section is written")
    parser.add_argument("--note", action="append", default=[], help="a limit that figures do not show, repeat")
    parser.add_argument("--docs", type=Path, help="where contact sheets go")
    given = parser.parse_args(arguments)
    trained = given.log and given.hardware
    whole, honed = trained and given.settings, trained and given.honed
    part = honed or not (given.settings or given.honed or given.log or given.hardware)
    if not whole and not (part and (honed or given.control or given.report)):
        parser.error(
            "a card needs --settings, --log and --hardware; --honed with --log and --hardware, --report or --control "
            "write their sections into the card there is"
        )
    try:
        text = (given.model / "README.md").read_text("utf-8") if not whole else ""
        path = given.report or REPORT
        if whole:
            made = record(given.settings, given.log, given.hardware, given.style, given.note)
            text = card(json.loads(path.read_text("utf-8")), made, given.model)
        elif given.report:
            text = with_measured(text, json.loads(path.read_text("utf-8")), given.model, [] if honed else given.note)
        if honed:
            made = record(given.honed, given.log, given.hardware, given.style, given.note)
            text = with_honing(text, made)
        if given.control:
            text = with_control(text, json.loads(given.control.read_text("utf-8")), given.model)
        text = with_files(text, given.model)
        (given.model / "README.md").write_text(text, "utf-8")
        for name, target in SHEETS.items() if given.docs else ():
            if (path.parent / name).exists():
                Image.open(path.parent / name).save(given.docs / target, quality=82, method=6)
    except (BadRecord, OSError) as error:
        sys.stderr.write(f"no card: {error}\n")
        return 1
    sys.stdout.write(f"{given.model / 'README.md'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
