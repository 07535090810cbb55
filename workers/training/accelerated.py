"""The loop of adapter training, through `accelerate`: one or several devices, mixed precision, exact resumption.

Every random number of a pass comes from (seed, pass, process), and the order of pictures from (seed, position), so the
checkpoint needs no generator's state: adapter, optimizer, scaler and step are everything.
"""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from farm.training import FREE, Training
from workers.training.base import Base
from workers.training.errors import TrainingError, why
from workers.training.examples import Positions, Rows, passes
from workers.training.feed import Feed
from workers.training.loop import Plan, load, save, seed_step
from workers.training.objectives import Loss

PATIENCE = 10.0
"""Seconds between two lines of progress, at least."""
KNOWN = 2
"""Raised when what a checkpoint tells of its run changes: older ones could not say whether they may go on."""
SKIPS = 50
"""Steps in a row that fp16's scaler may throw away before it has to be something else than its search for a scale."""


@dataclass(eq=False)
class Run:
    """One training run of an adapter in the folder `out`.

    `facts` says what checkpoint and data are; `on_step` is called with the number of steps done: at the beginning, and
    after each step. `stop` is asked after each step, on every device.
    """

    options: Training
    base: Base
    accelerator: Accelerator
    facts: Mapping[str, str]
    say: Callable[[str], None] = print
    on_step: Callable[[int], None] = lambda _: None
    stop: Callable[[], bool] = lambda: False
    _skipped: int = field(default=0, init=False)

    @property
    def checkpoint(self) -> Path:
        return self.options.out / "checkpoint.pt"

    @property
    def log(self) -> Path:
        return self.options.out / "log.ndjson"

    @property
    def plan(self) -> Plan:
        o = self.options
        return Plan(o.steps, o.rate, seed=o.seed, warmup=o.warmup, decay=o.decay, clip=o.clip, save_every=o.save_every)

    def train(self, data: Positions, feed: Feed, loss: Loss) -> int:
        """Train until the plan ends or `stop` says so; returns the number of steps done in all.

        Raises TrainingError when a loss or gradient is not finite, a picture cannot be read, or a checkpoint cannot be
        written; the last one then stays as it was.
        """
        o, accelerator, plan = self.options, self.accelerator, self.plan
        weights = [p for p in self.base.network.parameters() if p.requires_grad]
        kept = self.resume()
        optimizer = torch.optim.AdamW(weights, lr=o.rate, weight_decay=o.weight_decay)
        network, optimizer = accelerator.prepare(self.base.network, optimizer)
        done = 0
        if kept:
            done = int(kept["step"])
            optimizer.load_state_dict(kept["optimizer"])
            if accelerator.scaler is not None and kept["scaler"]:
                accelerator.scaler.load_state_dict(kept["scaler"])
            self.say(f"resuming at step {done} of {plan.steps}")
        rows = Rows(o.batch, accelerator.process_index, accelerator.num_processes, done * o.accumulate)
        pace = _Pace(o, done, accelerator.num_processes, self.say)
        if accelerator.is_main_process:
            self._forget_after(done)
        network.train()
        self.on_step(done)
        saved = done
        with closing(passes(data, rows, o.loaders)) as examples:
            while done < plan.steps:
                for group in optimizer.param_groups:
                    group["lr"] = plan.rate_at(done)
                value = self._step(network, optimizer, weights, examples, feed, loss, done)
                done += 1
                pace.step(done, value)
                self._note(done, value, plan.rate_at(done - 1), pace.elapsed)
                over = self._over(pace)
                if done % plan.save_every == 0 or done == plan.steps or over:
                    self._save(done, optimizer)
                    saved = done
                self.on_step(done)
                if over:
                    break
        if saved < done:
            self._save(done, optimizer)
        return done

    def _step(
        self,
        network: Any,
        optimizer: Any,
        weights: list[Any],
        examples: Iterator[Any],
        feed: Feed,
        loss: Loss,
        done: int,
    ) -> float:
        """One optimizer step: `accumulate` passes. Returns the mean loss over passes and devices."""
        o, accelerator = self.options, self.accelerator
        total = 0.0
        for number in range(o.accumulate):
            found = next(examples)
            place = (done * o.accumulate + number) * accelerator.num_processes + accelerator.process_index
            seed_step(o.seed, place)
            with accelerator.accumulate(network):
                given = feed(found)
                with accelerator.autocast():
                    value = loss(network, *given)
                mean = float(accelerator.reduce(value.detach(), "mean"))
                if not math.isfinite(mean):
                    raise TrainingError(
                        f"loss is {mean} at step {done}: try a lower --rate, or bf16 or no --precision. "
                        f"Last checkpoint: {self.checkpoint}"
                    )
                accelerator.backward(value)
                total += mean
        norm = float(accelerator.clip_grad_norm_(weights, o.clip))
        if not math.isfinite(norm) and accelerator.scaler is None:
            raise TrainingError(f"gradient is {norm} at step {done}. Last checkpoint: {self.checkpoint}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # fp16 looks for its scale by overflowing now and then; only without end is it a fault.
        self._skipped = self._skipped + 1 if accelerator.optimizer_step_was_skipped else 0
        if self._skipped >= SKIPS:
            raise TrainingError(
                f"fp16 gradients overflowed {SKIPS} steps in a row up to step {done}: try --precision bf16. "
                f"Last checkpoint: {self.checkpoint}"
            )
        return total / o.accumulate

    def _over(self, pace: _Pace) -> bool:
        """Whether any device wants to stop: all of them then do, after the same step."""
        minutes = self.options.minutes
        if self.stop() or (minutes is not None and pace.elapsed > minutes * 60):
            self.accelerator.set_trigger()
        return bool(self.accelerator.check_trigger())

    def _save(self, done: int, optimizer: Any) -> None:
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = {
                "step": done,
                "adapter": self._adapter(),
                "optimizer": optimizer.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "facts": json.dumps(self._facts()),
            }
            save(self.checkpoint, state)
        self.accelerator.wait_for_everyone()

    def _note(self, done: int, loss: float, rate: float, seconds: float) -> None:
        """One line a step, for plots."""
        if self.accelerator.is_main_process:
            line = {"step": done, "loss": round(loss, 7), "rate": rate, "seconds": round(seconds, 3)}
            try:
                with self.log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:
                raise TrainingError(f"cannot write {self.log}: {why(error)}") from error

    def _forget_after(self, done: int) -> None:
        """A resumed run takes its steps again; the log holds each once."""
        half = self.log.with_name(f"{self.log.name}.part")
        try:
            self.options.out.mkdir(parents=True, exist_ok=True)
            # As bytes: what a failing disk left of a line stays for a person to look at.
            held = self.log.read_bytes() if self.log.exists() else b""
            half.write_bytes(b"".join(line.rstrip(b"\n") + b"\n" for line in islice(io.BytesIO(held), done)))
            half.replace(self.log)
        except OSError as error:
            with suppress(OSError):
                half.unlink()
            raise TrainingError(f"cannot write {self.log}: {why(error)}") from error

    def resume(self) -> dict[str, Any]:
        """Put the adapter of the checkpoint in place and return the rest; empty where there is no checkpoint.

        Raises TrainingError, on every device, when one of them cannot go on with the checkpoint, which was made with
        other options, data or base than now; and when they are not at one about step, options, data and base.
        """
        found: dict[str, Any] = {}
        trouble = ""
        try:
            if self.checkpoint.exists():
                found = self._kept()
        except TrainingError as error:
            trouble = str(error)
        o = self.options
        # They wait for each other at these steps.
        met = {"steps": o.steps, "save_every": o.save_every, "sample_every": o.sample_every}
        mine = {"step": int(found.get("step", 0)), "facts": self._facts() | met, "trouble": trouble}
        # Each device reads for itself, and one that stopped here alone would leave the others waiting.
        self._agree(gather_object([mine]))
        return found

    def _agree(self, all_of_them: list[dict[str, Any]]) -> None:
        """Raises TrainingError unless these are equal, one of each device."""
        first = all_of_them[0]
        for number, each in enumerate(all_of_them):
            if each["trouble"]:
                where = f" (device {number})" if len(all_of_them) > 1 else ""
                raise TrainingError(f"{each['trouble']}{where}")
            for name, value, other in _unlike(first["facts"], each["facts"]):
                raise TrainingError(
                    f"{name} is {value!r} for device 0, {other!r} for device {number}: all machines need the same "
                    "options, checkpoint and data"
                )
            if each["step"] != first["step"]:
                raise TrainingError(
                    f"{self.checkpoint} is at step {first['step']} for device 0, at step {each['step']} for device "
                    f"{number} (0: there is none): --out has to be one folder that all machines share"
                )

    def _kept(self) -> dict[str, Any]:
        """What the checkpoint holds, its adapter put in place. Raises TrainingError when it does not fit."""
        state = load(self.checkpoint)
        try:
            before = json.loads(state["facts"])
            if before.get("known") != KNOWN:
                raise TrainingError(
                    f"{self.checkpoint} was begun by another release, which kept less of what has to stay as it was: "
                    "finish it with that release, or give another --out to begin anew"
                )
            now = self._facts()
            if other := [f"{name} was {was!r}, is {value!r}" for name, was, value in _unlike(before, now)]:
                auto = " (auto is that of this device)" if self.options.precision == "auto" else ""
                told = "; ".join(f"{each}{auto}" if each.startswith("precision ") else each for each in other)
                raise TrainingError(
                    f"{self.checkpoint} belongs to a run with other options: {told}. "
                    "Give the same ones to go on, or another --out to begin anew"
                )
            # Every weight is asked for; one too many would be no fault of this run's options.
            for name, value in self._adapter().items():
                value.copy_(state["adapter"][name])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise TrainingError(f"{self.checkpoint} does not fit this run: {error}") from error
        return state

    def _adapter(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in self.base.network.named_parameters() if p.requires_grad}

    def _facts(self) -> dict[str, Any]:
        chosen = json.loads(self.options.model_dump_json(exclude=set(FREE)))
        # What auto stands for is another thing on another device.
        resolved = {"precision": self.accelerator.mixed_precision, "devices": self.accelerator.num_processes}
        return {**chosen, **self.facts, **resolved, "known": KNOWN}


def _unlike(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Name, one value and the other, of what differs."""
    for name in sorted(one.keys() | other.keys()):
        if one.get(name) != other.get(name):
            yield name, one.get(name), other.get(name)


class _Pace:
    """Progress, with rate and time left."""

    def __init__(self, options: Training, first: int, processes: int, say: Callable[[str], None]) -> None:
        self.options, self.first, self.say = options, first, say
        self.pictures = options.batch * options.accumulate * processes
        self.started = self.lap = time.monotonic()
        self.lap_step, self.smooth = first, math.nan

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def step(self, done: int, loss: float) -> None:
        self.smooth = loss if math.isnan(self.smooth) else 0.95 * self.smooth + 0.05 * loss
        now, last = time.monotonic(), done == self.options.steps
        if now - self.lap < PATIENCE and not last and done > self.first + 1:
            return
        # The pace of the last lap: a machine that slept or was shared is forgotten at once.
        pace = (now - self.lap) / (done - self.lap_step)
        self.lap, self.lap_step = now, done
        left = pace * (self.options.steps - done) / 60
        self.say(
            f"step {done}/{self.options.steps}  loss {self.smooth:.5f}  {pace:.2f} s/step  "
            f"{self.pictures / max(pace, 1e-9):.2f} pictures/s  {left:.1f} min left"
        )
