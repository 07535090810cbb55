"""The chaos suite from a command: one row or all, with its history kept.

    python -m benchmarks.chaos [--row R1]... [--size ci|large|short] [--seed N] [--parallel N] [--set name=value]...

Servers lie below a temporary folder, on loopback, and everything that was started is ended. Logs, history (NDJSON) and
report of each row are kept in benchmarks/out/chaos/SIZE-SEED/ROW, earlier runs beside it as ROW.1 to ROW.5; a row can
be run again alone. Ends with status 1 if anything promised did not hold. docs/chaos.md says what the rows do and how to
read a history.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson

from farm.stack import Servers, embedded_servers
from tests.chaos.processes import ENGINE, PRELOAD
from tests.chaos.rows import ROWS
from tests.chaos.suite import Row, Size, run_row

OUT = Path(__file__).parent / "out" / "chaos"
REPORT = "report.json"
KEPT = 5
"""Earlier runs of a row with the same size and seed that are kept."""


def in_turn(names: list[str], size: Size, seed: int, changes: dict[str, Any]) -> int:
    """Run rows one after the other in this process, on servers that they share; answers the exit status."""
    if any(ROWS[name].real for name in names):
        PRELOAD.append(ENGINE)
    status = 0
    # Not below the checkout: the path is long, and another user may have to reach it to run PostgreSQL.
    with tempfile.TemporaryDirectory(prefix="farm-chaos-") as place:
        Path(place).chmod(0o711)
        with embedded_servers(Path(place) / "data") as servers:
            for name in names:
                row = ROWS[name].with_sizes(size, changes) if changes else ROWS[name]
                status |= one(name, row, servers, size, seed)
    return status


def one(name: str, row: Row, servers: Servers, size: Size, seed: int) -> int:
    folder = folder_of(name, size, seed)
    set_aside(folder)
    report = run_row(name, row, servers, folder, size=size, seed=seed)
    print(line(orjson.loads((folder / REPORT).read_bytes())), flush=True)
    for violation in report.violations[:20]:
        print(f"    {violation.invariant}: {violation.what}", flush=True)
    return 1 if report.violations else 0


def folder_of(name: str, size: Size, seed: int) -> Path:
    return OUT / f"{size}-{seed}" / name


def set_aside(folder: Path) -> None:
    """Keep an earlier run of the same seed as FOLDER.1, the one before it as FOLDER.2, and so on, the last five."""
    if not folder.exists():
        return
    places = [folder, *(folder.with_name(f"{folder.name}.{n}") for n in range(1, KEPT + 1))]
    shutil.rmtree(places[-1], ignore_errors=True)
    for newer, older in reversed(list(pairwise(places))):
        if newer.exists():
            newer.rename(older)


def line(report: dict[str, Any]) -> str:
    recovery = "-" if report["recovery"] is None else f"{report['recovery']:.2f} of {report['bound']:.0f}"
    said = dict(report["said"])
    recovery += f", {said.pop('recovery')}" if "recovery" in said else ""
    counts = " ".join(f"{name}={value:g}" for name, value in report["counts"].items())
    words = "".join(f"{name}: {what}; " for name, what in said.items())
    verdict = f"{len(report['violations'])} violations" if report["violations"] else "holds"
    return f"{report['row']:14} {report['jobs']:7,} {report['seconds']:7.1f}  {recovery:30}  {verdict}  {words}{counts}"


def dealt(names: list[str], hands: int) -> list[list[str]]:
    """Rows in so many hands that last about equally long: the longest first, each to who has least so far."""
    found: list[list[str]] = [[] for _ in range(min(hands, len(names)))]
    for name in sorted(names, key=lambda name: -ROWS[name].lasts):
        min(found, key=lambda hand: sum(ROWS[one].lasts for one in hand)).append(name)
    return found


def several(names: list[str], options: argparse.Namespace) -> int:
    """Some rows at a time: as many processes, each with servers of its own and a share of the rows, as starting both
    takes longer than some rows do. Answers the exit status."""

    def run(hand: list[str]) -> int:
        command = [sys.executable, "-m", "benchmarks.chaos", *(word for name in hand for word in ("--row", name))]
        command += ["--size", options.size, "--seed", str(options.seed), "--quiet"]
        return subprocess.run(command, env=os.environ, check=False).returncode

    for name in names:
        # Here and not in the other process: one that never began must not be taken for a run that held.
        set_aside(folder_of(name, options.size, options.seed))
    with ThreadPoolExecutor(options.parallel) as threads:
        statuses = list(threads.map(run, dealt(names, options.parallel)))
    failed = [name for name in names if not held(folder_of(name, options.size, options.seed) / REPORT)]
    if failed:
        print(f"did not hold: {', '.join(failed)}; see {OUT / f'{options.size}-{options.seed}'}")
    return 1 if failed or any(statuses) else 0


def held(report: Path) -> bool:
    """Whether a row came to its end and nothing promised was found broken."""
    return report.exists() and not orjson.loads(report.read_bytes())["violations"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--row", action="append", choices=list(ROWS), help="may be given again; all but the soak unless given"
    )
    parser.add_argument("--size", choices=("short", "ci", "large"), default="ci")
    parser.add_argument("--seed", type=int, help="of what is random in the faults; drawn and told unless given")
    parser.add_argument("--parallel", type=int, default=1, help="rows at a time, on as many sets of servers")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="another size for one row")
    parser.add_argument("--quiet", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.seed is None:
        options.seed = random.randrange(10**6)
    names = options.row or [name for name, row in ROWS.items() if not row.named]
    changes = {name: orjson.loads(value) for name, value in (pair.split("=", 1) for pair in options.set)}
    began = time.monotonic()
    if not options.quiet:
        print(f"size {options.size}, seed {options.seed}, {os.cpu_count()} cores; kept in {OUT}")
        print(f"{'row':14} {'jobs':>7} {'seconds':>7}  {'recovery (s)':30}  verdict  counts", flush=True)
    if changes and len(names) > 1:
        parser.error("--set changes the size of one row: name it with --row")
    if options.parallel == 1 or len(names) == 1:
        status = in_turn(names, options.size, options.seed, changes)
    else:
        status = several(names, options)
    if not options.quiet:
        print(f"{time.monotonic() - began:.0f} s in all", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
