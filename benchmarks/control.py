"""Do rendered cracks run where the mask has them?

    python -m benchmarks.control [--model FOLDER] [--control FOLDER] [--count 100] [--out FILE.json]

Masks that nobody trained on are painted, followed by the model with its LCM-LoRA through the farm's own engine, and
found again by the analyser, which knows neither. Precision: the share of crack pixels found that lie within
`--tolerance` pixels of the mask. Recall: the share of the mask's pixels with a found one as near. Beside it the same
for the painter's own pictures (what the analyser can find at best) and without the ControlNet (what chance finds).
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import SecretStr

import workers  # noqa: F401  # forbids remote code before diffusers is imported
from benchmarks.analyser import read_crack
from benchmarks.geometry import CRACK_TINY
from benchmarks.stock import model_key
from farm.painter import caption, paint, sample_scene
from farm.recipe import Recipe
from farm.settings import Settings
from workers.pipelines.engine import Engine

SIDE = 128
SEED = 4_711
"""Far from every seed that training paints with."""
TOGETHER = 8

Mask = NDArray[np.bool_]
Picture = NDArray[np.uint8]


def near(mask: Mask, tolerance: int) -> Mask:
    """Every pixel within `tolerance` pixels of the mask, as the crow flies.

    >>> near(np.array([[False, False, False, True]]), 2).tolist()
    [[False, True, True, True]]
    """
    height, width = mask.shape
    wide = np.pad(mask, tolerance)
    found = np.zeros_like(mask)
    for down in range(-tolerance, tolerance + 1):
        for right in range(-tolerance, tolerance + 1):
            if down**2 + right**2 <= tolerance**2:
                top, left = tolerance + down, tolerance + right
                found |= wide[top : top + height, left : left + width]
    return found


def alignment(found: Sequence[Mask], meant: Sequence[Mask], tolerance: int) -> dict[str, float | None]:
    """Precision, recall and their harmonic mean over all pixels of these pictures; None where there is nothing.

    `seen` is the share of pictures with a crack in which any was found.
    """
    hit = sum(int((one & near(mask, tolerance)).sum()) for one, mask in zip(found, meant, strict=True))
    met = sum(int((mask & near(one, tolerance)).sum()) for one, mask in zip(found, meant, strict=True))
    precision = _share(hit, sum(int(one.sum()) for one in found))
    recall = _share(met, sum(int(mask.sum()) for mask in meant))
    both = None
    if precision is not None and recall is not None and precision + recall > 0:
        both = round(2 * precision * recall / (precision + recall), 4)
    cracked = [one.any() for one, mask in zip(found, meant, strict=True) if mask.any()]
    return {"precision": precision, "recall": recall, "f1": both, "seen": _share(sum(cracked), len(cracked))}


def _share(part: int, whole: int) -> float | None:
    return round(int(part) / int(whole), 4) if whole else None


def rendered(
    engine: Engine, texts: Sequence[str], masks: Sequence[Mask], options: argparse.Namespace, *, controlled: bool
) -> list[Picture]:
    """One picture for each mask, following it or not; the same words and seeds either way."""
    pictures: list[Picture] = []
    for start in range(0, len(texts), TOGETHER):
        places = range(start, min(start + TOGETHER, len(texts)))
        sources: Mapping[str, Picture] = {f"{place:064x}": as_picture(masks[place]) for place in places}
        recipes = [
            Recipe.model_validate(
                {
                    "prompt": texts[place], "seed": SEED + place, "width": SIDE, "height": SIDE,
                    "steps": options.steps, "guidance_scale": 1.0, "scheduler": "lcm", "checkpoint": "model",
                    "acceleration": {"hash": "lcm", "weight": 1.0},
                    "controls": [
                        {"hash": "control", "image": f"{place:064x}", "weight": options.weight}
                    ] if controlled else None,
                }
            )
            for place in places
        ]  # fmt: skip
        made = engine.render(engine.stage(recipes, sources), recipes, lambda _done, _steps: ())
        pictures += [picture for picture in made if picture is not None]
    return pictures


def net_key(folder: Path) -> str:
    """A hash over the ControlNet's weights, as `model_key` is over its model's."""
    return hashlib.sha256((folder / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()[:16]


def as_picture(mask: Mask) -> Picture:
    """A mask as it is uploaded: white cracks on black."""
    return np.repeat((mask * np.uint8(255))[:, :, None], 3, axis=2)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Paint, render, look; everything that was measured."""
    rng = np.random.default_rng(SEED)
    scenes = [scene for scene in (sample_scene(rng) for _ in range(8 * options.count + 64)) if scene.cracked]
    scenes = scenes[: options.count]
    painted = [paint(scene, SIDE, SIDE, 7_000_000_000 + number) for number, scene in enumerate(scenes)]
    masks = [one.mask for one in painted]
    texts = [caption(scene, rng) for scene in scenes]
    places = {"model": options.model, "control": options.control, "lcm": options.model / "lcm-lora.safetensors"}
    engine = Engine(_settings(), places.__getitem__)
    began = time.perf_counter()
    followed = rendered(engine, texts, masks, options, controlled=True)
    seconds = time.perf_counter() - began
    free = rendered(engine, texts, masks, options, controlled=False)
    looks = {"painted": [one.picture for one in painted], "with control": followed, "without": free}
    found = {name: [read_crack(picture) for picture in pictures] for name, pictures in looks.items()}
    return {
        "model": model_key(options.model),
        "control": net_key(options.control),
        "pictures": len(scenes),
        "steps": options.steps,
        "weight": options.weight,
        "tolerance": options.tolerance,
        "seconds": round(seconds, 1),
        "alignment": {name: alignment(cracks, masks, options.tolerance) for name, cracks in found.items()},
    }


def _settings() -> Settings:
    """Of a worker that talks to no server."""
    return Settings(
        environment="development",
        database_url=SecretStr("postgresql://farm:farm@nowhere/farm"),
        redis_url=SecretStr("redis://:farm@nowhere/0"),
        device="cpu",
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.control")
    parser.add_argument(
        "--model", type=Path, default=CRACK_TINY, help="folder with the model and its lcm-lora.safetensors"
    )
    parser.add_argument("--control", type=Path, help="folder of the ControlNet (default: MODEL/control-mask)")
    parser.add_argument("--count", type=int, default=100, help="masks to follow")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--weight", type=float, default=1.0)
    parser.add_argument("--tolerance", type=int, default=3, help="pixels")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    options = parser.parse_args(arguments)
    options.control = options.control or options.model / "control-mask"
    measured = run(options)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_bytes(orjson.dumps(measured, option=orjson.OPT_INDENT_2))
    print(f"{measured['pictures']} masks, {options.steps} steps, within {options.tolerance} pixels")
    print(f"{'':14}{'precision':>10}{'recall':>10}{'f1':>10}{'seen':>10}")
    for name, rates in measured["alignment"].items():
        print(f"{name:14}" + "".join(f"{'-' if rate is None else rate:>10}" for rate in rates.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
