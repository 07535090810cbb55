"""Safetensors files, looked at before anything is read from them."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from farm.errors import InvalidModel

HEADER_LIMIT = 16 * 1024 * 1024
"""Bytes. The header of a whole SDXL checkpoint is 0.4 MB; anything near this is no model."""

ITEM_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip

PICKLE_STARTS = (b"\x80", b"PK\x03\x04", b"(lp", b"(dp", b"\x1f\x8b")
"""How pickles, zipped pickles and gzipped files begin."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as the header describes it."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """What a safetensors file says about itself."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """The checked header of a safetensors file; no tensor data is read.

    Raises InvalidModel when the file is anything else, is cut short, or describes tensors that do not fit in it.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if start.startswith(PICKLE_STARTS) and not _plausible(start, size):
                raise InvalidModel(f"{path.name}: this is a pickle or an archive; only safetensors files are accepted")
            if not _plausible(start, size):
                raise InvalidModel(
                    f"{path.name}: not a safetensors file (no sensible header length in its first 8 bytes)"
                )
            (length,) = struct.unpack("<Q", start)
            raw = file.read(length)
    except OSError as error:
        raise InvalidModel(f"{path.name}: cannot be read ({error.strerror})") from error
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise InvalidModel(f"{path.name}: the safetensors header is not JSON") from error
    if not isinstance(body, dict):
        raise InvalidModel(f"{path.name}: the safetensors header is not an object")
    metadata = body.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InvalidModel(f"{path.name}: __metadata__ must hold strings only")
    return Header(_tensors(path.name, body, size - 8 - length), metadata)


def _plausible(start: bytes, size: int) -> bool:
    return len(start) == 8 and 2 <= struct.unpack("<Q", start)[0] <= min(HEADER_LIMIT, size - 8)


def _tensors(name: str, body: dict[str, Any], room: int) -> dict[str, TensorInfo]:
    """Every tensor checked; together they must fill the data part exactly, without gaps or overlaps."""
    found: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int]] = []
    for key, entry in body.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            numbers = [begin, end, *shape]
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidModel(f"{name}: {key}: malformed entry in the header") from error
        if dtype not in ITEM_BITS:
            raise InvalidModel(f"{name}: {key}: unknown number type {dtype!r}")
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise InvalidModel(f"{name}: {key}: sizes and offsets must be whole numbers from 0")
        if (end - begin) * 8 != math.prod(shape) * ITEM_BITS[dtype]:
            raise InvalidModel(f"{name}: {key}: {end - begin} bytes do not hold shape {shape} of {dtype}")
        spans.append((begin, end))
        found[key] = TensorInfo(dtype, tuple(shape))
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise InvalidModel(f"{name}: tensors overlap or leave gaps at byte {position}")
        position = end
    if position != room:
        raise InvalidModel(f"{name}: the header describes {position} bytes of data, the file holds {room}")
    return found
