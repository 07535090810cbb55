"""How long starting takes: `farm up` until everything is healthy and `farm demo` from nothing to pictures, twice each.

    python -m benchmarks.starting [--data-dir DIR]

Both times in one temporary data directory, so that the second finds what the first made, as a person's second start
does; `--data-dir` keeps one. Only the second `farm up` has a limit: the first makes the database and stores the model.
Says whether it was reached, and answers 1 when it was missed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MOST_SECONDS = 15.0
"""Seconds that a second `farm up` may take until everything is healthy."""
READY = "The farm is up at "
FARM = (sys.executable, "-m", "farm.cli")


def up(data_dir: Path) -> float:
    """Seconds of `farm up` until it says that everything is healthy; then it is stopped."""
    begun = time.perf_counter()
    with subprocess.Popen(
        [*FARM, "up", "--data-dir", str(data_dir), "--port", "0"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith(READY):
                    return time.perf_counter() - begun
            raise SystemExit("`farm up` ended before it was healthy; what it said stands above")
        finally:
            process.terminate()
            for _ in process.stdout:
                pass  # It speaks while it stops, and a closed pipe would end it.


def demo(data_dir: Path) -> dict[str, float]:
    """Seconds of every stage of `farm demo`, and of the whole command."""
    begun = time.perf_counter()
    arguments = ["demo", "--data-dir", str(data_dir), "--out", str(data_dir / "demo-out"), "--json"]
    done = subprocess.run([*FARM, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    stages: dict[str, float] = json.loads(done.stdout)["seconds"]
    return stages | {"the whole command": time.perf_counter() - begun}


@contextmanager
def folder(chosen: Path | None) -> Iterator[Path]:
    if chosen is not None:
        yield chosen
        return
    with tempfile.TemporaryDirectory(prefix="farm-measure-") as name:
        # PostgreSQL may run as another user, who walks through.
        Path(name).chmod(0o711)
        yield Path(name) / "data"


def main() -> int:
    """0 when the second start is as quick as promised, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="use this folder and keep it, in place of a temporary one")
    options = parser.parse_args()
    # A key of another farm in our environment would be asked for pictures in place of the one measured.
    for name in [name for name in os.environ if name.startswith(("FARM_URL", "FARM_API_KEY"))]:
        del os.environ[name]
    with folder(options.data_dir) as data_dir:
        starts = [up(data_dir) for _ in range(2)]
        demos = [demo(data_dir) for _ in range(2)]
    print(f"{'seconds':76} {'first':>8} {'second':>8}")
    print(f"{'farm up until healthy':76} {starts[0]:8.1f} {starts[1]:8.1f}")
    for stage in demos[0]:
        print(f"{'farm demo: ' + stage:76} {demos[0][stage]:8.1f} {demos[1][stage]:8.1f}")
    reached = starts[1] <= MOST_SECONDS
    state = "reached" if reached else "missed"
    print(f"{state:8} farm up healthy on a second start: {starts[1]:.1f} s (at most {MOST_SECONDS:.0f} s)")
    return int(not reached)


if __name__ == "__main__":
    sys.exit(main())
