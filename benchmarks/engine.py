"""What each of the engine's measures brings, from plain diffusers upwards, on one device.

    python -m benchmarks.engine --model sd15 --micro-batch 1 8 16        # a GPU; also: --model sdxl
    python -m benchmarks.engine --model crack-tiny --micro-batch 1 8     # a CPU
    python -m benchmarks.engine --model sdxl --part slots swap           # the rest of the ladder left out
    python -m benchmarks.engine --model crack-tiny --part slots --micro-batch 8 --repeats 9 --processor-time

Needs torch, diffusers, transformers and peft, and no farm: it takes the engine's modules from beside it. `sd15` and
`sdxl` have the true geometry and random weights, which cost what trained ones do. Every rung adds one measure to the
rung before it; `--only NAME...` measures just these rungs. Text encoding and the full VAE are always in it.

The share of the FLOP limit is what the counted operations of an image would take at the rate of one large matrix
product, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bench import STEPS, Bench
from workers.pipelines.sampling import Noise
from workers.pipelines.slots import distinct

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")

RUNGS = {
    "merged": "the LCM-LoRA merged in place instead of applied in every layer",
    "channels-last": "convolutions in channels-last layout",
    "uint8": "rounded on the device, one copy to the host, the VAE a few pictures at a time",
    "sampler": "LCM steps without waiting for the device",
    "prompts": "embeddings of known prompts kept",
    "parts": "parts of a micro-batch side by side on the cores (a CPU only)",
    "compiled": "UNet and VAE decode compiled",
    "graphs": "CUDA graphs around them (a GPU only)",
}


def ladder(bench: Bench, limit: float | None) -> list[dict[str, Any]]:
    """Images per second of every rung at every micro-batch."""
    rows: list[dict[str, Any]] = []
    bench.attach()
    flops = flops_of(bench) if limit else None
    for rung in ("plain", *RUNGS):
        if rung != "plain":
            if not bench.possible(rung):
                continue
            bench.take(rung)
        if bench.options.only and rung not in bench.options.only:
            continue
        for count in bench.options.micro_batch:
            seconds = bench.seconds(lambda count=count: bench.once(count), bench.options.repeats)
            rate = count / seconds
            row = {"rung": rung, "micro_batch": count, "images_per_second": rate, "ms_an_image": 1000 / rate}
            if limit and flops:
                row["share_of_limit"] = rate * flops / limit
            rows.append(row)
            share = f"{row['share_of_limit']:8.1%}" if "share_of_limit" in row else ""
            print(f"{rung:14} {count:4} {rate:10.3f} images/s {1000 / rate:10.1f} ms{share}", flush=True)
    return rows


@torch.inference_mode()
def flops_of(bench: Bench) -> float:
    """Operations of one picture with merged weights: text, UNet at every step, VAE."""
    with FlopCounterMode(display=False) as counter:
        told = bench.encode(1)
        latents = Noise([0], (bench.pipe.unet.config.in_channels, *[bench.model.side // 8] * 2), bench.device).draw(1)[
            0
        ]
        bench.decoded(latents)
        text_and_vae = counter.get_total_flops()
    bench.pipe.unet.disable_adapters()
    with FlopCounterMode(display=False) as counter:
        size = torch.zeros((1, 6), device=bench.device, dtype=bench.dtype)
        added = {"added_cond_kwargs": {"text_embeds": told[0].asked.pooled, "time_ids": size}}
        options = added if bench.model.family == "sdxl" else {}
        time_ = torch.tensor(499, device=bench.device)
        bench.pipe.unet(latents.to(bench.dtype), time_, encoder_hidden_states=told[0].asked.tokens, **options)
    bench.pipe.unet.enable_adapters()
    return float(text_and_vae + STEPS * counter.get_total_flops())


def flop_limit(bench: Bench) -> float:
    """Operations a second of one large matrix product, by the clock of the rungs: what this device can do at most."""
    device, dtype = bench.device, bench.dtype
    side = 8192 if device.type == "cuda" else 1024
    one, other = (torch.randn((side, side), device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(10):
        bench.finish()
        start = bench.clock()
        one @ other
        bench.finish()
        best = max(best, 2 * side**3 / (bench.clock() - start))
    return best


def swap(bench: Bench) -> dict[str, float]:
    """Seconds from one style adapter to another: in place, and by diffusers unloading and loading."""
    styles = [bench.random_adapter(f"style{n}", bench.options.rank, ATTENTION, n) for n in range(2)]
    turn = iter(range(10**6))

    def in_place() -> None:
        bench.merger.apply([(bench.lcm, 1.0), (styles[next(turn) % 2], 0.8)])

    ours = bench.seconds(in_place, bench.options.repeats)
    bench.merger.apply([])
    with tempfile.TemporaryDirectory() as folder:
        files = [bench.as_file(style, Path(folder)) for style in styles]

        def reload() -> None:
            bench.pipe.unload_lora_weights()
            bench.pipe.load_lora_weights(folder, weight_name=files[next(turn) % 2], adapter_name="style")

        theirs = bench.seconds(reload, bench.options.repeats)
        bench.pipe.unload_lora_weights()
    print(f"swap: {ours * 1000:.1f} ms in place, {theirs * 1000:.1f} ms unload and load: {theirs / ours:.1f} times")
    return {"in_place_seconds": ours, "reload_seconds": theirs, "times": theirs / ours}


def slots(bench: Bench) -> dict[str, float]:
    """A micro-batch with as many different rank-16 attention adapters as images, beside one merged for all."""
    count = max(bench.options.micro_batch)
    styles = [bench.random_adapter(f"style{n}", min(16, bench.options.rank), ATTENTION, n) for n in range(count)]
    # As workers render: parts side by side on a CPU, compiled on a GPU alone.
    bench.taken |= {"sampler", "prompts", "uint8"} | {rung for rung in ("parts",) if bench.possible(rung)}
    compiles = bench.device.type == "cuda" and not bench.options.no_compile
    for rung in ("merged", "channels-last", *(("compiled",) if compiles else ())):
        if rung not in bench.taken:
            bench.take(rung)
    bench.slots.rest()
    bench.merger.apply([(bench.lcm, 1.0), (styles[0], 0.8)])
    merged = bench.seconds(lambda: bench.once(count), bench.options.repeats)
    bench.merger.apply([(bench.lcm, 1.0)])
    rows = [[(style, 0.1 * number + 0.2)] for number, style in enumerate(styles)]
    bench.slots.put(list(distinct(rows)))
    bench.slots.engage()
    chosen = bench.slots.choose(rows)
    together = bench.seconds(lambda: bench.once(count, chosen), bench.options.repeats)
    one_row = bench.seconds(lambda: bench.once(1, bench.slots.choose(rows[:1])), bench.options.repeats)
    bench.slots.clear()
    found = {
        "micro_batch": count, "merged_seconds": merged, "slots_seconds": together, "ratio": together / merged,
        "one_by_one_seconds": one_row * count,
    }  # fmt: skip
    print(
        f"slots: {count} adapters at once {together:.3f} s, one merged for all {merged:.3f} s: {found['ratio']:.3f}; "
        f"one by one {one_row * count:.3f} s"
    )
    return found


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--model", choices=["sd15", "sdxl", "crack-tiny", "toy"], default="crack-tiny")
    parser.add_argument("--part", nargs="+", choices=["ladder", "swap", "slots"], default=["ladder", "swap", "slots"])
    parser.add_argument("--micro-batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--only", nargs="+", choices=["plain", *RUNGS], help="measure just these rungs")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rank", type=int, help="of random adapters: 64 as LCM-LoRA has, 16 for crack-tiny as its own")
    parser.add_argument("--device", default="cuda:0" if cuda else "cpu")
    parser.add_argument("--dtype", default="float16" if cuda else "float32")
    parser.add_argument("--backend", default="inductor", help="torch.compile's; eager only shows that it can be traced")
    parser.add_argument("--processor-time", action="store_true", help="a CPU that others use: what is paid, not waited")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--no-limit", action="store_true", help="leave the share of the FLOP limit out")
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    options = parser.parse_args(arguments)
    options.rank = options.rank or (16 if options.model == "crack-tiny" else 64)
    found: dict[str, Any] = {"model": options.model, "device": options.device, "dtype": options.dtype}
    for part in options.part:
        # A model of its own for each: what one part did to the weights must not be in the next.
        bench = Bench(options)
        if part == "ladder":
            limit = None if options.no_limit else flop_limit(bench)
            found["flop_limit"] = limit
            found["ladder"] = ladder(bench, limit)
        else:
            found[part] = {"swap": swap, "slots": slots}[part](bench)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))
    return found


if __name__ == "__main__":
    main()
