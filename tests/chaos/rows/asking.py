"""Rows about messages and orders: R7, R9."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread

from redis import Redis

from farm import doorbell
from tests.chaos.client import spread
from tests.chaos.faults import Faults
from tests.chaos.harness import Chaos

EACH = 10
"""How often every doorbell is rung."""


def repeat_doorbells(chaos: Chaos, *, jobs: int, silence: float) -> None:
    """R7. Every doorbell ten times, and those that wait in any order; then none at all, while work comes in all the
    same."""
    loud = Faults(rings=EACH)
    for part in ("api", "sweeper"):
        chaos.stop_part(part)
        chaos.start(part, loud)
    chaos.keep(3, loud)
    queue = chaos.settings.redis_prefix + doorbell.queue_of(chaos.settings.pool)
    with Redis.from_url(chaos.settings.redis_url.get_secret_value()) as redis:
        before = _pushes(redis)[0]
        with _while_running(lambda: _shuffle(chaos, redis, queue)):
            for some in spread(jobs // 2, 10):
                chaos.client.submit(some)
                time.sleep(0.1)
            chaos.until_done(60 + jobs * 0.1)
        heard = _pushes(redis)[0] - before
        chaos.figures.add("doorbells", heard)
        # What several submissions in a moment wish for is rung once.
        if heard < 2 * EACH:
            chaos.fail(f"{heard} doorbells were rung: the row tried nothing")
        with _silence(chaos, redis, queue):
            end = time.monotonic() + silence
            for some in spread(jobs - jobs // 2, 10):
                chaos.client.submit(some)
                time.sleep(silence / 20)
            chaos.until_done(60 + jobs * 0.1)
            time.sleep(max(0.0, end - time.monotonic()))


@contextmanager
def _silence(chaos: Chaos, redis: "Redis", queue: str) -> Iterator[None]:
    """Nobody may put anything into a list of the broker while the block runs. Emptying the queue would not do: a worker
    that waits there gets a message in the moment in which it comes."""
    redis.execute_command("ACL", "SETUSER", "default", "-lpush")
    try:
        redis.delete(queue)
        heard, refused = _pushes(redis)
        yield
        heard_since, refused_since = (now - then for now, then in zip(_pushes(redis), (heard, refused), strict=True))
    finally:
        redis.execute_command("ACL", "SETUSER", "default", "+lpush")
    chaos.figures.add("doorbells silenced", refused_since)
    if heard_since:
        chaos.fail(f"{heard_since} doorbells were heard in the silence")
    if not refused_since:
        chaos.fail("nobody rang a doorbell in the silence: the row tried nothing")


def _pushes(redis: "Redis") -> tuple[int, int]:
    """How often something was put into a list, and how often that was refused, since the broker started."""
    done = redis.info("commandstats").get("cmdstat_lpush", {})
    return int(done.get("calls", 0)), int(done.get("rejected_calls", 0))


def _shuffle(chaos: Chaos, redis: "Redis", queue: str) -> None:
    """Take what waits in the queue and put it back in another order."""
    with redis.pipeline(transaction=True) as pipe:
        pipe.lrange(queue, 0, -1)
        pipe.delete(queue)
        waiting = pipe.execute()[0]
    if waiting:
        chaos.random.shuffle(waiting)
        redis.rpush(queue, *waiting)
        chaos.figures.add("doorbells shuffled", len(waiting))


class _while_running:  # noqa: N801  # reads as the statement it is used as
    """Does something every few milliseconds while the block runs."""

    def __init__(self, act: Callable[[], object]) -> None:
        self._act = act
        self._done = Event()
        self._thread = Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(10)

    def _run(self) -> None:
        while not self._done.wait(0.01):
            self._act()


def order_at_random(chaos: Chaos, *, orders: int, batches: int) -> None:
    """R9. Cancel, pause, resume and retry at random moments; at the end everything may go on, and ends."""
    chaos.keep(3)
    made = [chaos.client.submit(12).id for _ in range(batches)]
    for _ in range(orders):
        verb = chaos.random.choice(("cancel", "pause", "resume", "retry", "retry"))
        batch = chaos.random.choice(made)
        status = chaos.client.tell(batch, verb)
        # A retry finds nothing to retry, or a batch that is still being cancelled.
        if status != 200 and not (verb == "retry" and status == 409):
            chaos.fail(f"{verb} was answered {status}")
        chaos.figures.add(f"orders {verb}")
        time.sleep(chaos.random.uniform(0, 0.05))
    for batch in made:
        chaos.client.tell(batch, "resume")
    chaos.until_done(60 + orders * 0.1)
