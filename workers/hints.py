"""Listening for cancel hints: without one a worker learns of a cancel at its next heartbeat, with one at once."""

from collections.abc import Callable
from threading import Event, Thread

import structlog
from redis.exceptions import RedisError

from farm import doorbell
from farm.settings import Settings

LISTEN_SECONDS = 1.0
SILENCE_SECONDS = 15
"""After this long without a word the connection is tried with a ping."""
PAUSE_SECONDS = 2.0

log = structlog.get_logger(__name__)


def start_listening(settings: Settings, on_hint: Callable[[], None], stop: Event) -> None:
    """Call `on_hint` at every cancel hint until `stop`, in a thread of its own. A broker that is away costs nothing."""
    Thread(target=_listen_on, args=[settings, on_hint, stop], name="hints", daemon=True).start()


def _listen_on(settings: Settings, on_hint: Callable[[], None], stop: Event) -> None:
    while not stop.is_set():
        try:
            _listen(settings, on_hint, stop)
        except (RedisError, OSError) as error:
            log.debug("no cancel hints", error=repr(error)[:300])
            stop.wait(PAUSE_SECONDS)


def _listen(settings: Settings, on_hint: Callable[[], None], stop: Event) -> None:
    with doorbell.connect(settings, timeout=5.0) as client, client.pubsub(ignore_subscribe_messages=True) as channel:
        channel.subscribe(doorbell.cancel_channel(settings))
        silent = 0.0
        while not stop.is_set():
            if channel.get_message(timeout=LISTEN_SECONDS) is not None:
                on_hint()
                silent = 0.0
            elif (silent := silent + LISTEN_SECONDS) >= SILENCE_SECONDS:
                channel.ping()
                silent = 0.0
