"""Reading request bodies: JSON whole and checked, NDJSON spooled to disk in constant memory."""

import hashlib
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, Annotated, Any, TypeVar

import anyio.to_thread
from fastapi import Depends, Request
from pydantic import BaseModel, ValidationError

from api.errors import problems_of
from api.middleware import media_type
from farm import jsontext
from farm.errors import InvalidRequest, Unavailable, UnsupportedMedia
from farm.fields import refuse_flood

JSON = "application/json"
PIECE_BYTES = 1024 * 1024
"""An upload is written in pieces of about this size, each by a thread."""
LINE_BYTES = 1024 * 1024
"""Longest NDJSON line; a job of any sensible size is a hundredth of it."""

M = TypeVar("M", bound=BaseModel)


def refuse_encoding(request: Request) -> None:
    """Raises UnsupportedMedia for a compressed body: its real size is not known before it is read."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in {"", "identity"}:
        raise UnsupportedMedia(f"send the body as it is, not with Content-Encoding: {encoding}")


async def json_bytes(request: Request) -> bytes:
    """The body of a request that announces JSON, not parsed yet. Raises UnsupportedMedia."""
    found = media_type(request.headers)
    if found != JSON:
        raise UnsupportedMedia(f"send {JSON}, not {found or 'a body without a content type'}")
    refuse_encoding(request)
    return await request.body()


JsonBytes = Annotated[bytes, Depends(json_bytes)]


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object in a body; NaN, Infinity and a name given twice are refused. Raises InvalidRequest."""
    try:
        document = jsontext.loads(body)
    except ValueError as error:
        raise InvalidRequest("the body is not JSON", problems=[{"field": "", "problem": str(error)}]) from None
    if not isinstance(document, dict):
        problem = f"must be a JSON object, not {_kind(document)}"
        raise InvalidRequest("the body is not a JSON object", problems=[{"field": "", "problem": problem}])
    return document


def read(body: bytes, model: type[M]) -> M:
    """The body as this model. Raises InvalidRequest with every field that is wrong."""
    document = parse(body)
    try:
        refuse_flood(document, len(model.model_fields))
        return model.model_validate(document)
    except ValidationError as error:
        raise InvalidRequest("the body is not valid", problems=problems_of(error.errors())) from None
    except ValueError as error:
        raise InvalidRequest("the body is not valid", problems=[{"field": "", "problem": str(error)}]) from None


@asynccontextmanager
async def spooled(
    request: Request, folder: Path | None, *, of_lines: bool = False
) -> AsyncIterator[tuple[IO[bytes], bytes, int]]:
    """The body as a file on disk, rewound; its sha256; its bytes. Nothing is locked or held open while it arrives.

    One `of_lines` is refused while it arrives once a line of it is too long: it could be gigabytes. Raises
    InvalidRequest, and Unavailable when the disk has no room for it.
    """
    lengths = _Lengths()
    digest = hashlib.sha256()
    try:
        file = tempfile.TemporaryFile(dir=folder, prefix="farm-upload-")  # noqa: SIM115  # closed below
        try:
            waiting = bytearray()

            def write() -> None:
                digest.update(waiting)
                file.write(waiting)
                waiting.clear()

            async for chunk in request.stream():
                if of_lines:
                    lengths.look(chunk)
                waiting += chunk
                if len(waiting) >= PIECE_BYTES:
                    await anyio.to_thread.run_sync(write)
            await anyio.to_thread.run_sync(write)
            size = file.tell()
            file.seek(0)
        except BaseException:
            file.close()
            raise
    except OSError as error:
        raise Unavailable(f"the upload could not be spooled to disk: {error}") from error
    with file:
        yield file, digest.digest(), size


def lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of an NDJSON file, blank ones too, so that numbers fit. Raises InvalidRequest for an endless line."""
    number = 0
    while line := file.readline(LINE_BYTES + 1):
        number += 1
        if len(line) > LINE_BYTES:
            raise _too_long(number)
        yield line


class _Lengths:
    """How long the last line of a body is that arrives piece by piece. Lines within one piece are left to `lines`."""

    def __init__(self) -> None:
        self._number = 1
        self._open = 0

    def look(self, piece: bytes) -> None:
        """Raises InvalidRequest for an endless line."""
        end = piece.find(b"\n")
        if self._open + (len(piece) if end < 0 else end) > LINE_BYTES:
            raise _too_long(self._number)
        if end < 0:
            self._open += len(piece)
        else:
            self._number += piece.count(b"\n")
            self._open = len(piece) - 1 - piece.rfind(b"\n")


def _too_long(number: int) -> InvalidRequest:
    return InvalidRequest(
        "a line is too long; is this newline-delimited JSON?",
        problems=[{"line": number, "field": "", "problem": f"must be at most {LINE_BYTES} bytes"}],
    )


def _kind(document: object) -> str:
    return {list: "an array", str: "a string", type(None): "null", bool: "a truth value"}.get(
        type(document), "a number"
    )
