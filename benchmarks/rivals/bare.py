"""The bare loop: diffusers, LCM-LoRA fused, micro-batches of one size, pictures to disk. No queue, no storage, no farm.

    python benchmarks/rivals/bare.py ORDERS      (benchmarks/rendering.py writes the orders and runs this)

Tries its settings on a few pictures first (threads, memory layout, VAE one picture at a time), renders the orders with
the best ones, and prints the seconds as JSON. The text chunks of the PNGs are made before the clock runs.
"""

import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import LCMScheduler, StableDiffusionPipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo

TRIAL_BATCHES = 2


def load(folder: str) -> Any:
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, torch_dtype=torch.float32)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe.load_lora_weights(folder, weight_name="lcm-lora.safetensors")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tune(pipe: Any, threads: int, layout: torch.memory_format, slicing: bool) -> None:
    torch.set_num_threads(threads)
    pipe.unet.to(memory_format=layout)
    pipe.vae.to(memory_format=layout)
    if slicing:
        pipe.vae.enable_slicing()
    else:
        pipe.vae.disable_slicing()


def info(chunks: dict[str, str]) -> PngInfo:
    made = PngInfo()
    for key, text in chunks.items():
        made.add_text(key, text)
    return made


def render(pipe: Any, jobs: Sequence[dict[str, Any]], orders: dict[str, Any], infos: Sequence[PngInfo]) -> float:
    """Seconds for all jobs, written to the folder in the orders."""
    out, size = Path(orders["out"]), orders["micro_batch"]
    start = time.perf_counter()
    for first in range(0, len(jobs), size):
        some = jobs[first : first + size]
        pictures = pipe(
            [job["prompt"] for job in some],
            num_inference_steps=orders["steps"],
            guidance_scale=1.0,
            width=orders["side"],
            height=orders["side"],
            generator=[torch.Generator("cpu").manual_seed(job["seed"]) for job in some],
        ).images
        for number, picture in enumerate(pictures, first):
            picture.save(out / f"{number}.png", compress_level=orders["png_compress_level"], pnginfo=infos[number])
            # As the farm does: a picture that is no larger than a thumbnail is its own.
            if max(picture.size) > orders["thumbnail_pixels"]:
                picture.thumbnail((orders["thumbnail_pixels"],) * 2, Image.Resampling.LANCZOS, reducing_gap=2.0)
                picture.save(out / f"{number}.webp", quality=80, method=1)
    return time.perf_counter() - start


def main() -> None:
    orders = json.loads(Path(sys.argv[1]).read_text())
    pipe = load(orders["model"])
    jobs, infos = orders["jobs"], [info(chunks) for chunks in orders["texts"]]
    some = TRIAL_BATCHES * orders["micro_batch"]
    settings = orders.get("settings")
    choices = [settings] if settings else list(itertools.product(orders["threads"], ("plain", "last"), (False, True)))
    layouts = {"plain": torch.contiguous_format, "last": torch.channels_last}

    def trial(choice: Sequence[Any]) -> float:
        threads, layout, slicing = choice
        tune(pipe, threads, layouts[layout], slicing)
        return render(pipe, jobs[:some], orders, infos)

    with torch.inference_mode():
        for choice in choices:
            trial(choice)
        best = choices[0] if len(choices) == 1 else min(choices, key=trial)
        tune(pipe, best[0], layouts[best[1]], best[2])
        before = time.process_time()
        seconds = render(pipe, jobs, orders, infos) if orders["measure"] else 0.0
    used = time.process_time() - before
    print(json.dumps({"seconds": seconds, "processor_seconds": used, "settings": list(best)}))


if __name__ == "__main__":
    main()
