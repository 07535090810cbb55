"""Who is calling: API keys looked up through `farm.keys`, remembered for a few seconds."""

import hashlib
import time
from collections.abc import Callable
from threading import Lock

from starlette.datastructures import Headers

from farm.db import Database
from farm.errors import Unauthorized
from farm.keys import Caller, authenticate

REMEMBER_SECONDS = 3.0
"""A key revoked in another process works here for at most this long; one that expires not a moment longer."""
REMEMBER_KEYS = 10_000


class Authenticator:
    """Looks keys up; only successes are remembered, by a digest, so no key lies in memory in the clear."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.monotonic) -> None:
        self._database = database
        self._clock = clock
        self._known: dict[bytes, tuple[Caller, float]] = {}
        self._generation = 0
        self._lock = Lock()

    def remembered(self, key: str) -> Caller | None:
        """The caller of a key seen a moment ago; never blocks."""
        with self._lock:
            caller, until = self._known.get(_digest(key), (None, 0.0))
        return caller if until > self._clock() else None

    def look_up(self, key: str) -> Caller:
        """The caller of a key, from the database. Raises Unauthorized."""
        generation, began = self._generation, self._clock()
        with self._database.transaction() as conn:
            caller = authenticate(conn, key)
        until = self._clock() + REMEMBER_SECONDS
        if caller.seconds_left is not None:
            # Counted from before the database was asked: never too late.
            until = min(until, began + caller.seconds_left)
        with self._lock:
            # A key revoked while we were reading must not be remembered.
            if generation == self._generation:
                if len(self._known) >= REMEMBER_KEYS:
                    self._known.clear()
                self._known[_digest(key)] = (caller, until)
        return caller

    def forget(self) -> None:
        """Look every key up again: one was revoked."""
        with self._lock:
            self._generation += 1
            self._known.clear()


def key_of(headers: Headers) -> str:
    """The API key a request carries. Raises Unauthorized if it has none."""
    authorization = headers.get("authorization")
    if authorization is not None:
        kind, _, value = authorization.partition(" ")
        if kind.lower() == "bearer" and value.strip():
            return value.strip()
        raise Unauthorized("the Authorization header must read: Bearer <key>")
    key = headers.get("x-api-key", "").strip()
    if not key:
        raise Unauthorized
    return key


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
