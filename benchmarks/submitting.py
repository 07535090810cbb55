"""What submitting costs: lines a second by NDJSON through the API into Postgres, and what the API's memory does.

    python benchmarks/submitting.py [--lines 10000 --lines 200000] [--rounds 3] [--singles 200] [--model FOLDER]

Starts its own Postgres (with fsync), Valkey, S3 and API, sends each size in turns over HTTP and waits for the 201, so
a figure holds everything: sending, spooling, checking, COPY, commit. Nothing renders meanwhile. Every line has a prompt
of its own. Then how long one `POST /jobs` takes, and for what is promised whether it was reached or missed; answers 1
when something was missed.
"""

import argparse
import json
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import psutil

from farm import catalogue
from farm.painter import caption, sample_scene
from farm.stack import embedded_servers, preparation, programs, settings_from
from farm.stack.datadir import DataDir
from farm.stack.ports import LOOPBACK, Ports
from farm.stack.service import Service

CHUNK = 1024 * 1024
SAMPLE_SECONDS = 0.02
MIB = 1024 * 1024
TARGET = 5_000
"""Jobs a second that issue and README promise."""
FLAT = 32 * MIB
"""Bytes by which the API may grow more under the most lines than under the fewest: less than 200 of them a MiB, where
a line alone has 100 bytes and a checked job several times that."""


@dataclass
class Size:
    """What was measured of submissions of so many lines; memory in bytes."""

    lines: int
    seconds: list[float] = field(default_factory=list)
    before: int = 0
    peak: int = 0

    @property
    def rate(self) -> float:
        return self.lines / statistics.median(self.seconds)

    @property
    def growth(self) -> int:
        return self.peak - self.before


@contextmanager
def api(folder: Path) -> Iterator[tuple[Service, httpx.Client]]:
    """The API as `farm up` starts it, on servers of its own, with a client that holds a key."""
    with embedded_servers(folder) as servers:
        directory = DataDir(folder)
        port = Ports(directory.ports).choose(["api"])["api"]
        variables = servers.environment() | {"FARM_API_HOST": LOOPBACK, "FARM_API_PORT": str(port)}
        url = f"http://{LOOPBACK}:{port}"
        preparation.prepare(settings_from(variables), credentials=directory.credentials, url=url)
        key = json.loads(directory.credentials.read_text())["api_key"]
        service = Service(programs.api(directory, variables, port))
        service.start()
        try:
            headers = {"Authorization": f"Bearer {key}"}
            with httpx.Client(base_url=f"{url}/api/v1", headers=headers, timeout=600) as client:
                yield service, client
        finally:
            service.stop()


def write_lines(path: Path, count: int) -> Path:
    """`count` jobs as NDJSON. Sentences of the painter, each made unlike all others by a number."""
    rng = np.random.default_rng(count)
    sentences = [caption(sample_scene(rng), rng) for _ in range(2_000)]
    with path.open("wb") as file:
        for number in range(count):
            prompt = f"{sentences[number % len(sentences)]}, no. {number}"
            file.write(orjson.dumps({"prompt": prompt, "seed": number, "labels": {"set": "train"}}) + b"\n")
    return path


@contextmanager
def peak_memory(pid: int, tell: Callable[[int], None]) -> Iterator[None]:
    """Watches the resident memory of a process while the block runs, and tells the most it saw."""
    process, done = psutil.Process(pid), threading.Event()
    seen = [process.memory_info().rss]

    def watch() -> None:
        while not done.wait(SAMPLE_SECONDS):
            seen.append(process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        tell(max(seen))


def pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(CHUNK):
            yield piece


def submit(client: httpx.Client, path: Path, lines: int) -> float:
    """Send a file and answer the seconds until it was accepted; then take it off the queue again."""
    start = time.perf_counter()
    answer = client.post("/batches", content=pieces(path), headers={"Content-Type": "application/x-ndjson"})
    elapsed = time.perf_counter() - start
    answer.raise_for_status()
    batch: dict[str, Any] = answer.json()
    if (answer.status_code, batch["total"]) != (201, lines):
        raise SystemExit(f"{lines} lines were sent, {batch['total']} accepted ({answer.status_code})")
    client.post(f"/batches/{batch['id']}/cancel").raise_for_status()
    return elapsed


def singles(client: httpx.Client, count: int) -> list[float]:
    """Milliseconds of each of `count` single submissions, one after the other on one connection, sorted."""
    taken = []
    for number in range(count + 20):
        start = time.perf_counter()
        client.post("/jobs", json={"prompt": f"a crack, no. {number}", "seed": number}).raise_for_status()
        taken.append((time.perf_counter() - start) * 1000)
    return sorted(taken[20:])


def main() -> int:
    """0 when everything measured is as promised, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, action="append", help="size of one submission; may be given again")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--singles", type=int, default=200, help="how many single submissions are timed")
    parser.add_argument(
        "--model", type=Path, default=catalogue.ASSETS, help="folder laid out as farm/assets/crack-tiny"
    )
    options = parser.parse_args()
    # Being asked to leave ends in the same order as being done: nothing stays behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    catalogue.ASSETS = options.model.absolute()
    sizes = [Size(lines) for lines in options.lines or (10_000, 200_000)]
    with tempfile.TemporaryDirectory(prefix="farm-measure-") as name:
        folder = Path(name)
        folder.chmod(0o711)
        files = {size.lines: write_lines(folder / f"{size.lines}.ndjson", size.lines) for size in sizes}
        warm = write_lines(folder / "warm.ndjson", 1_000)
        with api(folder / "data") as (service, client):
            pid = service.pid
            assert pid is not None
            submit(client, warm, 1_000)
            for _ in range(options.rounds):
                for size in sizes:
                    measure(client, pid, size, files[size.lines])
            taken = singles(client, options.singles)
    report(sizes, taken)
    kept = [verdict(*found) for found in promised(sizes)]
    return int(not all(kept))


def measure(client: httpx.Client, pid: int, size: Size, path: Path) -> None:
    before = psutil.Process(pid).memory_info().rss

    def tell(peak: int) -> None:
        # The round that grew most stands for the size.
        if peak - before >= size.growth:
            size.before, size.peak = before, peak

    with peak_memory(pid, tell):
        size.seconds.append(submit(client, path, size.lines))


def report(sizes: list[Size], singles_ms: list[float]) -> None:
    print(f"{'lines':>10}   jobs/s (target {TARGET:,})   API memory before   peak (MiB)   seconds of every round")
    for size in sizes:
        rounds = " ".join(f"{seconds:.2f}" for seconds in size.seconds)
        memory = f"{size.before / MIB:17.1f}   {size.peak / MIB:10.1f}"
        print(f"{size.lines:10,}   {size.rate:22,.0f}   {memory}   {rounds}")
    p50, p99 = (singles_ms[min(len(singles_ms) - 1, int(len(singles_ms) * share))] for share in (0.5, 0.99))
    print(f"one POST /jobs: p50 {p50:.1f} ms, p99 {p99:.1f} ms, {len(singles_ms)} of them")


def promised(sizes: list[Size]) -> Iterator[tuple[str, bool, str]]:
    """What is promised, whether it was reached, and the figure."""
    for size in sizes:
        rate = f"{size.rate:,.0f} a second (at least {TARGET:,})"
        yield f"{size.lines:,} jobs submitted", size.rate >= TARGET, rate
    few, many = min(sizes, key=lambda size: size.lines), max(sizes, key=lambda size: size.lines)
    if few is not many:
        more = many.growth - few.growth
        figure = (
            f"API memory grew by {many.growth / MIB:.1f} MiB and {few.growth / MIB:.1f} MiB, "
            f"{more / MIB:.1f} MiB more (at most {FLAT / MIB:.0f})"
        )
        yield f"{many.lines:,} lines as {few.lines:,}", more <= FLAT, figure


def verdict(what: str, reached: bool, figure: str) -> bool:
    print(f"{'reached' if reached else 'missed':8} {what}: {figure}")
    return reached


if __name__ == "__main__":
    sys.exit(main())
