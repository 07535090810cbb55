"""How a call becomes arguments of httpx, the same for the blocking and the asynchronous client."""

import ssl
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from functools import cache
from typing import Any
from urllib.parse import urlsplit

import httpx

from farm import __version__
from farm.client.calls import CHUNK_BYTES, AsyncRows, Call, Row, line
from farm.client.connection import Connection
from farm.errors import InvalidRequest

USER_AGENT = f"lcm-farm/{__version__}"
LINGER_SECONDS = 5.0
"""Rows that come slowly are sent at least this often: the farm gives up on an upload that stays silent for a minute."""


def api_options(connection: Connection, timeout: float) -> dict[str, Any]:
    """For the client that talks to the API and holds the key."""
    headers = {"User-Agent": USER_AGENT, "Accept": "application/json"}
    if connection.api_key:
        headers["Authorization"] = f"Bearer {connection.api_key}"
    return {"base_url": connection.url, "headers": headers} | _common(connection, timeout)


def storage_options(connection: Connection, timeout: float) -> dict[str, Any]:
    """For the client that follows presigned URLs: it must not carry our key to where the pictures lie."""
    return {"headers": {"User-Agent": USER_AGENT}} | _common(connection, timeout)


def _common(connection: Connection, timeout: float) -> dict[str, Any]:
    # A proxy from the environment cannot reach the farm of this machine, and must not see its key.
    here = urlsplit(connection.url).hostname in {"127.0.0.1", "::1", "localhost"}
    return {"timeout": httpx.Timeout(timeout, connect=10.0), "trust_env": not here, "verify": _authorities(not here)}


@cache
def _authorities(trust_env: bool) -> ssl.SSLContext:
    """Whom TLS trusts. Reading that list takes longer than most requests: once for all clients of a process."""
    return httpx.create_ssl_context(trust_env=trust_env)


def arguments(call: Call[Any]) -> dict[str, Any]:
    """Everything but the body. Presigned URLs keep their query as it was signed."""
    given = {"method": call.method, "url": call.path, "headers": dict(call.headers)}
    return given | {"params": list(call.params)} if call.params else given


class _Piece:
    """NDJSON lines gathered until they are worth sending."""

    def __init__(self) -> None:
        self._lines = bytearray()
        self._sent = time.monotonic()

    def add(self, row: Row) -> bytes:
        """Take a row in; what to send now, which mostly is nothing yet."""
        self._lines += line(row)
        full = len(self._lines) >= CHUNK_BYTES
        return self.rest() if full or time.monotonic() - self._sent >= LINGER_SECONDS else b""

    def rest(self) -> bytes:
        """What was gathered and not sent yet."""
        lines = bytes(self._lines)
        self._lines.clear()
        self._sent = time.monotonic()
        return lines


def chunks(rows: AsyncRows) -> Iterator[bytes]:
    """Rows as NDJSON in pieces of about CHUNK_BYTES; never more than one piece in memory."""
    if not isinstance(rows, Iterable):
        raise InvalidRequest("Farm reads an ordinary iterable; AsyncFarm reads an asynchronous one too")
    piece = _Piece()
    for row in rows:
        if now := piece.add(row):
            yield now
    if rest := piece.rest():
        yield rest


async def async_chunks(rows: AsyncRows) -> AsyncIterator[bytes]:
    """The same of either kind of iterable."""
    if not isinstance(rows, AsyncIterable):
        for lines in chunks(rows):
            yield lines
        return
    piece = _Piece()
    async for row in rows:
        if now := piece.add(row):
            yield now
    if rest := piece.rest():
        yield rest
