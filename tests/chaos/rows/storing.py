"""R6: everything S3 can do to a worker that uploads."""

import signal
import time

from farm.stack.service import Service
from tests.chaos.faults import Faults
from tests.chaos.harness import Chaos
from tests.chaos.proxy import Proxy, Trouble
from tests.chaos.rows.servers import crash, revive

TROUBLES: tuple[Trouble, ...] = ("busy", "full", "expired", "gone", "cut")
BITE_SECONDS = 90.0
"""How long a trouble is waited for to spoil a request, beyond its time: workers may be sitting in a slow one."""


def trouble_s3(chaos: Chaos, *, jobs: int, delay: float, lasting: float, rounds: int, errors: float) -> None:
    """R6. Every trouble lasts `lasting` seconds, `rounds` times over, while jobs are rendered; S3 is killed and started
    again, and slow requests wait `delay` seconds. Last, a share of all requests fails until the end."""
    store = chaos.servers.s3
    assert store is not None
    assert chaos.settings.s3_endpoint_url is not None
    with Proxy(chaos.settings.s3_endpoint_url, chaos.random.randrange(10**6)) as proxy:
        proxy.delay = delay
        # Only the workers go this way: what is stored is judged without it.
        chaos.worker_settings = {"s3_endpoint_url": proxy.url}
        chaos.keep(3, Faults(step_seconds=0.02))
        chaos.ready()
        pieces = rounds * (len(TROUBLES) + 2) + 1
        for _ in range(rounds):
            for trouble in TROUBLES:
                _befall(chaos, proxy, trouble, jobs // pieces, lasting)
            _kill(chaos, proxy, store, jobs // pieces)
            # Last, as workers sit in slow requests for a while, and nothing else could befall them meanwhile.
            _befall(chaos, proxy, "slow", jobs // pieces, lasting)
        proxy.cause("busy", errors)
        chaos.client.submit(jobs - (pieces - 1) * (jobs // pieces))
        chaos.until_done(120 + delay * 4 + jobs * 0.1)
        if not proxy.bitten:
            chaos.fail(f"{errors:.0%} of the requests should have failed, and none did: the row tried nothing of it")
        chaos.figures.add("spoilt requests", proxy.spoilt)
        chaos.keep(0)
        for worker in chaos.alive():
            worker.process.kill()


def _befall(chaos: Chaos, proxy: Proxy, trouble: Trouble, jobs: int, lasting: float) -> None:
    """One trouble, until it has spoilt something and its time is over."""
    proxy.cause(trouble)
    chaos.client.submit(jobs)
    chaos.history.write("s3", trouble=trouble)
    time.sleep(lasting)
    chaos.until(lambda: proxy.bitten, BITE_SECONDS, f"S3 is {trouble} and a request is spoilt by it")
    proxy.relent()
    chaos.figures.add(f"spoilt {trouble}", proxy.bitten)
    time.sleep(lasting / 2)


def _kill(chaos: Chaos, proxy: Proxy, store: Service, jobs: int) -> None:
    """S3 is away until somebody asked it for something."""
    before = proxy.unanswered
    crash(store, signal.SIGKILL)
    try:
        chaos.client.submit(jobs)
        time.sleep(1)
        chaos.until(lambda: proxy.unanswered > before, BITE_SECONDS, "S3 is away and a request misses it")
    finally:
        revive(chaos, store)
    chaos.figures.add("s3 kills")
