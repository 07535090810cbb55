"""How well does `crack-tiny` do what a prompt says?

    python benchmarks/crack_tiny.py --out benchmarks/out [--count 100] [--model FOLDER]

An analyser reads wall colour, crack presence and crack direction from pixels alone. It knows
neither the painter's parameters nor the model; its own scores on painted pictures come first.
Writes `crack_tiny.json` and two contact sheets.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from farm.painter import paint, sample_scene

DEMO = (
    "A single split crack on a concrete wall",
    "Sunlight shining on an outdoor concrete wall with split cracks",
    "Vertically split cracks on an old yellow painted concrete wall",
    "Water draining down next to a cracked concrete wall",
)
MODEL = Path(__file__).parent.parent / "farm" / "assets" / "crack-tiny"
Picture = NDArray[np.uint8]
Plane = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Seen:
    """What the analyser reads: `direction` is "none" where it sees no crack."""

    wall: str
    direction: str


def read_wall(picture: Picture) -> str:
    """The wall by the colour of its better lit half."""
    rgb = picture.reshape(-1, 3) / 255.0
    bright = rgb.sum(axis=1)
    lit = rgb[(bright >= np.quantile(bright, 0.5)) & (bright <= np.quantile(bright, 0.97))]
    red, green, blue = np.median(lit, axis=0)
    top, low = max(red, green, blue), min(red, green, blue)
    vivid = (top - low) / max(top, 1e-6)
    # Share of clearly red pixels: mortar would hide the bricks from a median.
    reddish = float(np.mean((rgb[:, 0] > 1.45 * rgb[:, 1]) & (rgb[:, 0] > 1.5 * rgb[:, 2])))
    if reddish > 0.35:
        return "brick"
    if vivid > 0.28 and blue == top:
        return "blue"
    if vivid > 0.42 and blue == low and green > 0.6 * red:
        return "yellow"
    # White under a blue sky is darker than grey in the sun; the cast tells which light it is.
    cast = blue / max(red, 1e-6)
    limit = 0.47 if cast > 1.1 else 0.93 if cast < 0.9 else 0.77
    return "white" if top > limit else "concrete"


def _smooth(plane: Plane) -> Plane:
    padded = np.pad(plane, 1, mode="edge")
    h, w = plane.shape
    parts = [padded[y : y + h, x : x + w] for y in range(3) for x in range(3)]
    return np.asarray(np.mean(parts, axis=0))


def dark_lines(picture: Picture, reach: int = 5, ratio: float = 0.72) -> NDArray[np.bool_]:
    """Pixels much darker than the wall on both of two opposite sides, in any of four directions."""
    grey = picture.astype(np.float64).mean(axis=2) + 4.0
    wide = np.pad(_smooth(grey), reach, mode="reflect")
    h, w = grey.shape

    def moved(y: int, x: int) -> Plane:
        return np.asarray(wide[reach + y : reach + y + h, reach + x : reach + x + w])

    found = np.zeros((h, w), bool)
    slant = max(round(reach * 0.7), 1)
    for y, x in ((0, reach), (reach, 0), (slant, slant), (slant, -slant)):
        found |= grey < ratio * np.minimum(moved(y, x), moved(-y, -x))
    return found


def components(mask: NDArray[np.bool_]) -> list[NDArray[np.int64]]:
    """Groups of touching pixels (a gap of one pixel still touches), largest first."""
    left = {(int(y), int(x)) for y, x in zip(*np.nonzero(mask), strict=True)}
    near = [(y, x) for y in range(-2, 3) for x in range(-2, 3)]
    groups = []
    while left:
        stack = [left.pop()]
        group = list(stack)
        while stack:
            y, x = stack.pop()
            for dy, dx in near:
                place = (y + dy, x + dx)
                if place in left:
                    left.remove(place)
                    stack.append(place)
                    group.append(place)
        groups.append(np.array(group))
    return sorted(groups, key=len, reverse=True)


def read_direction(picture: Picture) -> str:
    """The direction of the long dark lines together, or "none" if no line is long."""
    side = min(picture.shape[:2])
    turn, total = 0j, 0.0
    for group in components(dark_lines(picture)):
        spread = np.ptp(group, axis=0)
        length = float(np.hypot(*spread))
        if length < 0.27 * side or len(group) > 0.25 * length * side:
            continue
        _, values, axes = np.linalg.svd(group - group.mean(axis=0), full_matrices=False)
        if values[1] > 0.75 * values[0]:
            continue
        along = complex(axes[0][1], axes[0][0])
        # Doubling the angle makes opposite headings equal.
        turn += length**2 * (along / abs(along)) ** 2
        total += length**2
    if total == 0.0:
        return "none"
    angle = abs(np.degrees(np.angle(turn)) / 2)
    return "horizontal" if angle < 22.5 else "vertical" if angle > 67.5 else "diagonal"


def read(picture: Picture) -> Seen:
    """Everything the analyser can say about a picture (uint8, height, width, 3)."""
    return Seen(read_wall(picture), read_direction(picture))


def rates(seen: list[Seen], meant: list[Seen]) -> dict[str, float]:
    """Shares read as meant: wall, crack present or absent, direction of cracks that were meant."""
    pairs = list(zip(seen, meant, strict=True))
    turned = [(s, m) for s, m in pairs if m.direction != "none"]
    return {
        "wall": round(float(np.mean([s.wall == m.wall for s, m in pairs])), 3),
        "crack": round(float(np.mean([(s.direction == "none") == (m.direction == "none") for s, m in pairs])), 3),
        "direction": round(float(np.mean([s.direction == m.direction for s, m in turned])), 3),
    }


def prompts(count: int, seed: int) -> list[tuple[str, Seen]]:
    """Prompts in words of this benchmark, with what they mean; one in eight asks for no crack."""
    rng = np.random.default_rng(seed)
    walls = {
        "concrete": "grey concrete wall",
        "yellow": "yellow painted wall",
        "white": "white painted wall",
        "brick": "red brick wall",
        "blue": "blue painted wall",
    }
    made = []
    for i in range(count):
        wall = list(walls)[i % 5]
        light = ("", "", " in sunlight", " in the shade")[int(rng.integers(4))]
        if i % 8 == 7:
            made.append((f"A {walls[wall]} without cracks{light}", Seen(wall, "none")))
            continue
        way = ("vertical", "horizontal", "diagonal")[int(rng.integers(3))]
        width = ("wide", "thin")[int(rng.integers(2))]
        form = ("crack", "split crack", "branching crack")[int(rng.integers(3))]
        made.append((f"A {width} {way} {form} on a {walls[wall]}{light}", Seen(wall, way)))
    return made


def painted_scores(count: int, seed: int = 99) -> dict[str, float]:
    """The analyser's own scores, on painted pictures with thin or wide cracks."""
    rng = np.random.default_rng(seed)
    seen, meant = [], []
    while len(seen) < count:
        scene = sample_scene(rng)
        if scene.width != "hairline":
            seen.append(read(paint(scene, 128, 128, 5_000_000 + len(seen)).picture))
            meant.append(Seen(scene.wall, scene.direction))
    return rates(seen, meant)


class Renderer:
    """The model as stock diffusers runs it, with or without its LCM-LoRA."""

    def __init__(self, folder: Path) -> None:
        import torch
        from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline

        self._torch = torch
        self._pipe = StableDiffusionPipeline.from_pretrained(folder)
        self._pipe.set_progress_bar_config(disable=True)
        self._pipe.load_lora_weights(folder, weight_name="lcm-lora.safetensors")
        self._teacher = DDIMScheduler.from_config(self._pipe.scheduler.config)
        self._fast = LCMScheduler.from_config(self._pipe.scheduler.config)

    def render(
        self, texts: list[str], *, lcm: bool, steps: int, guidance: float, seed: int
    ) -> tuple[list[Picture], float]:
        """Pictures and seconds per picture; each picture has a generator of its own."""
        pipe = self._pipe
        pipe.scheduler = self._fast if lcm else self._teacher
        (pipe.enable_lora if lcm else pipe.disable_lora)()
        pictures: list[Picture] = []
        started = time.monotonic()
        for at in range(0, len(texts), 8):
            part = texts[at : at + 8]
            seeds = [self._torch.Generator().manual_seed(seed + at + k) for k in range(len(part))]
            made = pipe(
                part,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=seeds,
                output_type="np",
            ).images
            pictures.extend((made * 255).round().astype(np.uint8))
        return pictures, (time.monotonic() - started) / len(texts)


def sheet(pictures: list[Picture], path: Path, columns: int = 8) -> None:
    """A contact sheet as PNG."""
    blank = np.zeros_like(pictures[0])
    pictures = pictures + [blank] * (-len(pictures) % columns)
    rows = [np.concatenate(pictures[i : i + columns], 1) for i in range(0, len(pictures), columns)]
    Image.fromarray(np.concatenate(rows)).save(path)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"))
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--count", type=int, default=96)
    parser.add_argument("--seed", type=int, default=70_000)
    parser.add_argument("--short", action="store_true", help="only LCM-LoRA at 4 steps")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"analyser on painted pictures": painted_scores(500)}
    print("analyser", report["analyser on painted pictures"], flush=True)
    asked = prompts(options.count, options.seed)
    texts, meant = [t for t, _ in asked], [m for _, m in asked]
    renderer = Renderer(options.model)
    runs = [(True, 4, 1.0)]
    if not options.short:
        runs += [(True, n, 1.0) for n in (1, 2, 8)]
        runs += [(False, 2, 3.0), (False, 4, 1.0), (False, 4, 3.0), (False, 25, 3.0)]
    for lcm, steps, guidance in runs:
        name = f"{'LCM-LoRA' if lcm else 'DDIM'} {steps} steps, guidance {guidance:g}"
        made, seconds = renderer.render(texts, lcm=lcm, steps=steps, guidance=guidance, seed=options.seed)
        scores = rates([read(p) for p in made], meant)
        report[name] = {
            **scores,
            "passes": steps * (2 if guidance > 1 else 1),
            "seconds": round(seconds, 3),
        }
        print(name, report[name], flush=True)
        if lcm and steps == 4:
            sheet(made[:64], options.out / "crack_tiny_prompts.png")
    demo = [t for t in DEMO for _ in range(8)]
    made, _ = renderer.render(demo, lcm=True, steps=4, guidance=1.0, seed=1)
    sheet(made, options.out / "crack_tiny_demo.png")
    alone = [renderer.render(list(DEMO[:1]), lcm=True, steps=4, guidance=1.0, seed=1)[1] for _ in range(5)]
    eight = [renderer.render(demo[:8], lcm=True, steps=4, guidance=1.0, seed=1)[1] for _ in range(3)]
    report["seconds, one alone"] = round(float(np.median(alone)), 3)
    report["seconds each, eight together"] = round(float(np.median(eight)), 3)
    print(report["seconds, one alone"], report["seconds each, eight together"])
    (options.out / "crack_tiny.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
