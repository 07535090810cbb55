"""Sizes of micro-batches that compiled programs are made for, so that there are few of them.

Rows are added behind those that were asked for, as copies of the last one, and what they are answered is dropped. That
happens where a compiled network is asked and nowhere else: seeds, noise, costs and eager networks never see such a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Buckets:
    """Powers of two; and, so that a full micro-batch is never padded, `most` images and what halving makes of it, with
    guidance (two rows an image) and without."""

    def __init__(self, most: int = 1) -> None:
        self._own: list[int] = []
        size = 2 * most
        while size > 1:
            self._own.append(size)
            size = (size + 1) // 2

    def of(self, rows: int) -> int:
        """How many rows so many are computed as."""
        return min([1 << (rows - 1).bit_length(), *(size for size in self._own if size >= rows)])

    def padded(self, tensors: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], int | None]:
        """The tensors with the rows of their bucket, and how many rows there were.

        Every tensor with dimensions has a row for each image in front; others are as they were. Where that is not so
        nothing is added, and the number is None.
        """
        counts = {len(tensor) for tensor in tensors if tensor.ndim}
        if len(counts) != 1:
            return tuple(tensors), None
        (rows,) = counts
        missing = self.of(rows) - rows
        if not missing:
            return tuple(tensors), rows
        return tuple(_longer(tensor, missing) if tensor.ndim else tensor for tensor in tensors), rows


def _longer(tensor: Tensor, missing: int) -> Tensor:
    return torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])])
