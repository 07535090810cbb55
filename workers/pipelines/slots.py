"""Different style adapters, at different weights, for each image of one micro-batch.

The low-rank factors of several adapters lie stacked in slots beside a layer's own weights. Each row of a micro-batch
names its slots and their weights, and a batched matrix product adds what its adapters add: one forward pass, one graph,
whatever the rows ask for. Only tensors change from one micro-batch to the next, so a compiled UNet is compiled once,
and again only when the layers, the rank or the number of slots grow.

Needs nothing but torch.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from workers.pipelines.factors import Adapter, Factors, Use

MOST_RANK = 128
"""Adapters of a higher rank are merged: in slots they would cost more than the layer they change."""
LEAST_RANK = 4
SLOTS_AT_ONCE = 8
"""Slots are made in such groups, beside slot 0, which changes nothing."""


class Chosen(NamedTuple):
    """What each row of a micro-batch is given: `slot` (rows, depth) and `scale` (rows, depth * rank)."""

    slot: Tensor
    scale: Tensor

    def of(self, part: slice) -> Chosen:
        """The same for some of the rows."""
        return Chosen(self.slot[part], self.scale[part])

    def twice(self) -> Chosen:
        """For guidance, where every row is computed without its prompt and with it."""
        return Chosen(torch.cat([self.slot] * 2), torch.cat([self.scale] * 2))


class Rows(threading.local):
    """What the rows that this thread is computing were given. Parts of a micro-batch may run in several threads."""

    slot: Tensor
    scale: Tensor

    def are(self, chosen: Chosen) -> None:
        self.slot, self.scale = chosen

    @property
    def now(self) -> tuple[Tensor, Tensor]:
        """What this thread was told last."""
        return self.slot, self.scale

    def tell(self, tensors: Sequence[Tensor]) -> None:
        """As `are`, of what `now` answers."""
        self.slot, self.scale = tensors


class _Slotted(nn.Module):
    """What a slotted layer carries: stacked factors `slot_down` (slots, rank, in[, kh, kw]), `slot_up` (slots, rank,
    out)."""

    slot_down: Tensor
    slot_up: Tensor
    slot_rows: Rows

    def up(self, out: Tensor, low: Tensor) -> Tensor:
        """`out` (rows, n, features) and what the low-rank values (rows, n, depth * rank) of its rows add to it."""
        rows = self.slot_rows
        return torch.baddbmm(out, low * rows.scale.unsqueeze(1), self.slot_up[rows.slot].flatten(1, 2))


class SlottedLinear(_Slotted, nn.Linear):
    """A linear layer whose rows each have adapters of their own."""

    def forward(self, x: Tensor) -> Tensor:
        out = nn.Linear.forward(self, x)
        down = self.slot_down[self.slot_rows.slot].flatten(1, 2)
        flat = x.reshape(len(down), -1, self.in_features)
        low = torch.bmm(flat, down.transpose(1, 2))
        return self.up(out.reshape(len(down), -1, self.out_features), low).view(out.shape)


class SlottedConv2d(_Slotted, nn.Conv2d):
    """A convolution whose rows each have adapters of their own: the rows become groups of one convolution."""

    def forward(self, x: Tensor) -> Tensor:
        out = nn.Conv2d.forward(self, x)
        down = self.slot_down[self.slot_rows.slot]
        rows, depth, rank = down.shape[:3]
        low = functional.conv2d(
            x.reshape(1, rows * self.in_channels, *x.shape[2:]),
            down.reshape(rows * depth * rank, *down.shape[3:]),
            None,
            self.stride,
            self.padding,
            self.dilation,
            groups=rows,
        )
        pixels = low.view(rows, depth * rank, -1).transpose(1, 2)
        flat = out.permute(0, 2, 3, 1).reshape(rows, -1, self.out_channels)
        height, width = out.shape[2:]
        return self.up(flat, pixels).view(rows, height, width, self.out_channels).permute(0, 3, 1, 2)


KINDS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: SlottedLinear, nn.Conv2d: SlottedConv2d}
"""Layers that take slots, and what they turn into while slots are in use. Same weights, same names."""


class Slots:
    """The slots of one UNet. Everything here belongs inside the device lock."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        """`modules` maps the canonical names of the UNet's weights to the modules that hold them."""
        self._modules = modules
        self._kept: OrderedDict[str, tuple[int, frozenset[str]]] = OrderedDict()
        self._installed: set[str] = set()
        self._engaged: frozenset[str] | None = None
        self._made = 0
        self.rows = Rows()
        self.rank = LEAST_RANK
        self.count = 0

    @property
    def resident(self) -> tuple[str, ...]:
        """Hashes of the adapters in slots, least recently used first."""
        return tuple(self._kept)

    @property
    def engaged(self) -> tuple[int, frozenset[str]] | None:
        """What a compiled graph depends on: which stacks there are, by how often some were made, and the layers that
        take them now. None while slots rest."""
        return None if self._engaged is None else (self._made, self._engaged)

    @property
    def bytes(self) -> int:
        """Bytes of all stacked factors."""
        return sum(tensor.nbytes for name in self._installed for tensor in self._stacks(name))

    def takes(self, adapters: Collection[Adapter]) -> bool:
        """Whether these adapters can be in slots: no rank too high, no layer of a kind that has no slots."""
        return all(
            factors.rank <= MOST_RANK and self._fits(self._modules[name])
            for adapter in adapters
            for name, factors in adapter.unet_part.items()
        )

    def extra_bytes(self, adapters: Collection[Adapter]) -> int:
        """Bytes that putting these adapters into slots would add, at most."""
        count, rank = self._wanted(adapters)
        names = self._installed.union(*(adapter.unet_part for adapter in adapters))
        total = 0
        for name in names:
            weight = self._weight(name)
            total += count * rank * (weight[0].numel() + weight.shape[0]) * weight.element_size()
        return max(0, total - self.bytes)

    @torch.no_grad()
    def put(self, adapters: Collection[Adapter]) -> int:
        """Have all of these in slots; what was used longest ago makes room. Answers how many were written."""
        by_hash = {adapter.hash: adapter for adapter in adapters}
        self._grow(*self._wanted(adapters), names=set().union(*(adapter.unet_part for adapter in adapters)))
        for known in by_hash.keys() & self._kept.keys():
            self._kept.move_to_end(known)
        missing = [adapter for name, adapter in sorted(by_hash.items()) if name not in self._kept]
        for adapter in missing:
            free = set(range(1, self.count)) - {slot for slot, _ in self._kept.values()}
            slot = min(free) if free else self._kept.popitem(last=False)[1][0]
            try:
                self._write(slot, adapter.unet_part)
            except BaseException:
                # A slot half written belongs to nobody.
                self._kept.pop(adapter.hash, None)
                raise
            self._kept[adapter.hash] = (slot, frozenset(adapter.unet_part))
        return len(missing)

    def choose(self, rows: Sequence[Sequence[Use]]) -> Chosen:
        """The slots of each row's adapters, all of which were `put`. Rows with fewer get the slot that changes nothing.

        The depth is a power of two, so that few numbers of adapters an image make few graphs.
        """
        depth = 1 << (max(1, *(len(uses) for uses in rows)) - 1).bit_length() if rows else 1
        slot = torch.zeros((len(rows), depth), dtype=torch.int64)
        scale = torch.zeros((len(rows), depth))
        for row, uses in enumerate(rows):
            for place, (adapter, weight) in enumerate(sorted(uses, key=lambda use: (use[0].hash, use[1]))):
                slot[row, place] = self._kept[adapter.hash][0]
                scale[row, place] = weight
        like = self._weight(next(iter(self._installed))) if self._installed else scale
        return Chosen(
            slot.to(like.device), scale.repeat_interleave(self.rank, dim=1).to(device=like.device, dtype=like.dtype)
        )

    def engage(self) -> None:
        """From now on the layers that adapters in slots change take them. Rows have to be told before a forward."""
        wanted = frozenset[str]().union(*(names for _, names in self._kept.values()))
        for name in self._installed:
            module = self._modules[name]
            plain = self._plain(module)
            module.__class__ = KINDS[plain] if name in wanted else plain
        self._engaged = wanted

    def rest(self) -> None:
        """Every layer as it was. The stacked factors stay for the next time."""
        if self._engaged is not None:
            for name in self._installed:
                module = self._modules[name]
                module.__class__ = self._plain(module)
        self._engaged = None

    def clear(self) -> None:
        """Let go of all slots and their memory."""
        self.rest()
        for name in self._installed:
            module = self._modules[name]
            del module.slot_down, module.slot_up, module.slot_rows
        self._made += 1
        self._installed.clear()
        self._kept.clear()
        self.rank, self.count = LEAST_RANK, 0

    def _wanted(self, adapters: Collection[Adapter]) -> tuple[int, int]:
        """How many slots of which rank there have to be for these."""
        groups = -(-len({adapter.hash for adapter in adapters}) // SLOTS_AT_ONCE)
        ranks = [factors.rank for adapter in adapters for factors in adapter.unet_part.values()]
        rank = 1 << (max([self.rank, *ranks]) - 1).bit_length()
        return max(self.count, 1 + groups * SLOTS_AT_ONCE), rank

    def _grow(self, count: int, rank: int, names: Collection[str]) -> None:
        """Make room for so many slots of this rank in these layers and those that have slots; what is there stays."""
        larger = (count, rank) != (self.count, self.rank)
        for name in self._installed.union(names):
            if name in self._installed and not larger:
                continue
            self._made += 1
            module, weight = self._modules[name], self._weight(name)
            down = weight.new_zeros((count, rank, *weight.shape[1:]))
            up = weight.new_zeros((count, rank, weight.shape[0]))
            if name in self._installed:
                old_down, old_up = self._stacks(name)
                down[: len(old_down), : old_down.shape[1]] = old_down
                up[: len(old_up), : old_up.shape[1]] = old_up
                module.slot_down, module.slot_up = down, up
            else:
                module.register_buffer("slot_down", down, persistent=False)
                module.register_buffer("slot_up", up, persistent=False)
                module.slot_rows = self.rows  # type: ignore[assignment]  # no tensor, and no module either
                self._installed.add(name)
        self.count, self.rank = count, rank

    def _write(self, slot: int, part: Mapping[str, Factors]) -> None:
        for name in self._installed:
            down, up = self._stacks(name)
            down[slot].zero_()
            up[slot].zero_()
            if factors := part.get(name):
                down[slot, : factors.rank] = factors.down.to(down.device).reshape(factors.rank, *down.shape[2:])
                # Scaled in float32 and rounded once, as merging does.
                scaled = factors.up.to(up.device, torch.float32).flatten(1).t() * factors.scale
                up[slot, : factors.rank] = scaled

    def _stacks(self, name: str) -> tuple[Tensor, Tensor]:
        module = self._modules[name]
        down, up = module.slot_down, module.slot_up
        assert isinstance(down, Tensor)  # noqa: S101  # nn.Module types its attributes as Tensor or Module
        assert isinstance(up, Tensor)  # noqa: S101
        return down, up

    def _weight(self, name: str) -> Tensor:
        weight = self._modules[name].weight
        assert isinstance(weight, Tensor)  # noqa: S101
        return weight

    @staticmethod
    def _plain(module: nn.Module) -> type[nn.Module]:
        return next(plain for plain, slotted in KINDS.items() if type(module) in (plain, slotted))

    @staticmethod
    def _fits(module: nn.Module) -> bool:
        if isinstance(module, nn.Conv2d):
            plain = module.groups == 1 and module.padding_mode == "zeros"
            return plain and type(module) in (nn.Conv2d, SlottedConv2d)
        return type(module) in (nn.Linear, SlottedLinear)


def distinct(rows: Sequence[Sequence[Use]]) -> Iterator[Adapter]:
    """Every adapter of these rows once."""
    yield from {adapter.hash: adapter for uses in rows for adapter, _ in uses}.values()
