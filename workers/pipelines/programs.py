"""A network compiled for one set of shapes: taken out of torch.compile, so that a call never compiles anything.

`torch.compile` looks at every call whether its guards still hold, and compiles anew where they do not: for minutes,
inside the device lock. So a backend of our own keeps the compiled graph, and it is called with the network's own
parameters, whose values adapters change in place, and with the inputs of the moment. Which shapes a graph is for is our
key, not its guard.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from workers.pipelines.patching import LOADING

Backend = Callable[[torch.fx.GraphModule, list[Tensor]], Callable[..., Any]]
"""As torch documents them for `torch.compile(backend=...)`."""


class CannotCompile(Exception):
    """What was compiled cannot be called with other inputs."""


@dataclass(frozen=True)
class Shape:
    """What a graph is made for: shape, strides, number type and device of one input."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> Shape:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)

    def empty(self) -> Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)

    def fit(self, tensor: Tensor) -> Tensor:
        """The tensor with these strides: itself where it has them, as nearly always."""
        return tensor if tensor.stride() == self.stride else self.empty().copy_(tensor)


@dataclass(frozen=True)
class Form:
    """What calls that one graph can serve have in common: their tensors' shapes, and all else that they are given."""

    shapes: tuple[Shape, ...]
    rest: tuple[Any, ...]
    """A tuple of one for each argument that is no tensor, None where one is."""
    spec: pytree.TreeSpec

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for calls that one graph can serve. Strides are no part of it: inputs are copied to the graph's own."""
        sizes = tuple((one.size, one.dtype, one.device) for one in self.shapes)
        return (str(self.spec), self.rest, sizes)

    def filled(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and named arguments of such a call."""
        left = iter(tensors)
        leaves = [next(left) if one is None else one[0] for one in self.rest]
        given, options = pytree.tree_unflatten(leaves, self.spec)
        return given, options

    def __str__(self) -> str:
        return " ".join("x".join(map(str, one.size)) or "number" for one in self.shapes)


def flat(given: Sequence[Any], options: Mapping[str, Any]) -> tuple[Form, tuple[Tensor, ...]]:
    """A call's form and its tensors, in order."""
    leaves, spec = pytree.tree_flatten((tuple(given), dict(options)))
    tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
    rest = tuple(None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves)
    return Form(tuple(Shape.of(one) for one in tensors), rest, spec), tensors


@dataclass(eq=False)
class Program:
    """A compiled graph with the parameters it is called with. Any thread may call it; the answers are its own."""

    run: Callable[..., Any]
    constants: list[Any]
    """Parameters and buffers in the graph's order, None where an input goes."""
    places: list[tuple[int, int]]
    """Which place of the graph takes which input."""
    shapes: tuple[Shape, ...]
    slotted: bool = False
    """The stacked factors of slots are among its constants."""
    tried: bool = False
    """Its first answer was held against what the network itself answers."""
    weighed: bool = False
    """Whether a CUDA graph of it helps was measured."""
    graph: Callable[..., Tensor] | None = None

    def __call__(self, *tensors: Tensor) -> Tensor:
        inputs = list(self.constants)
        for place, number in self.places:
            inputs[place] = self.shapes[number].fit(tensors[number])
        answer: Tensor = self.run(*inputs)[0]
        return answer

    def let_go(self) -> bool:
        """Of its CUDA graph, whose memory is the device's; answers whether it had one."""
        had, self.graph = self.graph is not None, None
        return had


def twin(module: nn.Module) -> nn.Module:
    """The same layers with the same parameters, in modules of their own: what becomes of the first one's classes, which
    slots change, does not change what is being compiled."""
    made: dict[nn.Module, nn.Module] = {}

    def doubled(one: nn.Module) -> nn.Module:
        if one not in made:
            made[one] = other = copy.copy(one)
            for name in ("_parameters", "_buffers"):
                other.__dict__[name] = dict(one.__dict__[name])
            children = one.__dict__["_modules"].items()
            other.__dict__["_modules"] = {name: None if sub is None else doubled(sub) for name, sub in children}
        return made[one]

    return doubled(module)


@torch.inference_mode()
def compiled(
    network: Callable[..., Any],
    form: Form,
    backend: Backend,
    told: Callable[[Sequence[Tensor]], None] | None = None,
    more: Sequence[Shape] = (),
    turn: AbstractContextManager[Any] = nullcontext(),  # noqa: B008  # it keeps nothing
) -> Program:
    """Compile a network for calls of this form. It must answer a sequence whose first entry is a tensor.

    `more` are shapes of tensors that it reads from elsewhere, where `told` puts them for this thread; a program takes
    them after the others. `turn` is held while the program runs for the first time. No model is read while the network
    is traced; the backend begins after that. Raises what the backend raises, and CannotCompile.
    """
    shapes = (*form.shapes, *more)
    # Tensors that are nothing else, so that each is found again among what the graph is called with.
    inputs = [one.empty().zero_() for one in shapes]
    kept: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []

    def keep(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
        traced.close()
        run = backend(graph, examples)

        def once(*flat: Any) -> Any:
            kept.append((run, flat))
            with turn:
                return run(*flat)

        return once

    if told is not None:
        told(inputs[len(form.shapes) :])
    given, options = form.filled(inputs[: len(form.shapes)])
    traced = ExitStack()
    try:
        traced.enter_context(LOADING)
        torch.compile(lambda: network(*given, **options), backend=keep, fullgraph=True, dynamic=False)()
    finally:
        traced.close()
        # What torch keeps for calls like this one is of no use to us, and there is a limit to how many it takes.
        torch.compiler.reset()
    if len(kept) != 1:
        raise CannotCompile(f"one graph was expected, not {len(kept)}")
    run, called = kept[0]
    if not all(isinstance(one, Tensor) for one in called):
        raise CannotCompile(f"the graph takes more than tensors: {sorted({type(one).__name__ for one in called})}")
    numbers = {id(tensor): number for number, tensor in enumerate(inputs)}
    places = [(place, numbers[id(one)]) for place, one in enumerate(called) if id(one) in numbers]
    constants = [None if id(one) in numbers else one for one in called]
    return Program(run, constants, places, shapes, slotted=bool(more))
