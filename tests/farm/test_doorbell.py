"""Ringing: bounded, merged, and harmless whatever the broker does."""

import json
import signal
import time
from datetime import UTC, datetime, timedelta
from os import kill
from threading import Semaphore

import pytest
import structlog
from pydantic import SecretStr
from redis import Redis

from farm import doorbell
from farm.settings import Settings
from farm.stack import Servers


def queue(settings: Settings) -> str:
    return settings.redis_prefix + doorbell.queue_of(settings.pool)


def test_a_ring_is_one_json_message_that_expires(settings: Settings, redis: Redis) -> None:
    doorbell.ring(settings, settings.pool)
    assert doorbell.flush(settings)
    (message,) = redis.lrange(queue(settings), 0, -1)
    told = json.loads(message)
    assert told["content-type"] == "application/json"
    assert told["headers"]["task"] == doorbell.TASK
    expires = datetime.fromisoformat(told["headers"]["expires"])
    assert timedelta(seconds=50) < expires - datetime.now(UTC) <= settings.doorbell_expiry


def test_ringing_again_adds_nothing_to_a_bell_that_waits(settings: Settings, redis: Redis) -> None:
    for times in (1, 1, 3, 2):
        doorbell.ring(settings, settings.pool, times)
        assert doorbell.flush(settings)
    assert redis.llen(queue(settings)) == 3


def test_no_number_of_rings_fills_the_broker(settings: Settings, redis: Redis) -> None:
    doorbell.ring(settings, settings.pool, 1_000_000)
    assert doorbell.flush(settings, 5)
    assert redis.llen(queue(settings)) == doorbell.MOST_WAITING


def test_every_key_carries_the_prefix(settings: Settings, redis: Redis) -> None:
    before = set(redis.scan_iter())
    doorbell.ring(settings, settings.pool)
    assert doorbell.flush(settings)
    assert {
        key for key in set(redis.scan_iter()) - before if not key.decode().startswith(settings.redis_prefix)
    } == set()


def test_a_cancel_hint_is_published(settings: Settings, redis: Redis) -> None:
    with redis.pubsub(ignore_subscribe_messages=True) as channel:
        channel.subscribe(doorbell.cancel_channel(settings))
        channel.get_message(timeout=1)
        doorbell.hint_cancel(settings)
        end = time.monotonic() + 5
        while channel.get_message(timeout=0.5) is None:
            assert time.monotonic() < end


@pytest.mark.parametrize("url", ["redis://:nobody@127.0.0.1:9/0", "redis://:wrong@{address}/0"])
def test_a_broker_that_refuses_raises_nothing_and_blocks_nobody(settings: Settings, servers: Servers, url: str) -> None:
    address = settings.redis_url.get_secret_value().rpartition("@")[2].partition("/")[0]
    away = settings.model_copy(update={"redis_url": SecretStr(url.format(address=address))})
    began = time.monotonic()
    for _ in range(100):
        doorbell.ring(away, away.pool)
        doorbell.hint_cancel(away)
    assert time.monotonic() - began < 1


def test_an_outage_is_told_once_and_not_tried_for_every_ring(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []
    gone = True
    resting, rested = Semaphore(0), Semaphore(0)

    def tell(_: object, pool: str, times: int) -> None:
        tried.append(pool)
        if gone:
            raise ConnectionError("the broker is away")

    def rest(seconds: float) -> None:
        resting.release()
        assert rested.acquire(timeout=30)

    monkeypatch.setattr(doorbell._Ringer, "_ring", tell)
    monkeypatch.setattr(doorbell, "sleep", rest)
    away = settings.model_copy(update={"redis_prefix": f"{settings.redis_prefix}outage:"})
    with structlog.testing.capture_logs() as lines:
        for _ in range(2):
            doorbell.ring(away, "default")
            assert resting.acquire(timeout=30)
            # What is asked for meanwhile waits for the next try, as one.
            for pool in ("default",) * 50 + ("later",) * 50:
                doorbell.ring(away, pool)
            rested.release()
        assert resting.acquire(timeout=30)
        assert tried == ["default"] * 3
        gone = False
        doorbell.ring(away, "later")
        rested.release()
        assert doorbell.flush(away, 30)
    assert tried == ["default"] * 3 + ["later"]
    assert [line["log_level"] for line in lines] == ["warning", "info"]


def test_a_frozen_broker_blocks_nobody_and_is_rung_again_when_it_thaws(
    settings: Settings, servers: Servers, redis: Redis
) -> None:
    doorbell.ring(settings, settings.pool)
    assert doorbell.flush(settings)
    redis.delete(queue(settings))
    assert servers.valkey is not None
    assert servers.valkey.pid is not None
    kill(servers.valkey.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        for _ in range(50):
            doorbell.ring(settings, settings.pool)
            doorbell.hint_cancel(settings)
        assert time.monotonic() - began < 0.5
        assert doorbell.flush(settings, 6), "the thread gives up on its own"
    finally:
        kill(servers.valkey.pid, signal.SIGCONT)
    redis.delete(queue(settings))
    doorbell.ring(settings, settings.pool)
    assert doorbell.flush(settings, 5)
    assert redis.llen(queue(settings)) == 1
