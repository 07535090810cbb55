"""What each of the engine's measures brings, from plain diffusers upwards, on one device, and what of it was promised.

    python -m benchmarks.engine          # a GPU: SD 1.5 and SDXL; a CPU: crack-tiny. The ladder, swaps, slots, verdicts
    python -m benchmarks.engine --model sdxl --part slots swap           # the rest of the ladder left out
    python -m benchmarks.engine --only prompts parts --micro-batch 1 --part ladder --repeats 15
    python -m benchmarks.engine --part slots --repeats 9 --processor-time

Needs torch, diffusers, transformers and peft, and no farm: it takes the engine's modules from beside it. `sd15` and
`sdxl` have the true geometry and random weights, which cost what trained ones do. Every rung adds one measure to the
rung before it; `--only NAME...` measures just these rungs. Text encoding and the full VAE are always in it. Compiled
rungs go through the workers' own compiler and graphs, and are measured once everything is compiled.

Classifier-free guidance is no rung, because plain diffusers leaves it out at guidance 1 too. What PNGs cost is measured
by `benchmarks.encoders`, encoding and uploading beside rendering by `benchmarks/rendering.py`.

The share of the FLOP limit is what the counted operations of an image would take at the rate of one large matrix
product, measured in the same run. The verdicts hold the figures against `benchmarks/targets.py`; what is promised of
another device, and what was left out, is not measured here. Answers 1 when something promised was missed.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bench import BACKENDS, STEPS, Bench
from benchmarks.targets import SLOT_COUNT, SLOT_RANK, line, missed, rate, verdicts
from farm.errors import FarmError
from workers.pipelines.sampling import Noise
from workers.pipelines.slots import distinct

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")

PLAIN = {
    "plain": "plain diffusers in --dtype, half precision on a GPU: the LCM-LoRA unfused",
    "float32": "the same in full precision: what half precision brings (only where --dtype is another)",
}
RUNGS = {
    "merged": "the LCM-LoRA merged in place instead of applied in every layer",
    "channels-last": "convolutions in channels-last layout",
    "upsampling": "the VAE's doubling and convolving as one transposed convolution (a CPU only)",
    "uint8": "rounded on the device, one copy to the host",
    "decode": "the VAE a few pictures at a time",
    "sampler": "LCM steps without waiting for the device",
    "prompts": "embeddings of known prompts kept",
    "parts": "parts of a micro-batch side by side on the cores (a CPU only)",
    "compiled": "UNet and VAE decode compiled, as workers compile them",
    "graphs": "CUDA graphs of them where those are faster (a GPU only)",
    "buckets": "one picture less, where only the whole micro-batch is compiled: filled up to that",
}

Row = dict[str, Any]


def ladder(bench: Bench, limit: float | None) -> list[Row]:
    """Images per second of every rung at every micro-batch, and how many times plain diffusers' that is."""
    rows: list[Row] = []
    only = bench.options.only
    bench.attach()
    share = flops_of(bench) / limit if limit else None
    for rung in (*PLAIN, *RUNGS):
        if not bench.possible(rung):
            continue
        if rung in RUNGS:
            bench.take(rung)
        if only and rung not in only:
            continue
        at = bench.in_full_precision() if rung == "float32" else bench
        for count in bench.options.micro_batch:
            if rung == "buckets" and count == 1:
                continue
            row = measured(at, rung, count)
            rows.append(row)
            mine = row.get("images_per_second")
            if mine and share:
                row["share_of_limit"] = mine * share
            for name, micro_batch in (("times_plain", count), ("times_plain_alone", 1)):
                if mine and (other := rate({"ladder": rows}, "plain", micro_batch)):
                    row[name] = mine / other
            print(shown(row), flush=True)
    return rows


def measured(bench: Bench, rung: str, count: int) -> Row:
    """A row of the ladder. A rung that cannot be done at this size says so in it: the others are worth having."""
    row: Row = {"rung": rung, "micro_batch": count}
    repeats = bench.options.repeats
    pictures = count
    try:
        if rung == "buckets":
            pictures = row["pictures"] = count - 1
            seconds, eager, row["filled_up"] = bench.filled_up(count)
            row["eager_images_per_second"] = pictures / eager
        else:
            bench.settle(count)
            seconds = bench.seconds(lambda: bench.once(count), repeats)
    except (RuntimeError, FarmError) as error:
        row["failed"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:300]
    if "failed" in row:
        # Out of the except block, where the traceback no longer holds the tensors.
        bench.at.free()
    else:
        row["images_per_second"] = pictures / seconds
        row["ms_an_image"] = 1000 * seconds / pictures
    if bench.compiler is not None:
        row["programs"] = bench.served()
    return row


def shown(row: Row) -> str:
    """A row for people."""
    text = f"{row['rung']:14} {row['micro_batch']:4} "
    if "failed" in row:
        return text + row["failed"]
    text += f"{row['images_per_second']:10.3f} images/s {row['ms_an_image']:10.1f} ms"
    text += f"{row['share_of_limit']:8.1%} of the limit" if "share_of_limit" in row else ""
    for name, words in (("times_plain", "plain"), ("times_plain_alone", "plain alone")):
        text += f"{row[name]:8.2f} x {words}" if name in row else ""
    if "eager_images_per_second" in row:
        text += f"  ({row['pictures']} pictures, {'' if row['filled_up'] else 'not '}filled up; "
        text += f"as they are {row['eager_images_per_second']:.3f} images/s)"
    if "programs" in row:
        text += "  " + ", ".join(f"{number} {name}" for name, number in row["programs"].items())
    return text


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
    for _ in range(25):
        bench.finish()
        start = bench.clock()
        one @ other
        bench.finish()
        best = max(best, 2 * side**3 / (bench.clock() - start))
    return best


def swap(bench: Bench) -> dict[str, float]:
    """Seconds from one style adapter to another: in place, and by diffusers unloading and loading."""
    styles = [bench.random_adapter(f"style{n}", bench.rank, ATTENTION, n) for n in range(2)]
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
    count = bench.options.slots
    rank = min(SLOT_RANK, bench.rank)
    styles = [bench.random_adapter(f"style{n}", rank, ATTENTION, n) for n in range(count)]
    # As workers render: parts side by side on a CPU, compiled on a GPU alone.
    left_out = {"buckets"} if bench.device.type == "cuda" else {"buckets", "compiled"}
    for rung in RUNGS:
        if rung not in left_out and bench.possible(rung):
            bench.take(rung)
    bench.slots.rest()
    bench.merger.apply([(bench.lcm, 1.0), (styles[0], 0.8)])
    bench.settle(count)
    merged = bench.seconds(lambda: bench.once(count), bench.options.repeats)
    bench.merger.apply([(bench.lcm, 1.0)])
    rows = [[(style, 0.1 * number + 0.2)] for number, style in enumerate(styles)]
    bench.slots.put(list(distinct(rows)))
    bench.slots.engage()
    chosen = bench.slots.choose(rows)
    bench.settle(count, chosen)
    together = bench.seconds(lambda: bench.once(count, chosen), bench.options.repeats)
    alone = bench.slots.choose(rows[:1])
    bench.settle(1, alone)
    one_row = bench.seconds(lambda: bench.once(1, alone), bench.options.repeats)
    programs = bench.served()
    bench.slots.clear()
    found = {
        "micro_batch": count, "rank": rank, "merged_seconds": merged, "slots_seconds": together,
        "ratio": together / merged, "one_by_one_seconds": one_row * count, "programs": programs,
    }  # fmt: skip
    print(
        f"slots: {count} adapters at once {together:.3f} s, one merged for all {merged:.3f} s: {found['ratio']:.3f}; "
        f"one by one {one_row * count:.3f} s"
    )
    return found


PARTS = ("ladder", "swap", "slots")


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument(
        "--model", nargs="+", choices=["sd15", "sdxl", "crack-tiny", "toy"],
        help="sd15 and sdxl on a GPU, crack-tiny on a CPU, unless given",
    )  # fmt: skip
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--micro-batch", nargs="+", type=int, default=[1, 8, 16], help="of the ladder")
    parser.add_argument(
        "--slots", type=int, default=SLOT_COUNT, help="different adapters, and the micro-batch, of slots"
    )
    parser.add_argument("--only", nargs="+", choices=[*PLAIN, *RUNGS], help="measure just these rungs")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rank", type=int, help="of random adapters: 64 as LCM-LoRA has, 16 for crack-tiny as its own")
    parser.add_argument("--device", default="cuda:0" if cuda else "cpu")
    parser.add_argument("--dtype", default="float16" if cuda else "float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--compile", default="auto", choices=["auto", "on", "off"], help="auto: on a GPU alone")
    parser.add_argument(
        "--backend", choices=list(BACKENDS), default="inductor", help="eager only shows that networks can be traced"
    )
    parser.add_argument("--processor-time", action="store_true", help="a CPU that others use: what is paid, not waited")
    parser.add_argument("--no-limit", action="store_true", help="leave the share of the FLOP limit out")
    parser.add_argument("--out", type=Path, help="write everything as JSON, part by part")
    options = parser.parse_args(arguments)
    on_gpu = options.device.startswith("cuda")
    options.model = options.model or (["sd15", "sdxl"] if on_gpu else ["crack-tiny"])
    options.compiles = options.compile == "on" or (options.compile == "auto" and on_gpu)
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure and print everything; answers the report of each model, and the verdicts."""
    options = parsed(arguments)
    device = torch.device(options.device)
    reports: dict[str, dict[str, Any]] = {}
    found: dict[str, Any] = {"models": reports, "verdicts": verdicts(reports)}
    for model in options.model:
        report = reports[model] = {
            "device": device.type, "dtype": options.dtype, "threads": torch.get_num_threads(),
            "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
            "torch": torch.__version__, "diffusers": diffusers.__version__,
        }  # fmt: skip
        print(f"{model}: {report}", flush=True)
        for part in options.part:
            # A model of its own for each: what one part did to the weights must not be in the next.
            bench = Bench(options, model)
            if part == "ladder":
                report["flop_limit"] = limit = None if options.no_limit else flop_limit(bench)
                report["ladder"] = ladder(bench, limit)
            else:
                report[part] = {"swap": swap, "slots": slots}[part](bench)
            bench.close()
            del bench
            found["verdicts"] = verdicts(reports)
            if options.out:
                options.out.write_text(json.dumps(found, indent=1))
    for one in found["verdicts"]:
        print(line(one))
    return found


if __name__ == "__main__":
    sys.exit(missed(main()["verdicts"]))
