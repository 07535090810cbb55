"""The chaos suite from a command: one row or all, with its history kept.

    python -m benchmarks.chaos [--row R1]... [--size ci|large|short] [--seed N] [--parallel N] [--set name=value]...

Every row has servers of its own below a temporary folder, on loopback, and ends everything it started. Logs, history
(NDJSON) and report of each row are kept in benchmarks/out/chaos/SIZE-SEED/ROW; a row can be run again alone. Ends with
status 1 if anything promised did not hold. docs/chaos.md says what the rows do and how to read a history.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import orjson

from farm.stack import embedded_servers
from tests.chaos.processes import ENGINE, PRELOAD
from tests.chaos.rows import ROWS
from tests.chaos.suite import Size, run_row

OUT = Path(__file__).parent / "out" / "chaos"


def one(name: str, size: Size, seed: int, changes: dict[str, Any]) -> int:
    """Run one row on servers of its own, in this process; answers the exit status."""
    folder = OUT / f"{size}-{seed}" / name
    for old in sorted(folder.rglob("*"), reverse=True):
        old.rmdir() if old.is_dir() else old.unlink()
    # Not below the checkout: the path is long, and another user may have to reach it to run PostgreSQL.
    with tempfile.TemporaryDirectory(prefix="farm-chaos-") as place:
        Path(place).chmod(0o711)
        row = ROWS[name]
        if row.real:
            PRELOAD.append(ENGINE)
        if changes:
            row = row.with_sizes(size, changes)
        with embedded_servers(Path(place) / "data") as servers:
            report = run_row(name, row, servers, folder, size=size, seed=seed)
    print(line(orjson.loads((folder / "report.json").read_bytes())), flush=True)
    for violation in report.violations[:20]:
        print(f"    {violation.invariant}: {violation.what}", flush=True)
    return 1 if report.violations else 0


def line(report: dict[str, Any]) -> str:
    recovery = "-" if report["recovery"] is None else f"{report['recovery']:.2f} of {report['bound']:.0f}"
    counts = " ".join(f"{name}={value:g}" for name, value in report["counts"].items())
    verdict = f"{len(report['violations'])} violations" if report["violations"] else "holds"
    return f"{report['row']:14} {report['jobs']:7,} {recovery:>13} {report['seconds']:7.1f}  {verdict}  {counts}"


def several(names: list[str], options: argparse.Namespace) -> int:
    """Each row in a process of its own, some at a time; answers the exit status."""

    def run(name: str) -> int:
        command = [sys.executable, "-m", "benchmarks.chaos", "--row", name, "--size", options.size]
        command += ["--seed", str(options.seed), "--quiet"]
        return subprocess.run(command, env=os.environ, check=False).returncode

    names = sorted(names, key=lambda name: -ROWS[name].lasts)
    with ThreadPoolExecutor(options.parallel) as threads:
        statuses = list(threads.map(run, names))
    failed = [name for name, status in zip(names, statuses, strict=True) if status]
    if failed:
        print(f"did not hold: {', '.join(failed)}; see {OUT / f'{options.size}-{options.seed}'}")
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--row", action="append", choices=list(ROWS), help="may be given again; all but the soak unless given"
    )
    parser.add_argument("--size", choices=("short", "ci", "large"), default="ci")
    parser.add_argument("--seed", type=int, help="of what is random in the faults; drawn and told unless given")
    parser.add_argument("--parallel", type=int, default=1, help="rows at a time, each with servers of its own")
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
        print(f"{'row':14} {'jobs':>7} {'recovery (s)':>13} {'seconds':>7}  verdict  counts", flush=True)
    if len(names) == 1:
        status = one(names[0], options.size, options.seed, changes)
    else:
        if changes:
            parser.error("--set changes the size of one row: name it with --row")
        status = several(names, options)
    if not options.quiet:
        print(f"{time.monotonic() - began:.0f} s in all", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
