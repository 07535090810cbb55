"""How well does `crack-tiny` do what a prompt says, and what do LCM-LoRA's few steps cost?

    python -m benchmarks.crack_tiny [--out DIR] [--count 500] [--model FOLDER] [--row NAME]... [--device cpu]

An analyser reads walls and cracks from pixels; it is judged on painted pictures first and the program stops if it
reads them badly. Then 500 pictures for each row of the table, with prompts and seeds that were never trained on, and
contact sheets. Everything is kept in DIR/MODEL-HASH piece by piece: the same command goes on after a stop, a smaller
`--count` is the beginning of a larger one, and another LCM-LoRA has the teacher's pictures already. Needs torch,
diffusers, transformers, peft, numpy and Pillow. `python -m benchmarks.model_card` turns the report into the model's
README.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import analyser, features, prompts, sheets
from benchmarks.geometry import CRACK_TINY
from benchmarks.prompts import Asked
from benchmarks.stock import TOGETHER, Renderer, Way, model_key, style_of
from benchmarks.verdicts import verdicts

PIECE = 32
"""Pictures rendered between two savings."""
SEED = 70_000
ON_SHEET = 64
STYLES = (0.0, 0.5, 1.0)
Pictures = NDArray[np.uint8]


def table(guidance: float) -> list[Way]:
    """Every row, the cheapest first. `guidance` is what the model's profile recommends without LCM-LoRA."""
    ways = [Way(True, steps) for steps in (1, 2, 4, 8)]
    ways += [Way(False, steps, scale) for steps in (2, 4, 8, 25, 50) for scale in (1.0, guidance)]
    return sorted(ways, key=lambda way: (way.passes, not way.lcm))


@dataclass
class Pace:
    """How long pictures take: seconds for a UNet pass and for everything else, eight pictures together."""

    each_pass: float
    rest: float
    left: dict[str, float] = field(default_factory=dict)

    def expect(self, way: Way, pictures: int) -> None:
        self.left[way.name] = pictures * (way.passes * self.each_pass + self.rest)

    def done(self, way: Way, pictures: int, seconds: float) -> None:
        """Correct what is expected by what was found."""
        ratio = seconds / (pictures * (way.passes * self.each_pass + self.rest))
        self.each_pass *= 0.7 + 0.3 * ratio
        self.rest *= 0.7 + 0.3 * ratio
        for name in self.left:
            self.left[name] *= 0.7 + 0.3 * ratio

    @property
    def eta(self) -> str:
        minutes = sum(self.left.values()) / 60
        return f"{minutes:.0f} min left" if minutes >= 1 else "less than a minute left"


@dataclass
class Bench:
    """One model, one list of prompts, and the folders where their pictures are kept: `teacher` has what does not depend
    on the LCM-LoRA."""

    renderer: Renderer
    folder: Path
    teacher: Path
    pace: Pace

    def place(self, way: Way) -> Path:
        return self.folder if way.lcm else self.teacher

    def pictures(self, way: Way, asked: list[Asked], series: str) -> Pictures:
        """The pictures of a row, rendered where they are not there yet."""
        parts = []
        for start in range(0, len(asked), PIECE):
            part = asked[start : start + PIECE]
            made, fresh = self._piece(way, part, self.place(way) / series / way.name / f"{start:05}.npz")
            parts.append(made)
            self.pace.expect(way, len(asked) - start - len(part))
            if fresh:
                self.pace.done(way, len(part), fresh)
                done = f"{start + len(part)}/{len(asked)}"
                say(f"{way.name}: {done} pictures, {fresh / len(part):.2f} s each; {self.pace.eta}")
        self.pace.left.pop(way.name, None)
        return np.concatenate(parts)

    def _piece(self, way: Way, asked: list[Asked], path: Path) -> tuple[Pictures, float]:
        wanted = prompts.digest(asked)
        if path.exists():
            with np.load(path) as kept:
                if str(kept["prompts"]) == wanted:
                    return kept["pictures"], 0.0
        started = time.perf_counter()
        made, _ = self.renderer.render([one.text for one in asked], [one.seed for one in asked], way)
        fresh = time.perf_counter() - started
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_suffix(".part.npz")
        np.savez_compressed(half, pictures=made, prompts=wanted)
        half.replace(path)
        return made, fresh


@dataclass
class Judge:
    """Everything that is measured on a set of pictures, against painted pictures of the same scenes."""

    eye: features.Eye
    asked: list[Asked]
    painted: Pictures
    name: str

    def __post_init__(self) -> None:
        self.seen = features.look(self.eye, self.painted)
        self.sharp = features.sharpness(self.painted)

    def __call__(self, pictures: Pictures) -> dict[str, Any]:
        scenes = [one.scene for one in self.asked]
        seen = [analyser.read(one) for one in pictures]
        return {
            **analyser.rates(seen, scenes),
            "rising": analyser.rising(seen, scenes),
            "bent": analyser.bent(seen, scenes),
            "distance": features.distance(features.look(self.eye, pictures), self.seen),
            "sharpness": round(features.sharpness(pictures) / self.sharp, 3),
        }


def judged(bench: Bench, way: Way, judge: Judge) -> dict[str, Any]:
    """One row of the table, kept as JSON as long as model, prompts and judges stay the same."""
    path = bench.place(way) / "rows" / f"{way.name}-{len(judge.asked)}.json"
    if path.exists():
        row: dict[str, Any] = json.loads(path.read_text("utf-8"))
        if row["judge"] == judge.name:
            bench.pace.left.pop(way.name, None)
            return row
    row = {
        "lcm": way.lcm, "steps": way.steps, "guidance": way.guidance, "passes": way.passes,
        **judge(bench.pictures(way, judge.asked, "table")), "judge": judge.name,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(row, indent=2) + "\n", "utf-8")
    return row


def judge_name(asked: list[Asked], eye: str) -> str:
    """What a kept row depends on beside the model: judges, prompts, feature space."""
    source = Path(analyser.__file__).read_bytes()
    return f"{sha256(source).hexdigest()[:8]}-{prompts.digest(asked)[:8]}-{eye}"


def timing(renderer: Renderer, asked: list[Asked], rounds: int = 5) -> tuple[dict[str, float], Pace]:
    """Median seconds of one picture alone and of each of eight together, measured in turns after a warm-up."""
    texts, seeds = [one.text for one in asked], [one.seed for one in asked]
    took: dict[str, list[float]] = {"alone": [], "together": [], "one step": []}
    for number in range(rounds + 1):
        found = {
            "alone": renderer.render(texts[:1], seeds[:1], Way(True, 4))[1],
            "together": renderer.render(texts[:TOGETHER], seeds[:TOGETHER], Way(True, 4))[1],
            "one step": renderer.render(texts[:TOGETHER], seeds[:TOGETHER], Way(True, 1))[1],
        }
        for name, seconds in found.items():
            took[name] += seconds if number else []
    median = {name: float(np.median(seconds)) for name, seconds in took.items()}
    each = max((median["together"] - median["one step"]) / 3, 1e-4)
    pace = Pace(each, max(median["one step"] - each, 1e-4))
    return {"alone": round(median["alone"], 4), "together": round(median["together"], 4)}, pace


def paces(renderer: Renderer, asked: list[Asked], ways: list[Way], rounds: int = 2) -> dict[str, float]:
    """Seconds a picture of each row takes, one of eight together: the quickest of some rounds through all rows.

    Pictures may be kept from another day or machine; what they took is found anew, all rows side by side.
    """
    texts, seeds = [one.text for one in asked[:TOGETHER]], [one.seed for one in asked[:TOGETHER]]
    took: dict[str, list[float]] = {way.name: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            took[way.name] += renderer.render(texts, seeds, way)[1]
    return {name: round(min(seconds), 4) for name, seconds in took.items()}


def machine(device: str) -> dict[str, Any]:
    """Where the figures come from."""
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    found: dict[str, Any] = {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "python": platform.python_version(),
    }
    return found | {name: version(name) for name in ("torch", "diffusers", "transformers", "peft", "numpy", "pillow")}


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text("utf-8").splitlines() if path.exists() else []


def draw_sheets(bench: Bench, out: Path, ways: list[Way], asked: list[Asked]) -> dict[float, Pictures]:
    """Sheets to look at: random prompts and the demo's sentences by style weight; the same prompts by row.

    Returns the pictures of the random prompts, by style weight.
    """
    style = style_of(bench.renderer.folder)
    mark = sha256(style.read_bytes()).hexdigest()[:8] if style else ""
    demo = [Asked(text, asked[0].scene, 1 + k) for text in prompts.DEMO for k in range(8)]
    rows, styled = [], {}
    for weight in STYLES if style else STYLES[:1]:
        way = Way(True, 4, style=weight)
        made = styled[weight] = bench.pictures(way, asked[:ON_SHEET], f"style-{mark}" if weight else "table")
        sheets.grid(made, out / f"crack_tiny_prompts{f'_style_{weight:g}' if weight else ''}.png")
        made = bench.pictures(way, demo, f"demo-{mark}")
        rows += [(made[at : at + 8], f"style {weight:g}" if at == 0 else "") for at in range(0, len(made), 8)]
    sheets.labelled(rows, out / "crack_tiny_demo.png")
    steps = [(bench.pictures(way, asked[:PIECE], "table")[:8], f"{way.name}, {way.passes} passes") for way in ways]
    sheets.labelled(steps, out / "crack_tiny_steps.png")
    texts = [f"{k // 8 + 1}.{k % 8 + 1} {one.text}" for k, one in enumerate(asked[:ON_SHEET])]
    (out / "crack_tiny_prompts.txt").write_text("\n".join(texts) + "\n", "utf-8")
    return styled


def nights(styled: Mapping[float, Pictures], painted: Pictures) -> dict[str, Any]:
    """How bright pictures are at each style weight, and painted ones by night: means of all pixels, 0 to 1.

    `bright` is the share of pictures at the greatest weight that are brighter than 19 of 20 painted nights.
    """
    light = {weight: pictures.mean((1, 2, 3)) / 255 for weight, pictures in styled.items()}
    dark = painted.mean((1, 2, 3)) / 255
    return {
        "count": len(painted),
        "painted": round(float(dark.mean()), 3),
        "weights": {f"{weight:g}": round(float(values.mean()), 3) for weight, values in light.items()},
        "bright": round(float((light[max(light)] > np.quantile(dark, 0.95)).mean()), 3),
    }


def say(text: str) -> None:
    print(text, flush=True)


def shelves(out: Path, model: Path, seed: int, device: str) -> tuple[Path, Path]:
    """Where the pictures of a model are kept, and those of its teacher. What another kind of device drew is not
    this one's."""
    end = f"{seed}" if device == "cpu" else f"{seed}-{device}"
    return out / f"{model_key(model)}-{end}", out / f"teacher-{model_key(model, lcm=False)}-{end}"


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The whole report; raises WeakAnalyser before anything is rendered."""
    report: dict[str, Any] = {"analyser": {"count": 500, "seeds": len(analyser.SEEDS), **analyser.check(500)}}
    say(f"analyser on painted pictures, the least of each seed's rates: {report['analyser']}")
    key = model_key(options.model)
    asked = prompts.prompts(options.count, options.seed)
    eye, eye_name = features.open_eye(options.out, say)
    judge = Judge(eye, asked, prompts.painted(asked, 0), judge_name(asked, eye_name))
    profile = json.loads((options.model / "profile.json").read_text("utf-8"))
    guidance = float(profile["teacher_guidance_scale"])
    ways = [way for way in table(guidance) if not options.row or way.name in options.row]
    renderer = Renderer(options.model, options.device)
    seconds, pace = timing(renderer, asked)
    for way in ways:
        pace.expect(way, len(asked))
    bench = Bench(renderer, *shelves(options.out, options.model, options.seed, options.device), pace)
    say(f"model {key}, {len(ways)} rows of {len(asked)} pictures: at most {pace.eta}")
    other = prompts.painted(asked, 1)
    report |= {
        "model": key, "count": len(asked), "seed": options.seed, "guidance": guidance,
        "machine": machine(options.device), "seconds": seconds,
        "features": {"name": eye_name, "size": features.WIDTH, "right": features.accuracy(eye)},
        "painted": judge(other), "autoencoder": judge(renderer.reconstruct(other)), "rows": {},
    }  # fmt: skip
    each = paces(renderer, asked, ways)
    for way in ways:
        row = {k: v for k, v in judged(bench, way, judge).items() if k != "judge"}
        report["rows"][way.name] = {**row, "seconds": each[way.name]}
        say(f"{way.name}: {report['rows'][way.name]}")
        report["verdicts"] = verdicts(report)
        (options.out / "crack_tiny.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    sheet = prompts.prompts(max(options.count, ON_SHEET), options.seed)
    styled = draw_sheets(bench, options.out, ways, sheet)
    if len(styled) > 1:
        report["nights"] = nights(styled, prompts.painted_nights(sheet[:ON_SHEET]))
        say(f"nights: {report['nights']}")
        (options.out / "crack_tiny.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    return report


def main(arguments: list[str] | None = None) -> int:
    """0 when every figure promised is reached, 1 when one is not, 2 when the analyser may not judge."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.crack_tiny")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"))
    parser.add_argument("--model", type=Path, default=CRACK_TINY)
    parser.add_argument("--count", type=int, default=500, help="pictures in a row, 8 or more")
    parser.add_argument("--seed", type=int, default=SEED, help="of prompts and pictures")
    parser.add_argument("--row", action="append", default=[], choices=[way.name for way in table(3.0)])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    if options.count < TOGETHER:
        parser.error(f"--count must be at least {TOGETHER}, not {options.count}")
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        report = run(options)
    except analyser.WeakAnalyser as error:
        sys.stderr.write(f"{error}\n")
        return 2
    for line in report["verdicts"]:
        say(f"{'yes' if line['reached'] else 'NO '}  {line['promise']}: {line['found']}")
    return 0 if all(line["reached"] for line in report["verdicts"]) else 1


if __name__ == "__main__":
    sys.exit(main())
