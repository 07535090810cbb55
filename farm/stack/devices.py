"""Which devices this machine renders on: one worker process each. Asks torch without importing it here."""

import os
import subprocess
import sys
from pathlib import Path

COUNT = "import torch; print(torch.cuda.device_count())"
PATIENCE = 60.0
"""Seconds; the first import of torch on a cold disk takes a while."""


def devices() -> list[str]:
    """Values for `FARM_DEVICE`: what is set already, else every GPU that torch can use, else `auto`."""
    chosen = os.environ.get("FARM_DEVICE", "auto")
    if chosen != "auto" or not any(Path("/dev").glob("nvidia[0-9]*")):
        return [chosen]
    try:
        asked = subprocess.run(
            [sys.executable, "-c", COUNT], capture_output=True, text=True, timeout=PATIENCE, check=True
        )
        count = int(asked.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return [chosen]
    return [f"cuda:{index}" for index in range(count)] or [chosen]
