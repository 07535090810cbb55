"""Compiled programs serve few numbers of rows; what is padded for them nobody else sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from workers.pipelines.buckets import Buckets
from workers.pipelines.compiling import Compiler
from workers.pipelines.load import Pipeline

from .compilers import HERE, Backend, ask, compiled, pipeline, tiny

__all__ = ["pipeline", "tiny"]


def test_powers_of_two_and_a_full_micro_batch() -> None:
    eight, twelve = Buckets(8), Buckets(12)
    assert [eight.of(rows) for rows in (1, 2, 3, 5, 8, 9, 16, 17)] == [1, 2, 4, 8, 8, 16, 16, 32]
    assert [twelve.of(rows) for rows in (12, 24)] == [12, 24], "with guidance and without, nothing is added"
    assert [twelve.of(rows) for rows in (6, 3)] == [6, 3], "nor to its halves"
    assert [twelve.of(rows) for rows in (4, 5, 7, 13)] == [4, 6, 8, 16]
    sizes = {eight.of(rows) for rows in range(1, 9)}
    assert sizes == {1, 2, 4, 8}, "four programs for eight sizes"


def test_rows_are_added_behind_the_others() -> None:
    given = (torch.arange(6.0).view(3, 2), torch.tensor(7), torch.tensor([4, 5, 6]))
    wide, rows = Buckets().padded(given)
    assert rows == 3
    assert wide[0].tolist() == [[0, 1], [2, 3], [4, 5], [4, 5]]
    assert wide[1] is given[1], "a number is everybody's"
    assert wide[2].tolist() == [4, 5, 6, 6], "the slots of a row that is there: any others might not be"
    whole = torch.ones(4, 2)
    assert Buckets().padded((whole,))[0][0] is whole
    other = (torch.ones(3, 2), torch.ones(5))
    assert Buckets().padded(other) == (other, None), "what has no rows that agree stays as it is"


def test_sizes_of_one_bucket_share_a_program(pipeline: Pipeline) -> None:
    backend = Backend()
    compiler = Compiler(HERE, backend, most=8)
    compiled(compiler, pipeline, torch.randn(3, 4))
    before = backend.calls
    for rows in (3, 4):
        assert ask(compiler, pipeline, torch.randn(rows, 4)).shape == (rows, 4)
    assert (backend.graphs, backend.calls, len(pipeline.programs)) == (1, before + 2, 1)
    compiled(compiler, pipeline, torch.randn(5, 4))
    for rows in (5, 6, 7, 8):
        ask(compiler, pipeline, torch.randn(rows, 4))
    assert (backend.graphs, compiler.told()["ready"]) == (2, 2)


def test_the_network_itself_never_sees_them(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    forward = pipeline.unet.forward

    def counted(x: Tensor, **options: Any) -> Any:
        seen.append(len(x))
        return forward(x, **options)

    monkeypatch.setattr(pipeline.unet, "forward", counted)
    for compiler in (Compiler(HERE, None), Compiler(HERE, Backend())):
        ask(compiler, pipeline, torch.randn(3, 4), 2)
    assert set(seen) == {3}
    assert (Compiler(HERE, None).rows(3), Compiler(HERE, Backend()).rows(3)) == (3, 4), "what estimates count"
