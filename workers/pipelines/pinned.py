"""Page-locked host memory, from which a GPU copies faster."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def block(bytes_: int) -> int:
    """Bytes that torch takes from the system for page-locked memory of so many: the next power of two
    (`torch.cuda.host_memory_stats` says so)."""
    return 1 << (bytes_ - 1).bit_length() if bytes_ else 0


def pin(tensors: Iterable[Tensor], room: int) -> None:
    """Where there is a GPU, put these tensors into page-locked memory, if that takes no more than `room` bytes.

    All of them or none: half of a checkpoint would come back no faster, and page-locked memory cannot be paged out.
    """
    every = list(tensors)
    if torch.cuda.is_available() and sum(block(tensor.nbytes) for tensor in every) <= room:
        for tensor in every:
            tensor.data = tensor.data.pin_memory()


def taken(tensors: Iterable[Tensor]) -> int:
    """Bytes of host memory behind these tensors, each storage counted once and a page-locked one as the block it is."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = block(storage.nbytes()) if tensor.is_pinned() else storage.nbytes()
    return sum(storages.values())
