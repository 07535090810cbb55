"""What is not a safetensors file, or lies about its tensors, is refused before anything is read from it."""

import contextlib
import io
import json
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from farm.errors import InvalidModel
from farm.safefile import HEADER_LIMIT, TensorInfo, read_header

GOOD = save({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.float16)}, {"made_by": "test"})


def write(folder: Path, body: bytes) -> Path:
    path = folder / "x.safetensors"
    path.write_bytes(body)
    return path


def file_with(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_a_good_file(tmp_path: Path) -> None:
    header = read_header(write(tmp_path, GOOD))
    assert header.tensors == {"a": TensorInfo("F32", (2, 3)), "b": TensorInfo("F16", (4,))}
    assert header.metadata == {"made_by": "test"}


def _zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo("data.pkl"), pickle.dumps({}))
    return buffer.getvalue()


def tensor(**changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (pickle.dumps({"a": 1}), "pickle or an archive"),
        (_zipped(), "pickle or an archive"),
        (b"", "not a safetensors file"),
        (b"GIF89a" + b"\0" * 100, "not a safetensors file"),
        (struct.pack("<Q", HEADER_LIMIT + 1) + b"{" * 64, "not a safetensors file"),
        (struct.pack("<Q", 2**63) + b"{}", "not a safetensors file"),
        (struct.pack("<Q", 8) + b"{" * 8, "not JSON"),
        (file_with([1, 2]), "not an object"),
        (file_with({"__metadata__": {"a": 1}}), "__metadata__"),
        (file_with({"a": {"dtype": "F32"}}, b"\0" * 8), "a: malformed"),
        (file_with({"a": 7}), "a: malformed"),
        (file_with({"a": tensor(dtype="OBJECT")}, b"\0" * 8), "a: unknown number type"),
        (file_with({"a": tensor(shape=[-2])}, b"\0" * 8), "a: sizes and offsets"),
        (file_with({"a": tensor(shape=[True, 2])}, b"\0" * 8), "a: sizes and offsets"),
        (file_with({"a": tensor(shape=[2**62, 4])}, b"\0" * 8), "a: 8 bytes do not hold"),
        (file_with({"a": tensor(shape=[2**63])}, b"\0" * 8), "a: 8 bytes do not hold"),
        (file_with({"a": tensor(shape=[2**63, 0])}, b"\0" * 8), "a: 8 bytes do not hold"),
        (file_with({"a": tensor(shape=[1] * 65_536)}, b"\0" * 8), "a: 8 bytes do not hold"),
        (struct.pack("<Q", 180_000) + b'{"a":' + b"[" * 179_995, "not JSON"),
        (file_with({"a": tensor()}, b"\0" * 4), "describes 8 bytes of data, the file holds 4"),
        (file_with({"a": tensor(), "b": tensor()}, b"\0" * 8), "overlap"),
        (file_with({"a": tensor(data_offsets=[4, 12])}, b"\0" * 12), "gaps"),
    ],
)
def test_refusals(tmp_path: Path, body: bytes, reason: str) -> None:
    with pytest.raises(InvalidModel, match=rf"x\.safetensors: .*{reason}"):
        read_header(write(tmp_path, body))


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.mark,)


def test_a_pickle_under_our_name_is_not_unpickled(tmp_path: Path) -> None:
    mark = tmp_path / "it-ran"
    with pytest.raises(InvalidModel, match="pickle or an archive"):
        read_header(write(tmp_path, pickle.dumps(Canary(mark))))
    assert not mark.exists()
    pickle.loads(pickle.dumps(Canary(mark)))  # noqa: S301  # the canary can sing
    assert mark.exists()


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, len(GOOD) - 1), value=st.integers(0, 255))
def test_a_damaged_byte_never_raises_anything_else(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    damaged = bytearray(GOOD)
    damaged[position] = value
    path = write(tmp_path_factory.getbasetemp(), bytes(damaged))
    with contextlib.suppress(InvalidModel):
        read_header(path)
