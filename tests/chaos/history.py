"""What happened, one JSON line an event, written by every process of a run into the same file."""

import json
import os
import time
from pathlib import Path
from typing import Any


class History:
    """Appends lines. A line is one write, so processes may share the file and a SIGKILL tears nothing.

    Every line holds `t` (seconds since the epoch), `who` (the process's part in the run) and `event`.
    """

    def __init__(self, path: Path, who: str) -> None:
        self.path = path
        self._who = who
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, event: str, **about: Any) -> None:
        line = {"t": round(time.time(), 4), "who": self._who, "event": event, **about}
        os.write(self._file, json.dumps(line, default=str).encode() + b"\n")

    def close(self) -> None:
        os.close(self._file)


def read(path: Path) -> list[dict[str, Any]]:
    """Every event of a history, in the order in which they were written."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
