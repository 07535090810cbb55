"""The program behind `farm train`: one process per device, told by the options in FARM_TRAINING as JSON."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from diffusers.utils import logging as diffusers_logging
from pydantic import TypeAdapter, ValidationError
from transformers.utils import logging as transformers_logging

from farm.errors import FarmError
from farm.training import VARIABLE, LcmLora, StyleLora
from workers.pipelines.device import is_out_of_memory
from workers.training import objectives
from workers.training.accelerated import Run
from workers.training.base import Base, attach, open_base
from workers.training.data import fingerprint, open_source
from workers.training.distill import TARGETS
from workers.training.errors import TrainingError, reason
from workers.training.examples import Cut, Positions
from workers.training.feed import Cache, Feed, open_cache
from workers.training.formats import export
from workers.training.loop import Say
from workers.training.samples import sheet

Options = LcmLora | StyleLora
STYLE_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def train(options: Options, *, say: Say = print, stop: Callable[[], bool] = lambda: False) -> list[Path]:
    """Train an adapter, or go on where an earlier run stopped; returns the files written, none when stopped early.

    Raises TrainingError and InvalidModel, and what `reason` knows, with the last checkpoint kept.
    """
    accelerator = _accelerator(options)
    loud = say if accelerator.is_main_process else _hush
    base = open_base(options.checkpoint)
    size = options.pixels or (base.native, base.native)
    base.check_size(*size)
    loud(f"checkpoint {options.checkpoint}: {'SDXL' if base.xl else 'SD'}, predicts {base.kind}, {size[0]}x{size[1]}")
    source = open_source(options.data, options.caption_column, size, options.seed)
    loud(f"data {options.data}: {len(source)} pictures")
    facts = {"checkpoint": base.fingerprint, "data": fingerprint(source)}
    text = isinstance(options, StyleLora) and options.train_text
    _prepare(base, options, accelerator, text=text)
    cut = Cut(*size, options.crop, options.flip)
    cache = _cached(options, base, accelerator, Positions(source, cut, seed=0, drop=0, read=True), facts, loud)
    data = Positions(source, cut, seed=options.seed, drop=options.drop_captions, read=cache is None)
    if isinstance(options, LcmLora):
        loss = objectives.distillation(options, base)
    else:
        loss = objectives.denoising(options, base)
    run = Run(
        options,
        base,
        accelerator,
        facts | {"size": f"{size[0]}x{size[1]}"},
        loud,
        partial(_sample, base, options, size, accelerator),
        stop,
    )
    done = run.train(data, Feed(base, accelerator, text_learns=text, cache=cache), loss)
    made: list[Path] = []
    if accelerator.is_main_process:
        if done < options.steps:
            loud(f"stopped at step {done} of {options.steps}; the same command goes on")
        else:
            made = export(options.out, base, options, _notes(options, done), text=text)
            for path in made:
                loud(f"wrote {path}")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return made


def _accelerator(options: Options) -> Accelerator:
    gpus = 0 if options.cpu else torch.cuda.device_count()
    if options.devices > max(gpus, 1) and not options.cpu:
        raise TrainingError(
            f"--devices {options.devices}: this machine has {gpus} GPUs (--cpu trains on the processor)"
        )
    precision = options.precision
    if precision == "auto":
        gpu = torch.cuda.is_available() and not options.cpu
        precision = ("bf16" if torch.cuda.is_bf16_supported() else "fp16") if gpu else "no"
    # SDXL does not use the last layer of its first text encoder.
    text = isinstance(options, StyleLora) and options.train_text
    parallel = DistributedDataParallelKwargs(find_unused_parameters=text)
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            gradient_accumulation_steps=options.accumulate,
            cpu=options.cpu,
            kwargs_handlers=[parallel],
        )
    except ValueError as error:
        raise TrainingError(f"--precision {precision}: {error}") from error
    # Accelerate takes it and leaves autocast out: float16 would meet the adapter's float32 in the first step.
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise TrainingError("--precision fp16 needs a GPU; on a processor bf16 or no would do")
    return accelerator


def _prepare(base: Base, options: Options, accelerator: Accelerator, *, text: bool) -> None:
    """Number types, devices, and the adapter."""
    for part in (base.network.unet, *base.network.texts):
        part.to(DTYPES[accelerator.mixed_precision])
    usual = TARGETS if isinstance(options, LcmLora) else STYLE_TARGETS
    torch.manual_seed(options.seed)
    attach(
        base,
        options.target or usual,
        chosen=bool(options.target),
        rank=options.rank,
        alpha=options.strength,
        text=text,
    )
    if options.gradient_checkpointing:
        base.network.unet.enable_gradient_checkpointing()
        if text:
            for encoder in base.network.texts:
                encoder.gradient_checkpointing_enable()
    base.network.to(accelerator.device)
    base.move_helpers(accelerator.device)


def _cached(
    options: Options, base: Base, accelerator: Accelerator, data: Positions, facts: dict[str, str], say: Say
) -> Cache | None:
    if not options.cache:
        return None
    how = f"{data.how.width}x{data.how.height} flip={data.how.flip}"
    cache = open_cache(options.out / "cache", data, f"{facts} {how}", base, accelerator, say)
    base.park()
    return cache


def _sample(base: Base, options: Options, size: tuple[int, int], accelerator: Accelerator, done: int) -> None:
    every = options.sample_every
    if every and (done % every == 0 or done == options.steps):
        path = options.out / "samples" / f"{done:06d}.png"
        if accelerator.is_main_process:
            sheet(path, base, options, size, accelerator)
        accelerator.wait_for_everyone()


def _notes(options: Options, done: int) -> dict[str, str]:
    """What the file says of its making: no path and no host."""
    return {
        "modelspec.title": options.out.resolve().name,
        "ss_steps": str(done),
        "ss_learning_rate": str(options.rate),
        "ss_seed": str(options.seed),
        "ss_training_comment": f"farm train {options.kind}",
    }


def _hush(_: str) -> None:
    """Only one of several processes speaks."""


def _said(error: Exception, options: Options) -> str | None:
    """Why training ended, what may help, and what is left of it; None for a fault of the program itself."""
    said = str(error) if isinstance(error, FarmError) else reason(error)
    if said is None:
        return None
    if is_out_of_memory(error):
        said = f"{said}: {_smaller(options)}"
    elif isinstance(error, RuntimeError):
        said = f"{said}: fewer --loaders take less memory"
    checkpoint = options.out / "checkpoint.pt"
    if str(checkpoint) in said or not checkpoint.exists():
        return said
    return f"{said}. Last checkpoint: {checkpoint}; the same command goes on from it"


def _smaller(options: Options) -> str:
    """The options that take less memory than these."""
    less = []
    if options.batch > 1:
        # The same step in two halves, or nearly.
        less.append(f"--batch {options.batch // 2} --accumulate {options.accumulate * 2}")
    if not options.gradient_checkpointing:
        less.append("--gradient-checkpointing")
    if not (options.cache or options.crop == "random" or (isinstance(options, StyleLora) and options.train_text)):
        less.append("--cache")
    return f"less is needed with {', '.join([*less, 'a smaller --size'])}; each begins anew in another --out"


def main() -> int:
    """Train as the environment says; 1 and a reason when it cannot, 130 when it was asked to stop."""
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
    given: TypeAdapter[Any] = TypeAdapter(Options)
    asked: list[int] = []

    def note(number: int, _: object) -> None:
        # Of several processes each gets a signal twice: from the terminal and from their launcher, who kills in time.
        if asked and "LOCAL_RANK" not in os.environ:
            raise KeyboardInterrupt
        asked.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    try:
        options: Options = given.validate_json(os.environ.get(VARIABLE, ""))
    except ValidationError as error:
        sys.stderr.write(f"training stopped: {error}\n")
        return 1
    try:
        made = train(options, say=partial(print, flush=True), stop=lambda: bool(asked))
    except Exception as error:
        said = _said(error, options)
        if said is None:
            raise
        sys.stderr.write(f"training stopped: {said}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("training stopped at once; it goes on from its last checkpoint\n")
        return 130
    return 130 if asked and not made else 0


if __name__ == "__main__":
    sys.exit(main())
