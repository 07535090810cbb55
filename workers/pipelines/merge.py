"""Adapters applied to the live weights in place, always from the pristine copy.

`copy_` into the same storage keeps compiled and captured graphs valid. Nothing is ever subtracted: after any sequence
of sets the weights are bit-equal to a fresh load with the last set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from workers.pipelines.factors import Factors, Use

Contribution = tuple[str, float]
"""What one adapter adds to one weight: its hash and its weight. Equal lists of these give equal weights."""


class Merger:
    """The live weights of one pipeline and the set of adapters that is in them now."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        """`modules` maps canonical weight names to the modules that hold them."""
        self._modules = modules
        self._pristine: dict[str, Tensor] = {}
        self._now: dict[str, tuple[Contribution, ...]] = {}
        self.uses: tuple[Contribution, ...] = ()
        """The set merged now, in the order it is added up."""
        self.text_uses: tuple[Contribution, ...] = ()
        """The part of it that changes text encoders: what a prompt's embedding depends on."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical weight name -> shape, for every weight an adapter may touch."""
        return {name: tuple(self._live(name).shape) for name in self._modules}

    @property
    def bytes(self) -> int:
        """Bytes of the pristine copies."""
        return sum(tensor.nbytes for tensor in self._pristine.values())

    @property
    def touched(self) -> frozenset[str]:
        """Names of the weights that differ from the checkpoint's own."""
        return frozenset(self._pristine)

    def extra_bytes(self, uses: Sequence[Use]) -> int:
        """Bytes of pristine copies that applying this set would add."""
        wanted = {name for adapter, weight in uses if weight for name in adapter.factors}
        return sum(self._live(name).nbytes for name in wanted - self._pristine.keys())

    @torch.no_grad()
    def apply(self, uses: Sequence[Use]) -> int:
        """Make the live weights those of this set and no other. Answers how many weights were written.

        Order does not matter: contributions are added in order of hash and weight. Only weights whose contributions
        changed are written. On any error every weight is pristine again before the error leaves.
        """
        ordered = _ordered(uses)
        wanted: dict[str, list[Use]] = {}
        for adapter, weight in ordered:
            for name in adapter.factors:
                wanted.setdefault(name, []).append((adapter, weight))
        written = 0
        try:
            for name in self._now.keys() - wanted.keys():
                self._restore(name)
                written += 1
            for name, parts in wanted.items():
                contributions = tuple((adapter.hash, weight) for adapter, weight in parts)
                if self._now.get(name) != contributions:
                    self._write(name, [(adapter.factors[name], weight) for adapter, weight in parts])
                    self._now[name] = contributions
                    written += 1
        except BaseException:
            self.clear()
            raise
        self.uses = tuple((adapter.hash, weight) for adapter, weight in ordered)
        self.text_uses = text_key(ordered)
        return written

    @torch.no_grad()
    def clear(self) -> None:
        """Every weight as the checkpoint has it."""
        for name in tuple(self._pristine):
            self._restore(name)
        self.uses = self.text_uses = ()

    def move(self, device: torch.device) -> None:
        """The pristine copies to the device the live weights were moved to."""
        self._pristine = {name: tensor.to(device) for name, tensor in self._pristine.items()}

    def _live(self, name: str) -> Tensor:
        weight = self._modules[name].weight
        assert isinstance(weight, Tensor)  # noqa: S101  # nn.Module types its attributes as Tensor or Module
        return weight

    def _restore(self, name: str) -> None:
        self._live(name).copy_(self._pristine[name])
        self._now.pop(name, None)
        del self._pristine[name]

    def _write(self, name: str, parts: Sequence[tuple[Factors, float]]) -> None:
        live = self._live(name)
        if name not in self._pristine:
            self._pristine[name] = live.detach().clone(memory_format=torch.preserve_format)
        # Added up in float32 and rounded once, whatever the live number type.
        total = self._pristine[name].float().reshape(live.shape[0], -1)
        for place, (factors, weight) in enumerate(parts):
            up = factors.up.to(live.device, torch.float32).reshape(live.shape[0], -1)
            down = factors.down.to(live.device, torch.float32).reshape(factors.rank, -1)
            # The first sum is a new tensor, because float32 weights are not copied before.
            total = torch.addmm(total, up, down, alpha=weight * factors.scale, out=total if place else None)
        live.copy_(total.view(live.shape))


def text_key(uses: Sequence[Use]) -> tuple[Contribution, ...]:
    """The part of a set that changes text encoders, in the order it is added up."""
    return tuple((adapter.hash, weight) for adapter, weight in _ordered(uses) if adapter.changes_text)


def _ordered(uses: Sequence[Use]) -> list[Use]:
    return sorted((use for use in uses if use[1]), key=lambda use: (use[0].hash, use[1]))
