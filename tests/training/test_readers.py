"""Processes that read pictures live as long as their trainer, whoever else is told to end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

READING = """
import os, signal, sys, threading, time
import psutil
from workers.training.data import open_source
from workers.training.examples import Cut, Positions, Rows, passes

number = int(sys.argv[1])
heard = []
signal.signal(number, lambda *_: heard.append(number))

def soon():
    # The tracker of multiprocessing and two readers, which import for a second or two.
    while len(psutil.Process().children()) < 3:
        time.sleep(0.01)
    time.sleep(0.1)
    os.killpg(0, number)

threading.Thread(target=soon).start()
data = Positions(open_source("painter:4", "text", (32, 32), 0), Cut(32, 32), seed=0, drop=0, read=True)
reader = passes(data, Rows(2, 0, 1, 0), 2)
next(reader)
assert heard == [number], "while the readers begin"
os.killpg(0, number)
for _ in range(8):
    next(reader)
assert heard == [number] * 2, "while they read"
reader.close()
assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
print("read on")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_leaves_readers_to_their_trainer(number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", READING, str(int(number))],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    try:
        said, error = process.communicate(timeout=120)
    finally:
        # Only what is still there: nothing, unless it failed.
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert (process.returncode, said, error) == (0, "read on\n", "")
