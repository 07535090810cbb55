"""Is this container healthy? `python -m farm.health api|worker|sweeper|flower` answers by its exit code.

A check asks for what only a working process gives: the API its readiness, a worker its own heartbeat in Postgres.
What a restart would not cure (a worker whose Postgres is away keeps rendering) is not called ill.
"""

import os
import socket
import sys
from collections.abc import Callable
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

from farm import jobs
from farm.db import Database
from farm.errors import FarmError, Unavailable
from farm.settings import Settings, settings

TIMEOUT_SECONDS = 4.0


def api(config: Settings) -> str:
    """Empty when the API would serve a request now, else what is wrong."""
    return _asks(f"http://127.0.0.1:{config.api_port}/api/v1/health/ready")


def flower(_: Settings) -> str:
    """Empty when Flower's page answers."""
    return _asks(f"http://127.0.0.1:{os.environ.get('FLOWER_PORT', '5555')}/healthcheck")


def worker(config: Settings) -> str:
    """Empty when a worker of this host renews its presence in Postgres, or Postgres cannot be asked."""
    try:
        with _database(config).transaction() as conn:
            here = [found for found in jobs.workers(conn) if found.host == socket.gethostname()]
    except Unavailable:
        return ""
    if any(found.state != "lost" for found in here):
        return ""
    return "the worker of this host is silent" if here else "no worker of this host has said hello"


def sweeper(config: Settings) -> str:
    """Empty when the sweeper could do its duties: the database answers and has the schema it knows."""
    _database(config).check_schema()
    return ""


CHECKS: dict[str, Callable[[Settings], str]] = {"api": api, "flower": flower, "worker": worker, "sweeper": sweeper}


def main(arguments: list[str]) -> int:
    """The exit code of one check: 0 healthy, 1 ill (the reason on standard error), 2 a wrong command line."""
    if len(arguments) != 1 or arguments[0] not in CHECKS:
        sys.stderr.write(f"usage: python -m farm.health {'|'.join(CHECKS)}\n")
        return 2
    try:
        reason = CHECKS[arguments[0]](settings())
    except FarmError as error:
        reason = error.message
    if reason:
        sys.stderr.write(f"{reason}\n")
    return 1 if reason else 0


def _asks(url: str) -> str:
    try:
        with urlopen(url, timeout=TIMEOUT_SECONDS) as answer:  # noqa: S310  # a fixed http:// address of this host
            return "" if answer.status == 200 else f"{url} answers {answer.status}"
    except HTTPError as error:
        return f"{url} answers {error.code}: {error.read(2000).decode(errors='replace')}"
    except (URLError, OSError) as error:
        return f"{url} does not answer: {error}"


def _database(config: Settings) -> Database:
    return Database(config, pool_size=1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
