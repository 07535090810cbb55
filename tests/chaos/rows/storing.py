"""R6: everything S3 can do to a worker that uploads."""

import signal
import time

from tests.chaos.faults import Faults
from tests.chaos.harness import Chaos
from tests.chaos.proxy import Proxy, Trouble
from tests.chaos.rows.servers import crash, revive

TROUBLES: tuple[Trouble, ...] = ("busy", "full", "expired", "gone", "slow", "cut")


def trouble_s3(chaos: Chaos, *, jobs: int, delay: float, lasting: float, rounds: int, errors: float) -> None:
    """R6. Every trouble lasts `lasting` seconds, `rounds` times over, while jobs are rendered; slow requests wait
    `delay` seconds. Last, S3 is killed and started again, and a share of all requests fails until the end."""
    store = chaos.servers.s3
    assert store is not None
    assert chaos.settings.s3_endpoint_url is not None
    with Proxy(chaos.settings.s3_endpoint_url, chaos.random.randrange(10**6)) as proxy:
        proxy.delay = delay
        # Only the workers go this way: what is stored is judged without it.
        chaos.worker_settings = {"s3_endpoint_url": proxy.url}
        chaos.keep(3, Faults(step_seconds=0.02))
        pieces = rounds * (len(TROUBLES) + 1) + 1
        for _ in range(rounds):
            for trouble in TROUBLES:
                chaos.client.submit(jobs // pieces)
                proxy.trouble = trouble
                chaos.history.write("s3", trouble=trouble)
                time.sleep(lasting)
                proxy.trouble = ""
                time.sleep(lasting / 2)
            chaos.client.submit(jobs // pieces)
            crash(store, signal.SIGKILL)
            time.sleep(1)
            revive(chaos, store)
            chaos.figures.add("s3 kills")
        proxy.trouble, proxy.share = "busy", errors
        chaos.client.submit(jobs - (pieces - 1) * (jobs // pieces))
        chaos.until_done(120 + delay * 4 + jobs * 0.1)
        chaos.figures.add("spoilt requests", proxy.spoilt)
        chaos.keep(0)
        for worker in chaos.alive():
            worker.process.kill()
