"""Server-sent events of a batch, and what it takes to go on after the connection broke."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from random import Random

import httpx
import orjson

from farm.backoff import backoff
from farm.client import flows
from farm.client.calls import API, Call, Id, nothing, segment
from farm.errors import FarmError, TransientError, Unavailable
from farm.views import Event

SILENCE = 60.0
"""Seconds without a byte after which a stream counts as broken: the farm sends a comment more often than that."""
TRIES = 8
"""How often in a row a stream may break without bringing an event."""


@dataclass
class Parser:
    """Bytes in, events out. Knows `id`, `event`, `data` and comments; ignores what else the format may carry.

    It splits at newlines only: a prompt may hold U+2028, which `str.splitlines` and httpx take for a line's end.
    """

    _rest: bytes = b""
    _fields: dict[bytes, list[bytes]] = field(default_factory=dict)

    def feed(self, piece: bytes) -> Iterator[Event]:
        """The events that this piece completes. Raises FarmError for one that cannot be read."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            name, _, value = line.removesuffix(b"\r").partition(b":")
            if name:
                self._fields.setdefault(name, []).append(value.removeprefix(b" "))
            elif not value:  # an empty line ends the event; a comment has an empty name and a value
                fields, self._fields = self._fields, {}
                if b"data" in fields:
                    yield _event(fields)


def _event(fields: Mapping[bytes, list[bytes]]) -> Event:
    try:
        return Event.model_validate(
            {
                "id": fields.get(b"id", [b""])[-1].decode(),
                "event": fields.get(b"event", [b"message"])[-1].decode(),
                "data": orjson.loads(b"\n".join(fields[b"data"])),
            }
        )
    except ValueError as error:
        raise FarmError(f"the farm sent an event that cannot be read: {error}") from error


class Stream:
    """Where the reading of a batch's events stands: what came last, and whether it is worth going on."""

    def __init__(self, batch_id: Id, after: str | None, random: Random) -> None:
        self.ended = False
        self._batch_id = batch_id
        self._last = after
        self._random = random
        self._failures = 0
        self._parser = Parser()

    def call(self) -> Call[None]:
        """The request that opens the stream behind the last event that arrived."""
        self._parser = Parser()
        headers = {"Accept": "text/event-stream"}
        if self._last:
            headers["Last-Event-ID"] = self._last
        return Call("GET", f"{API}/batches/{segment(self._batch_id)}/events", nothing, headers=headers)

    def feed(self, piece: bytes) -> Iterator[Event]:
        for event in self._parser.feed(piece):
            self._failures = 0
            self._last = event.id or self._last
            self.ended = event.event == "done"
            yield event

    def broke(self, failure: Exception | None) -> float:
        """Seconds to wait before opening it again; raises once there is no use. `None` means it ended unannounced."""
        self._failures += 1
        if isinstance(failure, httpx.TransportError):
            failure = Unavailable(
                f"the events of batch {self._batch_id} broke off: {failure or type(failure).__name__}"
            )
        if failure and not isinstance(failure, TransientError):
            raise failure
        if self._failures > TRIES:
            raise failure or Unavailable(f"the events of batch {self._batch_id} end too early again and again")
        return backoff(self._failures, flows.FIRST_PAUSE, flows.LONGEST_PAUSE, self._random).total_seconds()
