"""Compiled networks made beside the serving thread: eager ones serve until theirs are ready, and whenever one fails.

`ask` is what rendering calls networks through. It counts what is asked for; a thread of its own compiles what is asked
most, for few numbers of rows (`buckets`): calls with other numbers are padded. The next call of that kind, inside the
device lock, tries the program out: it must answer what the network answers, as near as its number type allows. From
then on it serves; on a GPU as a CUDA graph where that is measured to be faster.
"""

from __future__ import annotations

import itertools
import math
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from threading import Condition, Lock, Thread
from typing import TYPE_CHECKING, Any

import structlog
import torch
from torch import Tensor, nn

from workers.pipelines.buckets import Buckets
from workers.pipelines.device import is_fatal, is_out_of_memory
from workers.pipelines.graphs import Graphs
from workers.pipelines.programs import Backend, CannotCompile, Form, Program, Shape, compiled, flat, twin

if TYPE_CHECKING:
    from workers.pipelines.device import Device
    from workers.pipelines.load import Pipeline

WORTH_CALLS = 8
"""Calls of one kind before it is compiled: two micro-batches of four steps. A canary has fewer."""
MOST_WAITING = 8
"""Kinds waiting to be compiled. Each keeps its network from being freed."""
MOST_COUNTED = 1000
"""Kinds whose calls are counted; past that all counts begin anew."""
MOST_PROGRAMS = 32
"""Programs of one checkpoint; the oldest goes first."""
TRIES = 2
"""How often a kind is compiled before it is given up: memory may have been short, or something in its way."""
MOST_FAILURES = 3
"""So many kinds given up before any success, and nothing is compiled any more: there is no compiler, most likely."""

APART = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""How far a program's answer may be from its network's, as a share of the network's greatest value."""

log = structlog.get_logger(__name__)

Key = tuple[Any, ...]


@dataclass(eq=False)
class Wanted:
    """A kind of call that is to be compiled, and how often it was asked for so far."""

    pipeline: weakref.ref[Pipeline]
    of: weakref.ref[nn.Module]
    """The network that is asked; `network` is a twin's method."""
    network: Callable[..., Any]
    form: Form
    told: Callable[[Sequence[Tensor]], None] | None
    more: tuple[Shape, ...]
    calls: int = 0


class Compiler:
    """Compiles the networks of one device's pipelines. `ask` and `free` belong inside the device lock."""

    def __init__(self, device: Device, backend: Backend | None, graphs: Graphs | None = None, most: int = 1) -> None:
        """Without a backend nothing is compiled; without `graphs` there are no CUDA graphs. `most` images make a full
        micro-batch."""
        self._device = device
        self._buckets = Buckets(most)
        # Names of networks in keys. An id would be another network's as soon as this one is gone.
        self._numbers: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
        self._next_number = itertools.count()
        self._backend = backend
        self._graphs = graphs
        self._changed = Condition()
        self._counts: dict[Key, int] = {}
        self._wanted: dict[Key, Wanted] = {}
        # Every pipeline that something was compiled for, and how often which of its kinds failed.
        self._known: weakref.WeakKeyDictionary[Pipeline, Counter[Key]] = weakref.WeakKeyDictionary()
        self._given_up = 0
        self._seconds = 0.0
        self._thread: Thread | None = None
        self._closed = backend is None
        self.turn = Lock()
        """Held while the device renders, and while the compiling thread runs what it made: both at once may need more
        memory than there is."""
        # Held while anything compiles: nothing can be captured meanwhile.
        self._quiet = Lock()
        self._at: Key | None = None

    def ask(self, pipeline: Pipeline, network: Any, method: str, *given: Any, **options: Any) -> Tensor:
        """The first of what a method of one of the pipeline's networks answers, compiled where that is ready."""
        plain = getattr(network, method)
        if self._backend is None:
            return first(plain(*given, **options))
        form, tensors = flat(given, options)
        slots = pipeline.slots.engaged if network is pipeline.unet else None
        slotted: tuple[Tensor, ...] = () if slots is None else pipeline.slots.rows.now
        wide, count = self._buckets.padded((*tensors, *slotted))
        form = replace(form, shapes=tuple(Shape.of(one) for one in wide[: len(tensors)]))
        rows = wide[len(tensors) :]
        key = (self._number(network), method, slots, *form.key, *(tuple(row.shape) for row in rows))
        program = pipeline.programs.get(key)
        try:
            if program is None:
                self._count(key, pipeline, network, method, form, rows)
            elif program.tried:
                return self._answer(program, wide)[:count]
            else:
                return self._try_out(key, pipeline, program, wide, first(plain(*given, **options)))
        except Exception as error:
            if is_out_of_memory(error) or is_fatal(error):
                raise
            self._failed(key, pipeline, error)
        return first(plain(*given, **options))

    def rows(self, images: int) -> int:
        """How many images so many are computed as: more of them where networks are compiled."""
        return images if self._backend is None else self._buckets.of(images)

    def forget(self, pipeline: Pipeline, network: nn.Module) -> None:
        """A network leaves its pipeline: what was compiled of it holds its weights, and its graphs the device."""
        number = self._numbers.get(network)
        for key in [key for key in tuple(pipeline.programs) if key[0] == number]:
            pipeline.programs.pop(key, None)
        with self._changed:
            for key in [key for key in self._wanted if key[0] == number]:
                del self._wanted[key]

    def told(self) -> dict[str, Any]:
        """For people: how many kinds of call are served compiled, and as CUDA graphs, how many wait for it or failed,
        and the seconds spent compiling."""
        with self._changed:
            programs = [one for pipeline in list(self._known) for one in tuple(pipeline.programs.values())]
            return {
                "ready": sum(one.tried for one in programs),
                "graphs": sum(one.graph is not None for one in programs),
                "waiting": len(self._wanted) + (self._at is not None),
                "failed": self._given_up,
                "seconds": round(self._seconds, 1),
            }

    def free(self, pipeline: Pipeline) -> bool:
        """Let go of what CUDA graphs hold of the device for this pipeline, for good: memory ran out. Answers whether
        there was any."""
        return sum(program.let_go() for program in tuple(pipeline.programs.values())) > 0

    def close(self) -> None:
        """Compile nothing more. What is being compiled is not waited for: workers end by leaving their threads behind.
        A process that ends otherwise waits until all is `settled`."""
        with self._changed:
            self._closed = True
            self._wanted.clear()
            self._changed.notify_all()

    def settled(self, seconds: float) -> bool:
        """Wait until nothing is left to compile; False if it takes longer than so many seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._wanted and self._at is None, seconds)

    def _number(self, network: nn.Module) -> int:
        found = self._numbers.get(network)
        if found is None:
            with self._changed:
                found = self._numbers.setdefault(network, next(self._next_number))
        return found

    def _count(
        self, key: Key, pipeline: Pipeline, network: nn.Module, method: str, form: Form, rows: Sequence[Tensor]
    ) -> None:
        """One call more of this kind. Enough of them, and it is compiled."""
        with self._changed:
            self._purge()
            known = self._known.get(pipeline)
            if self._closed or key == self._at or (known is not None and known[key] >= TRIES):
                return
            if (waiting := self._wanted.get(key)) is not None:
                waiting.calls += 1
                return
            count = self._counts[key] = self._counts.get(key, 0) + 1
            if count < WORTH_CALLS or len(self._wanted) >= MOST_WAITING:
                return
            del self._counts[key]
            told = pipeline.slots.rows.tell if rows else None
            more = tuple(Shape.of(row) for row in rows)
            call = getattr(twin(network), method)
            self._wanted[key] = Wanted(weakref.ref(pipeline), weakref.ref(network), call, form, told, more, count)
            if self._thread is None:
                self._thread = Thread(target=self._work, name="compile", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def _purge(self) -> None:
        """Under the lock: what a pipeline wanted that is gone, nobody asks for any more."""
        for key in [key for key, one in self._wanted.items() if one.pipeline() is None]:
            del self._wanted[key]
        if len(self._counts) > MOST_COUNTED:
            self._counts.clear()

    def _work(self) -> None:
        """The compiling thread."""
        while True:
            with self._changed:
                self._at = None
                self._purge()
                self._changed.notify_all()
                self._changed.wait_for(lambda: bool(self._closed or self._wanted))
                if self._closed:
                    return
                key = max(self._wanted, key=lambda one: self._wanted[one].calls)
                wanted, self._at = self._wanted.pop(key), key
                self._changed.notify_all()
            self._compile(key, wanted)
            # Or what it holds would live until the next one comes.
            del wanted

    def _compile(self, key: Key, wanted: Wanted) -> None:
        assert self._backend is not None  # noqa: S101  # nothing is wanted without one
        started = time.perf_counter()
        program: Program | None = None
        failure: Exception | None = None
        try:
            with self._quiet, self._device.here():
                program = compiled(wanted.network, wanted.form, self._backend, wanted.told, wanted.more, self.turn)
        except Exception as error:  # noqa: BLE001  # a compiler raises anything; the network serves as it is
            failure = error
        seconds = time.perf_counter() - started
        pipeline = wanted.pipeline()
        with self._changed:
            self._seconds += seconds
        if pipeline is None or wanted.of() is None:
            return
        if program is None:
            self._failed(key, pipeline, failure)
            return
        log.info("compiled", shapes=str(wanted.form), seconds=round(seconds, 1))
        with self._changed:
            self._known.setdefault(pipeline, Counter())
        while len(pipeline.programs) >= MOST_PROGRAMS:
            pipeline.programs.pop(next(iter(pipeline.programs)), None)
        # One assignment: a call finds all of it or nothing.
        pipeline.programs[key] = program

    def _try_out(
        self, key: Key, pipeline: Pipeline, program: Program, tensors: Sequence[Tensor], expected: Tensor
    ) -> Tensor:
        """The network's own answer, after its program answered the same question."""
        span = float(expected.abs().max())
        if not math.isfinite(span):
            # A spoilt picture says nothing about the program.
            return expected
        answer = program(*tensors)[: len(expected)]
        apart = float((answer.float() - expected.float()).abs().max()) / max(span, 1e-6)
        if apart <= APART[expected.dtype]:
            program.tried = True
            log.info("served compiled from now on", apart=apart)
        else:
            self._failed(key, pipeline, CannotCompile(f"its answer is {apart:.3g} of the greatest value away"))
        return expected

    def _answer(self, program: Program, tensors: Sequence[Tensor]) -> Tensor:
        # Not while something is being compiled: that uses the device too, which would spoil a capture.
        if self._graphs is not None and not program.weighed and self._quiet.acquire(blocking=False):
            try:
                program.weighed = True
                program.graph = self._graphs.of(program, tensors)
            finally:
                self._quiet.release()
        return program(*tensors) if program.graph is None else program.graph(*tensors)

    def _failed(self, key: Key, pipeline: Pipeline, error: Exception | None) -> None:
        """This kind of call is served by the network as it is: until it is compiled anew, or for good."""
        pipeline.programs.pop(key, None)
        with self._changed:
            known = self._known.setdefault(pipeline, Counter())
            known[key] += 1
            again = known[key] < TRIES
            self._given_up += not again
            hopeless = self._given_up >= MOST_FAILURES and not any(
                program.tried for one in list(self._known) for program in tuple(one.programs.values())
            )
        told = f"{type(error).__name__}: {error}"[:500]
        if again:
            log.info("not compiled: will be tried once more", error=told)
            return
        log.warning("not compiled: served as it is", error=told)
        if hopeless:
            log.warning("nothing is compiled any more", given_up=self._given_up)
            self.close()


def compiler_for(wanted: str, device: Device, most: int = 1) -> Compiler:
    """As FARM_COMPILE says: `on`, `off`, or `auto`, which compiles on CUDA devices alone. `most` as Compiler's."""
    cuda = device.place.type == "cuda"
    if wanted == "off" or (wanted == "auto" and not cuda):
        return Compiler(device, None, most=most)
    return Compiler(device, inductor, Graphs(device.finish) if cuda else None, most)


def inductor(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
    """torch's own compiler. Imported when it is needed: that takes seconds."""
    run: Callable[..., Any] = import_module("torch._inductor.compile_fx").compile_fx(graph, examples)
    return run


def first(answer: Any) -> Tensor:
    """The first of what a network answers."""
    found: Tensor = answer[0]
    return found
