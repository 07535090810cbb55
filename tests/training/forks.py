"""Trainers in processes of their own for the price of a fork: what they import costs more than all their steps.

Multiprocessing's forkserver would do it too, but there is one for the whole run of tests, and it has imported other
things. Nothing is learnt before the fork, as autograd does not survive one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

import psutil

from farm.training import VARIABLE, Training
from tests.training import told


class Forks:
    """A process that has imported the trainer and its launcher, and forks on demand."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.training.forks"],
            cwd=Path(__file__).parents[2],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # And with it a trainer that does not end, in whatever group.
        for each in psutil.Process(self._process.pid).children(recursive=True):
            each.kill()
        self._process.kill()
        self._process.communicate()

    def train(
        self,
        options: Training,
        said: Path,
        *ranks: Mapping[str, str],
        signals: Mapping[int, list[int]] | None = None,
        group: bool = False,
    ) -> list[int]:
        """How trainers that run at the same time end, one for each of `ranks`, the variables it gets beside options, or
        in place of these.

        `said` gets what they print. `signals` come in the middle of a pass, counted from 1, and to the last of them:
        with `group` to all processes it has started too, as systemd and Slurm send them.
        """
        asked = [{VARIABLE: options.model_dump_json(), **each} for each in ranks or ({},)]
        return self._ask("train in a group" if group else "train", asked, said, signals or {})

    def launch(self, said: Path, **variables: str) -> int:
        """How the launcher of two processes ends, which are `tests.training.told` here."""
        return self._ask("launch", [variables], said, {})[0]

    def _ask(self, what: str, asked: list[dict[str, str]], said: Path, signals: Mapping[int, list[int]]) -> list[int]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([what, asked, str(said), signals]) + "\n")
        self._process.stdin.flush()
        ended: list[int] = json.loads(self._process.stdout.readline())
        return ended


def _interrupted(
    make: Callable[..., Any], signals: Mapping[str, list[int]], send: Callable[[int], None]
) -> Callable[..., Any]:
    """A maker of losses that sends signals."""
    passes = 0

    def made(*given: Any) -> Callable[..., Any]:
        loss = make(*given)

        def counted(*batch: Any) -> Any:
            nonlocal passes
            passes += 1
            for number in signals.get(str(passes), ()):
                send(number)
            return loss(*batch)

        return counted

    return made


def _train(signals: Mapping[str, list[int]], *, group: bool) -> int:
    from workers.training import objectives, run

    send: Callable[[int], None] = signal.raise_signal
    if group:
        os.setpgid(0, 0)
        send = partial(os.killpg, 0)
    for name in ("distillation", "denoising"):
        setattr(objectives, name, _interrupted(getattr(objectives, name), signals, send))
    return run.main()


def _launch() -> int:
    from workers.training import launch

    launch.PROGRAM = told.__name__
    return launch.main(2)


def _fork(what: str, variables: Mapping[str, str], said: str, signals: Mapping[str, list[int]]) -> int:
    if child := os.fork():
        return child
    for descriptor in (1, 2):
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), descriptor)
    os.environ.update(variables)
    code = _launch() if what == "launch" else _train(signals, group=what == "train in a group")
    sys.stdout.flush()
    os._exit(code)


def main() -> None:
    """Fork and wait as every line of the input asks."""
    from workers.training import launch, run  # noqa: F401

    for line in sys.stdin:
        what, asked, said, signals = json.loads(line)
        children = [_fork(what, each, said, signals if each is asked[-1] else {}) for each in asked]
        ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        sys.stdout.write(json.dumps(ended) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
