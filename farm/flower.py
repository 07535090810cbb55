"""Flower for this farm: `python -m farm.flower`, set up by FLOWER_* variables; `app` is the Celery app it watches."""

import os
import sys

from celery.bin.celery import celery

from farm.doorbell import WORKER_TIMEOUT_SECONDS, make_app
from farm.settings import settings

app = make_app(settings(), timeout=WORKER_TIMEOUT_SECONDS)
# Flower asks workers about ten things at once, each of which takes two connections: with a small pool they wait for one
# another for ever, and the thread that listens for events with them, so that no page shows anything.
app.conf.broker_pool_limit = None


def main() -> None:
    """Run Flower until SIGTERM or SIGINT, and end the process at once then."""
    try:
        celery.main(args=["--app=farm.flower", "flower"], prog_name="celery")
    except SystemExit as leaving:
        # Not by returning: Python would wait for Flower's threads, and the one that listens to the broker never ends.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None))


if __name__ == "__main__":
    main()
