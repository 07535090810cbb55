"""A micro-batch in as many parts as it takes: by adapter set where weights are merged, and smaller after each time
memory ran out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from workers.pipelines.render import OnStep, Picture

RenderPart = Callable[[Sequence[int], OnStep], list[Picture | None] | None]
"""Renders the images at these places at once. None when memory ran out, with everything it held let go."""


def in_parts(
    groups: Sequence[Sequence[int]],
    steps: int,
    on_step: OnStep,
    once: RenderPart,
    size: Callable[[], int],
    shrink: Callable[[int], None],
) -> list[Picture | None]:
    """Render every place of every group, never two groups at once and at most `size()` images at once.

    Answers pictures by place, None for dropped ones. `on_step` counts the steps of all parts together and answers
    places to drop; a part of which every image is dropped is not rendered at all. `shrink(images)` is told each time so
    many were too many, and raises when there is nothing smaller to try.
    """
    pictures: list[Picture | None] = [None] * sum(map(len, groups))
    dropped: set[int] = set()
    before = 0
    for number, group in enumerate(groups):
        rest = list(group)
        while rest:
            part = rest[: size()]
            if dropped.issuperset(part):
                rest = rest[len(part) :]
                continue
            to_go = [one for some in (rest, *groups[number + 1 :]) for one in _chunks(some, size())]
            total = before + steps * sum(not dropped.issuperset(one) for one in to_go)

            def heard(
                done: int, _: int, part: list[int] = part, before: int = before, total: int = total
            ) -> Collection[int]:
                dropped.update(on_step(before + done, total))
                return [place for place, index in enumerate(part) if index in dropped]

            made = once(part, heard)
            if made is None:
                shrink(len(part))
                continue
            for index, picture in zip(part, made, strict=True):
                pictures[index] = picture
            before += steps
            rest = rest[len(part) :]
    return pictures


def _chunks(places: Sequence[int], size: int) -> list[Sequence[int]]:
    return [places[start : start + size] for start in range(0, len(places), size)]
