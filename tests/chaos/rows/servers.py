"""Rows about the servers: R3 broker, R4 Postgres."""

import os
import signal
import time
from collections.abc import Callable

from redis import Redis
from sqlalchemy import text

from farm import doorbell
from farm.stack.service import Service
from tests.chaos.harness import Chaos
from tests.chaos.setting import verdict
from tests.chaos.trickle import Trickle

PICKLE = (
    '{"body": "gASVBgAAAAAAAABdlC4=", "content-encoding": "binary", "content-type": "application/x-python-serialize",'
    ' "headers": {"task": "farm.render", "id": "1"}, "properties": {"delivery_tag": "1", "delivery_info":'
    ' {"exchange": "", "routing_key": "x"}, "body_encoding": "base64", "correlation_id": "1"}}'
)
FORGED = PICKLE.replace("application/x-python-serialize", "application/json").replace("farm.render", "os.system")
LONGEST_START_SECONDS = 300.0
MOST_TIMES = 1.2
"""How many times as long as with a broker a submission may take without one, at p99."""
GARBAGE = (b"\xff\xfe", "not json", "42", "[]", "null", "{}", '{"body": 1, "properties": {}}', PICKLE, FORGED)


def trouble_the_broker(
    chaos: Chaos, *, restarts: int, every: float, down: float, turns: int, each: int, pause: float, normal: float
) -> None:
    """R3. The broker is killed and comes back empty, is down, frozen, full, emptied, and filled with garbage.

    `down`: seconds for which it is away, `turns` times, between `normal` seconds. `each`: how often it has each of the
    other troubles, for `pause` seconds.
    """
    broker = chaos.servers.valkey
    assert broker is not None
    chaos.keep(3)
    chaos.ready()
    with Trickle(chaos) as trickle:
        trickle.phase = "restarts"
        for _ in range(restarts):
            crash(broker, signal.SIGKILL)
            revive(chaos, broker)
            chaos.figures.add("broker kills")
            time.sleep(every)
        for _ in range(turns):
            # Beside normal: what is normal is measured right before and right after, as machines have their moods.
            trickle.phase = "normal"
            time.sleep(normal / 2)
            trickle.phase = "gone"
            _go_away(chaos, broker, down)
            trickle.phase = "normal"
            time.sleep(normal / 2)
        trickle.phase = "others"
        for _ in range(each):
            for trouble in (freeze_broker, fill_broker, empty_broker, litter_broker):
                trouble(chaos, broker, pause)
                chaos.figures.add(trouble.__name__.removesuffix("_broker"))
    chaos.until_done(120)
    waited = [
        (float(row.claimed - row.created), chaos.stalls.within(float(row.created), float(row.claimed)))
        for row in chaos.ask("""
            SELECT extract(epoch FROM created_at) AS created, extract(epoch FROM started_at) AS claimed FROM jobs
            WHERE attempt = 1 AND started_at IS NOT NULL
        """)
    ]
    slowest, stood = max(waited, key=lambda one: one[0] - one[1])
    chaos.figures.add("slowest claim s", slowest)
    chaos.figures.said["slowest claim"] = verdict(slowest, chaos.bound, stood=stood, slack=chaos.slack)
    for phase in ("normal", "gone"):
        chaos.figures.add(f"submissions {phase}", len(trickle.seconds.get(phase, [])))
        chaos.figures.add(f"p50 {phase} ms", trickle.percentile(phase, 50) * 1000)
        chaos.figures.add(f"p99 {phase} ms", trickle.percentile(phase, 99) * 1000)
    times = trickle.percentile("gone", 99) / trickle.percentile("normal", 99)
    chaos.figures.add("p99 gone to normal", times)
    # Speed is told, and no row fails for it.
    reached = "reached" if times <= MOST_TIMES else "missed"
    chaos.figures.said["p99 gone to normal"] = f"{times:.2f} of {MOST_TIMES:g} times: {reached}"
    if slowest - stood > chaos.bound + chaos.slack:
        chaos.fail(f"a job waited {slowest:.1f} s to be claimed; {chaos.bound:.0f} s are promised")


def _go_away(chaos: Chaos, broker: Service, seconds: float) -> None:
    """Kill the broker and start it again after that time, or when something was rendered without it."""
    crash(broker, signal.SIGKILL)
    try:
        gone_at = chaos.ask("SELECT clock_timestamp() AS moment")[0].moment
        time.sleep(seconds)
        rendered = "SELECT count(*) AS n FROM chaos_moves WHERE at > :at AND new = 'succeeded'"
        moved = chaos.until(lambda: chaos.ask(rendered, at=gone_at)[0].n, 60, "something is rendered without a broker")
    finally:
        revive(chaos, broker)
    chaos.figures.add("rendered without a broker", moved)


def crash(service: Service, number: signal.Signals) -> None:
    """Send a server a signal that ends it, and wait until it is gone."""
    assert service.pid is not None
    os.kill(service.pid, number)
    end = time.monotonic() + 30
    while service.alive:
        assert time.monotonic() < end, f"{service.name} did not end"
        time.sleep(0.01)
    service.mark_dead(restarting=True)


def revive(chaos: Chaos, service: Service) -> None:
    """Start a server that died, as the supervisor does."""
    service.program = chaos.servers.revived(service)
    service.start()


def _client(chaos: Chaos) -> "Redis":
    return Redis.from_url(chaos.settings.redis_url.get_secret_value(), socket_timeout=5)


def freeze_broker(_chaos: Chaos, broker: Service, seconds: float) -> None:
    assert broker.pid is not None
    os.kill(broker.pid, signal.SIGSTOP)
    try:
        time.sleep(seconds)
    finally:
        os.kill(broker.pid, signal.SIGCONT)


def fill_broker(chaos: Chaos, _broker: Service, seconds: float) -> None:
    with _client(chaos) as redis:
        redis.config_set("maxmemory", "1")
        try:
            time.sleep(seconds)
        finally:
            redis.config_set("maxmemory", "0")


def empty_broker(chaos: Chaos, _broker: Service, seconds: float) -> None:
    with _client(chaos) as redis:
        redis.flushall()
    time.sleep(seconds)


def litter_broker(chaos: Chaos, _broker: Service, seconds: float) -> None:
    """Messages that are none, forged ones, and a key of the wrong type in place of the queue."""
    queue = chaos.settings.redis_prefix + doorbell.queue_of(chaos.settings.pool)
    with _client(chaos) as redis:
        for message in chaos.random.sample(GARBAGE, len(GARBAGE)):
            redis.lpush(queue, message)
        time.sleep(seconds)
        redis.delete(queue)
        redis.set(queue, "a string in place of a queue")
        chaos.until(lambda: redis.type(queue) != b"string", 30, "a key of the wrong type is moved aside")


def trouble_postgres(chaos: Chaos, *, crashes: int, cutting: float, lock: float) -> None:
    """R4. Postgres stops at once and is started again; all connections are cut; somebody locks the jobs.

    `cutting`: for so many seconds all connections are cut every two. `lock`: seconds of a lock on the whole table.
    """
    server = chaos.servers.postgres
    assert server is not None
    chaos.keep(3)
    chaos.ready()
    with Trickle(chaos) as trickle:
        for _ in range(crashes):
            trickle.phase = "crashes"
            chaos.kill(chaos.until(lambda: chaos.catch(chaos.holding())))
            back = crash_postgres(chaos, server)
            chaos.until(lambda back=back: _moved(chaos, back), 60, "work goes on after a restart")  # type: ignore[misc]
            chaos.figures.recoveries.append((back, time.time()))
            time.sleep(chaos.random.uniform(1, 3))
        trickle.phase = "cutting"
        _every(2.0, cutting, lambda: cut_connections(chaos))
        trickle.phase = "locked"
        chaos.blocked += lock
        with chaos.database.transaction() as conn:
            conn.execute(text("SET LOCAL lock_timeout = '60s'"))
            conn.execute(text("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE"))
            time.sleep(lock)
    chaos.until_done(120)


def crash_postgres(chaos: Chaos, server: Service) -> float:
    """Stop Postgres at once and start it again a second later; answers when it was back, in the history's seconds.

    Nobody could take jobs back before, and nobody may until the server was up for a lease: the bound counts from the
    last start, for every victim whose jobs are still held.
    """
    # While it replays its log nobody can renew or rescue: what may be late is late by that, too.
    before, chaos.blocked = chaos.blocked, LONGEST_START_SECONDS
    crash(server, signal.SIGQUIT)
    time.sleep(1)
    revive(chaos, server)
    back = time.time()
    started = "SELECT extract(epoch FROM clock_timestamp() - pg_postmaster_start_time()) AS s"
    chaos.blocked = max(before, float(chaos.until(lambda: chaos.ask(started))[0].s))
    held = {row.worker_id for row in chaos.ask("SELECT worker_id FROM claims WHERE closed_at IS NULL")}
    for worker in chaos.workers:
        if worker.killed_at is not None and worker.id in held:
            worker.killed_at = back
    chaos.figures.add("postgres crashes")
    return back


def _moved(chaos: Chaos, since: float) -> bool:
    found = chaos.ask("SELECT 1 FROM chaos_moves WHERE at > to_timestamp(:since) LIMIT 1", since=since)
    return bool(found)


def cut_connections(chaos: Chaos) -> None:
    cut = chaos.ask("""
        SELECT count(pg_terminate_backend(pid)) AS n FROM pg_stat_activity
        WHERE datname = current_database() AND pid <> pg_backend_pid()
    """)
    chaos.figures.add("connections cut", cut[0].n)


def _every(pause: float, seconds: float, act: Callable[[], None]) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        act()
        time.sleep(min(pause, seconds))
