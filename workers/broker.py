"""The Redis transport of a worker, made to survive what others leave in its queues.

Stock kombu ends a worker on one element that is not JSON or one key of the wrong type. Here such an element is logged
and dropped, such a key is moved aside, and the worker goes on. Nothing is kept as "unacknowledged" either: a doorbell
that is lost costs nothing, and restoring one would only ring for work long done.
"""

from contextlib import suppress
from queue import Empty
from time import time_ns
from typing import Any

import structlog
from kombu.transport import redis, virtual
from kombu.utils.encoding import bytes_to_str
from redis.exceptions import ResponseError

log = structlog.get_logger(__name__)


class Unkept(virtual.QoS):
    """Counts what is being worked on, in this process only."""

    restore_at_shutdown = False

    def restore_visible(self, *_: Any, **__: Any) -> None:
        """There is nothing to restore."""

    def restore_unacked(self, *_: Any, **__: Any) -> None:
        self._delivered.clear()


class Channel(redis.Channel):
    """Reads one message or none; raises only when the connection is gone."""

    QoS = Unkept

    def _brpop_read(self, **options: Any) -> Any:
        return self._survive(super()._brpop_read, **options)

    def _receive(self) -> Any:
        return self._survive(super()._receive)

    def _survive(self, read: Any, **options: Any) -> Any:
        try:
            return read(**options)
        except (Empty, *self.connection_errors):
            raise
        except ResponseError as error:
            if "WRONGTYPE" not in str(error):
                raise
            self._move_aside(self._lists(*self.active_queues))
        except Exception as error:  # noqa: BLE001  # what strangers write can raise anything; it is dropped whatever it was
            log.warning("dropped a message that is none", error=repr(error)[:300])
        raise Empty

    def _size(self, queue: str) -> int:
        return int(self._mended(super()._size, queue, wanted=self._lists(queue)))

    def _queue_bind(self, exchange: str, *args: Any) -> None:
        self._mended(super()._queue_bind, exchange, *args, wanted={self.keyprefix_queue % exchange: "set"})

    def _mended(self, call: Any, *args: Any, wanted: dict[str, str]) -> Any:
        try:
            return call(*args)
        except ResponseError as error:
            if "WRONGTYPE" not in str(error):
                raise
            self._move_aside(wanted)
            return call(*args)

    def _lists(self, *queues: str) -> dict[str, str]:
        return {self._q_for_pri(queue, step): "list" for queue in queues for step in self.priority_steps}

    def _move_aside(self, wanted: dict[str, str]) -> None:
        """Rename the keys that have another type than the wanted one. Kombu prefixes no key of these commands."""
        with self.conn_or_acquire() as client:
            for key, right in wanted.items():
                whole = self.global_keyprefix + key
                kind = bytes_to_str(client.type(whole))
                if kind not in (right, "none"):
                    aside = f"{whole}.not-a-{right}.{time_ns()}"
                    with suppress(ResponseError):
                        client.rename(whole, aside)
                    log.error("moved a key aside that stood in the way", key=whole, kind=kind, to=aside)


class Transport(redis.Transport):
    Channel = Channel
