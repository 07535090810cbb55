"""What goes over the broker: every message on its channels (hints, and the events that Flower shows), and its keys."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from threading import Event, Thread
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from farm.settings import Settings
from tests.chaos.invariants import Violation
from tests.chaos.secrets import named_in

PATIENCE_SECONDS = 5.0
AGAIN_SECONDS = 0.2


class Listener:
    """Hears all channels until it is closed, through every outage of the broker, and looks for secrets in them."""

    def __init__(self, settings: Settings, secrets: Mapping[str, str]) -> None:
        self.heard = 0
        self._leaks: set[Violation] = set()
        self._settings, self._secrets = settings, secrets
        self._done = Event()
        self._thread = Thread(target=self._run, name="listener", daemon=True)
        self._thread.start()

    @property
    def leaks(self) -> list[Violation]:
        """What was heard that nobody may say. Every row makes the broker talk: silence means that nobody listened."""
        return [*self._leaks] if self.heard else [Violation("secret", "nothing was heard on the broker")]

    def close(self) -> None:
        self._done.set()
        self._thread.join(10)

    def _run(self) -> None:
        while not self._done.is_set():
            with suppress(RedisError, OSError), _client(self._settings) as client, client.pubsub() as channels:
                channels.psubscribe("*")
                while not self._done.is_set():
                    message = channels.get_message(ignore_subscribe_messages=True, timeout=AGAIN_SECONDS)
                    if message is not None:
                        self._look(message["channel"], message["data"])
            self._done.wait(AGAIN_SECONDS)

    def _look(self, channel: bytes, data: bytes) -> None:
        self.heard += 1
        for name in named_in(channel + b" " + data, self._secrets):
            self._leaks.add(Violation("secret", f"{name} was said on the broker's channel {channel!r}"))


def in_keys(settings: Settings, secrets: Mapping[str, str]) -> list[Violation]:
    """Secrets in the names and values of what a farm has in the broker."""
    try:
        with _client(settings) as client:
            return [
                Violation("secret", f"{name} stands in the broker at {key!r}")
                for key in client.scan_iter(f"{settings.redis_prefix}*")
                for name in named_in(key + b" " + b" ".join(_values(client, key)), secrets)
            ]
    except (RedisError, OSError) as error:
        return [Violation("secret", f"the broker could not be searched: {error!r}")]


def _values(client: "Redis", key: bytes) -> Iterator[bytes]:
    found: Any = None
    match client.type(key):
        case b"string":
            found = [client.get(key) or b""]
        case b"list":
            found = client.lrange(key, 0, -1)
        case b"set":
            found = client.smembers(key)
        case b"hash":
            found = [part for pair in client.hgetall(key).items() for part in pair]  # type: ignore[union-attr]
        case b"zset":
            found = client.zrange(key, 0, -1)
    yield from found or ()


def _client(settings: Settings) -> "Redis":
    url = settings.redis_url.get_secret_value()
    return Redis.from_url(url, socket_timeout=PATIENCE_SECONDS, socket_connect_timeout=PATIENCE_SECONDS)
