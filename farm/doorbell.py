"""The doorbell: a message in Redis that says "there is work in this pool" and decides nothing.

Ringing never blocks its caller and never raises: a thread of this module talks to the broker, with a second's patience.
A lost ring costs seconds, because idle workers ask on their own and the sweeper rings again.
"""

import atexit
import os
from dataclasses import dataclass, field
from threading import Condition, Lock, Thread
from time import monotonic, sleep
from typing import Any
from urllib.parse import urlsplit

import structlog
from celery import Celery
from kombu import Exchange, Queue
from redis import Redis

from farm.settings import Settings

TASK = "farm.render"
PATIENCE_SECONDS = 1.0
"""How long one exchange with the broker may take when ringing."""
AWAY_SECONDS = 1.0
"""How long a broker that did not answer is left alone. What is wished for meanwhile waits for the next try."""
MOST_WAITING = 64
"""Messages waiting in one pool at most. Whoever hears one rings on if work is left, so few are enough for thousands."""
WORKER_TIMEOUT_SECONDS = 15.0
"""A worker's socket timeout; it must outlast kombu's blocking pop of one second."""

log = structlog.get_logger(__name__)


def queue_of(pool: str) -> str:
    """The queue of a pool's doorbells, without the prefix that every key in Redis has."""
    return f"doorbell.{pool}"


def make_app(settings: Settings, *, timeout: float = PATIENCE_SECONDS) -> Celery:
    """A Celery app for one farm. The worker's app is this one with a task and a longer `timeout` (seconds)."""
    url = settings.redis_url.get_secret_value()
    queue = queue_of(settings.pool)
    app = Celery("farm", broker=url, set_as_current=False)
    app.conf.update(
        # Only JSON is read: pickle in a queue is refused, not run.
        task_serializer="json",
        accept_content=["json"],
        event_serializer="json",
        # Messages are hints: nothing is kept, restored, retried or scheduled in Redis.
        result_backend=None,
        task_ignore_result=True,
        task_acks_late=False,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        worker_send_task_events=True,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_connection_max_retries=None,
        broker_connection_retry=True,
        broker_connection_retry_on_startup=True,
        broker_channel_error_retry=True,
        broker_connection_timeout=timeout,
        broker_pool_limit=2,
        broker_use_ssl={"ssl_cert_reqs": "required"} if urlsplit(url).scheme == "rediss" else None,
        broker_transport_options={
            "global_keyprefix": settings.redis_prefix,
            "socket_timeout": timeout,
            "socket_connect_timeout": timeout,
            "socket_keepalive": True,
            "health_check_interval": 10,
            "max_retries": 0 if timeout <= PATIENCE_SECONDS else None,
        },
        task_queues=[Queue(queue, Exchange(""), routing_key=queue)],
        task_default_queue=queue,
        task_create_missing_queues=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        timezone="UTC",
    )
    return app


def ring(settings: Settings, pool: str, times: int = 1) -> None:
    """See that at least `times` doorbells (64 at most) wait in `pool`. Answers at once; never raises.

    Several calls in a moment become one. Call it after the commit, never before.
    """
    _ringer(settings).ring(pool, times)


def hint_cancel(settings: Settings) -> None:
    """Tell workers that running jobs were cancelled, so that they ask now and not at the next heartbeat."""
    _ringer(settings).hint_cancel()


def flush(settings: Settings, seconds: float = PATIENCE_SECONDS) -> bool:
    """Wait until everything asked for so far was told, `seconds` at most; answers whether it was."""
    return _ringer(settings).flush(seconds)


def cancel_channel(settings: Settings) -> str:
    """The Redis channel of cancel hints."""
    return f"{settings.redis_prefix}cancel"


def connect(settings: Settings, timeout: float = PATIENCE_SECONDS) -> "Redis":
    """A plain Redis client (strings decoded) whose every wait ends after `timeout` seconds."""
    return Redis.from_url(
        settings.redis_url.get_secret_value(),
        socket_timeout=timeout,
        socket_connect_timeout=timeout,
        socket_keepalive=True,
        decode_responses=True,
    )


@dataclass
class _Ringer:
    """One thread that tells one broker; wishes are merged while it is busy, so bursts and outages pile nothing up."""

    settings: Settings
    _changed: Condition = field(default_factory=Condition)
    _rings: dict[str, int] = field(default_factory=dict)
    _cancel: bool = False
    _busy: bool = False

    def __post_init__(self) -> None:
        self._app = make_app(self.settings)
        self._redis = connect(self.settings)
        Thread(target=self._run, name="doorbell", daemon=True).start()

    def ring(self, pool: str, times: int) -> None:
        with self._changed:
            self._rings[pool] = max(self._rings.get(pool, 0), min(times, MOST_WAITING))
            self._changed.notify_all()

    def hint_cancel(self) -> None:
        with self._changed:
            self._cancel = True
            self._changed.notify_all()

    def flush(self, seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not (self._rings or self._cancel or self._busy), seconds)

    def _run(self) -> None:
        away = False
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._rings or self._cancel)
                rings, self._rings = self._rings, {}
                cancel, self._cancel = self._cancel, False
                self._busy = True
            started = monotonic()
            try:
                if cancel:
                    self._redis.publish(cancel_channel(self.settings), "look")
                for pool, times in rings.items():
                    self._ring(pool, times)
            except Exception as error:  # noqa: BLE001  # whatever a broken broker raises, the next ring is tried again
                # One line for an outage: a try and a line for every submission would take the processor from requests.
                if not away:
                    seconds = round(monotonic() - started, 3)
                    log.warning("doorbell not rung, and none until the broker answers", error=repr(error)[:300],
                                seconds=seconds)  # fmt: skip
                away = True
                sleep(AWAY_SECONDS)
            else:
                if away:
                    log.info("doorbells ring again")
                away = False

    def _ring(self, pool: str, times: int) -> None:
        queue = queue_of(pool)
        # What waits there already will be heard after our commit, so it announces our jobs as well as a new message.
        waiting: Any = self._redis.llen(self.settings.redis_prefix + queue)
        for _ in range(times - int(waiting)):
            self._app.send_task(
                TASK,
                args=[pool],
                exchange="",
                routing_key=queue,
                expires=self.settings.doorbell_expiry.total_seconds(),
                ignore_result=True,
                retry=False,
            )


_ringers: dict[tuple[int, str, str], _Ringer] = {}
_making = Lock()


def _ringer(settings: Settings) -> _Ringer:
    # A forked child has no thread of its parent's: the pid keeps it from waiting for one.
    key = (os.getpid(), settings.redis_url.get_secret_value(), settings.redis_prefix)
    with _making:
        found = _ringers.get(key)
        if found is None:
            found = _ringers[key] = _Ringer(settings)
        return found


@atexit.register
def _last_words() -> None:
    """A short-lived process still tells what it was asked to."""
    for key, ringer in list(_ringers.items()):
        if key[0] == os.getpid():
            ringer.flush(PATIENCE_SECONDS)
