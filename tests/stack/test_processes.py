"""Processes are recognised by id and creation time, and end with everything they started."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from farm.errors import StackError
from farm.stack import processes
from farm.stack.processes import Identity, end, set_aside, spawn, tail
from tests.stack.watching import wait_until, zombies

STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("ready", flush=True)
time.sleep(600)
"""


def start(code: str, folder: Path) -> subprocess.Popen[bytes]:
    return spawn([sys.executable, "-c", code], environment=dict(os.environ), log=folder / "log", directory=folder)


def test_a_polite_process_leaves_when_asked(tmp_path: Path) -> None:
    process = start("import time; time.sleep(600)", tmp_path)
    identity = Identity.of(process.pid)
    assert identity is not None
    assert identity.alive
    assert end(identity, grace=10.0)
    assert not identity.alive
    process.wait(5)
    assert zombies() == []


def test_a_stubborn_process_is_killed_with_its_children(tmp_path: Path) -> None:
    process = start(STUBBORN, tmp_path)
    wait_until(lambda: "ready" in tail(tmp_path / "log"))
    identity = Identity.of(process.pid)
    assert identity is not None
    children = psutil.Process(process.pid).children()
    assert len(children) == 1
    assert not end(identity, grace=0.2)
    assert not identity.alive
    process.wait(5)
    assert not children[0].is_running()


def test_another_process_with_the_same_id_is_left_alone(tmp_path: Path) -> None:
    process = start("import time; time.sleep(600)", tmp_path)
    identity = Identity.of(process.pid)
    assert identity is not None
    earlier = Identity(identity.pid, identity.created - 100.0)
    assert not earlier.alive
    assert end(earlier, grace=0.1)
    assert process.poll() is None
    end(identity, grace=5.0)
    process.wait(5)


def test_a_program_that_cannot_run_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(StackError, match="cannot start /nowhere/at/all"):
        spawn(["/nowhere/at/all"], environment={}, log=tmp_path / "log", directory=tmp_path)


def test_a_large_log_is_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "LARGE_LOG", 10)
    log = tmp_path / "api.log"
    set_aside(log)
    for content in ("short", "long enough to go", "and longer still"):
        log.write_text(content)
        set_aside(log)
        assert log.exists() == (content == "short")
    assert (tmp_path / "api.log.1").read_text() == "and longer still"


def test_the_tail_of_a_log_is_short(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert tail(log) == ""
    log.write_text("".join(f"line {n}\n" for n in range(5000)))
    assert tail(log, 2) == "\n    line 4998\n    line 4999"
