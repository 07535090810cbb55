"""Free ports on the loopback interface, remembered so that addresses stay the same from start to start."""

import contextlib
import http.client
import json
import random
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from farm.errors import StackError

LOOPBACK = "127.0.0.1"
LOWEST, HIGHEST = 10_000, 32_000
"""Below the range from which Linux draws ports for outgoing connections, so nobody takes ours by chance."""


def is_free(port: int) -> bool:
    """Whether a server could listen on this port now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do: a connection that lingers after its server has ended does not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def free_port(taken: frozenset[int] = frozenset(), *, also: int | None = None) -> int:
    """A free port outside `taken`; with `also`, one for which port + `also` is free too.

    Raises StackError if the machine has none left.
    """
    for _ in range(2_000):
        port = random.randint(LOWEST, HIGHEST)  # noqa: S311  # no secret
        wanted = {port} if also is None else {port, port + also}
        if not wanted & taken and all(is_free(each) for each in wanted):
            return port
    raise StackError(f"no free port between {LOWEST} and {HIGHEST} on {LOOPBACK}; stop some servers and try again")


def holder(port: int) -> str:
    """Who listens on this port, as words for a message; empty if that cannot be found out."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            local = connection.laddr
            if connection.status == psutil.CONN_LISTEN and local and local.port == port and connection.pid:
                return f" (by {psutil.Process(connection.pid).name()}, process {connection.pid})"
    return ""


def get(port: int, path: str) -> bytes | None:
    """The body that what listens there answers to GET; `None` for anything but a 200 within two seconds."""
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=2)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.read() if answer.status == http.HTTPStatus.OK else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def answers(port: int, path: str) -> bool:
    """Whether what listens there answers to GET at all within two seconds, be it with an error."""
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=2)
    try:
        connection.request("GET", path)
        connection.getresponse()
    except (OSError, http.client.HTTPException):
        return False
    else:
        return True
    finally:
        connection.close()


class Ports:
    """The ports of one data directory's inner servers, kept in `file`."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._chosen: dict[str, int] = {}
        if file.exists():
            try:
                self._chosen = {str(name): int(port) for name, port in json.loads(file.read_text()).items()}
            except (ValueError, AttributeError) as error:
                raise StackError(f"{file} is damaged ({error}); delete it, and ports are chosen anew") from error

    def remembered(self) -> dict[str, int]:
        """The ports chosen so far, by name."""
        return dict(self._chosen)

    def choose(self, names: Sequence[str], *, also: Mapping[str, int] | None = None) -> dict[str, int]:
        """One port per name: the remembered one where it is still free, else a new one, remembered from now on.

        `also` gives the distance of a second port that must be free with a name's own.
        """
        distances = also or {}
        for name in names:
            port = self._chosen.pop(name, None)
            distance = distances.get(name)
            if port is None or not is_free(port) or (distance is not None and not is_free(port + distance)):
                port = free_port(frozenset(self._chosen.values()), also=distance)
            self._chosen[name] = port
        draft = self._file.with_suffix(".new")
        draft.write_text(json.dumps(self._chosen, indent=2) + "\n")
        draft.replace(self._file)
        return {name: self._chosen[name] for name in names}
