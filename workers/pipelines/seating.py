"""What a micro-batch was staged with, and its ControlNets, motion adapter and VAE put beside their checkpoint."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from workers.pipelines.cache import Entry, Residents
from workers.pipelines.device import Device
from workers.pipelines.factors import Use
from workers.pipelines.guides import Guide
from workers.pipelines.load import Pipeline, weighed
from workers.pipelines.slots import distinct

HOST = torch.device("cpu")


@dataclass(eq=False)
class Staged:
    """Everything a micro-batch needs, read and checked, in host memory or on the device already.

    `styles` holds the adapters of each adapter set in it, `nets` and `vaes` by hash what goes beside the checkpoint,
    `guides` the pictures each recipe draws from. Keeps its checkpoint from being dropped until `close`, which rendering
    does; an abandoned one closes itself.
    """

    entry: Entry
    acceleration: tuple[Use, ...]
    styles: dict[str, tuple[Use, ...]]
    nets: dict[str, Any] = field(default_factory=dict)
    vaes: dict[str, Any] = field(default_factory=dict)
    guides: tuple[Guide, ...] = ()
    finalizer: weakref.finalize[..., Staged] | None = None

    def close(self) -> None:
        """Let go of the checkpoint. Harmless when repeated."""
        if self.finalizer is not None:
            self.finalizer()

    @property
    def bytes(self) -> int:
        """Bytes of weights it cannot be rendered without, adapters aside: its checkpoint and what goes beside that."""
        return self.entry.loaded.bare_bytes + weighed((*self.nets.values(), *self.vaes.values()))

    def bytes_ahead(self, *, slots: bool) -> int:
        """Bytes of pristine copies and slots that rendering it will add, at most."""
        pipeline, styles = self.entry.loaded, list(self.styles.values())
        if slots:
            ahead = pipeline.slots.extra_bytes(list(distinct(styles)))
            return ahead + pipeline.merger.extra_bytes(self.acceleration)
        return pipeline.merger.extra_bytes([*self.acceleration, *(use for uses in styles for use in uses)])

    def shelves(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """What lies beside the checkpoint, and what of that kind is wanted there."""
        pipeline = self.entry.loaded
        yield pipeline.nets, self.nets
        yield pipeline.vaes, self.vaes


Forget = Callable[[Pipeline, Any], None]
"""Called with a pipeline and a network of its that leaves the device."""


def seat(staged: Staged, residents: Residents, device: Device, forget: Forget) -> None:
    """Its checkpoint and what goes beside that on the device, inside the device lock: room first, then what is moved.

    What else is beside it leaves where there is no room, then its slots. Raises OutOfMemory where that is not enough.
    """
    residents.admit(staged.entry)
    pipeline = staged.entry.loaded
    new = [
        (kept, hash_, net) for kept, wanted in staged.shelves() for hash_, net in wanted.items() if hash_ not in kept
    ]
    extra = weighed(net for _, _, net in new)
    tighten(staged, extra, device, forget, with_slots=True)
    residents.reserve(staged.entry, extra)
    for kept, hash_, net in new:
        try:
            kept[hash_] = net.to(device.place)
        except BaseException:
            # Half of it would stay there, counted by nobody, for as long as it is staged.
            net.to(HOST)
            raise
    staged.entry.bytes = pipeline.bytes


def tighten(staged: Staged, extra: int, device: Device, forget: Forget, *, with_slots: bool) -> None:
    """Have `extra` bytes more fit beside this checkpoint, as far as its own things may go: what nobody wants now."""
    pipeline = staged.entry.loaded
    if pipeline.bytes + extra > device.budget:
        clear_others(staged, forget)
    if with_slots and pipeline.bytes + extra > device.budget:
        pipeline.clear_slots()


def clear_others(staged: Staged, forget: Forget) -> bool:
    """What lies beside this checkpoint and is not wanted now leaves the device. Answers whether anything did."""
    pipeline, gone = staged.entry.loaded, False
    for kept, wanted in staged.shelves():
        for hash_ in kept.keys() - wanted.keys():
            net = kept.pop(hash_)
            pipeline.moving.pop(hash_, None)
            forget(pipeline, net)
            # The micro-batch that is staged next may hold it: in host memory then.
            net.to(HOST)
            gone = True
    return gone
