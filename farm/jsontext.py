"""JSON as the farm reads it: UTF-8, no NaN, and no name twice in one object (RFC 8259 leaves that open)."""

import json
from typing import Any

import orjson


def loads(text: bytes | bytearray | str) -> Any:
    """The value that a JSON text stands for. Raises ValueError, which says where and why.

    >>> loads(b'{"seed": 1, "prompt": "a: b"}')
    {'seed': 1, 'prompt': 'a: b'}
    >>> loads(b'{"seed": 1, "seed": 2}')
    Traceback (most recent call last):
    ValueError: "seed" stands twice in one object
    """
    document = orjson.loads(text)
    # Every name has its colon. Where there are no more colons than names, none was dropped, and most texts end here.
    colons = text.count(":") if isinstance(text, str) else text.count(b":")
    if colons != _names(document):
        try:
            json.loads(text, object_pairs_hook=_without_twins)
        except RecursionError:
            raise ValueError("nested too deeply") from None
    return document


def _names(document: Any) -> int:
    total = 0
    waiting = [document]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            total += len(value)
            value = value.values()
        elif not isinstance(value, list):
            continue
        waiting.extend(inner for inner in value if isinstance(inner, (dict, list)))
    return total


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) != len(pairs):
        seen: set[str] = set()
        twin = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f'"{twin}" stands twice in one object')
    return names
