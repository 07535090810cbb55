"""Pictures a second of the whole farm, beside a bare diffusers loop and beside a plain Celery task.

    python benchmarks/rendering.py [--jobs 400] [--rounds 3] [--contender farm]... [--model FOLDER]

farm    everything `farm up` starts, durable; one batch over HTTP, from its submission to the end of its last job
bare    benchmarks/rivals/bare.py: the same micro-batch size, the same PNG and thumbnail, to disk, nothing else
celery  benchmarks/rivals/plain_celery.py: a picture a task, Pillow's default PNG, boto3, the same Valkey and S3

The rivals' settings are tried out first and the best are taken. Every round lets each contender render the same jobs,
one after the other, all warm; jobs differ from round to round, so no prompt is known from before. Ratios are those of
the median times.
"""

import argparse
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import psycopg
from celery import Celery
from PIL import Image

from farm import catalogue
from farm.client import Farm
from farm.painter import caption, sample_scene
from farm.recipe import AdapterUse, Recipe
from farm.settings import Settings
from farm.stack.processes import Identity, end, spawn, tail
from farm.stack.stack import Stack
from workers.pictures import metadata
from workers.pipelines.device import choose

HERE = Path(__file__).parent
WARM_UP = 32
WARM_ROUND, TRIAL_ROUND = 10_001, 10_002
"""Numbers that no measured round has."""
ASK_SECONDS = 0.5
ADDED_UP_SECONDS = 2.0
PATIENCE = 900
"""Seconds after which one contender's round is given up."""
MOST_STATEMENTS = 0.03
TARGETS = {"bare": 0.9, "celery": 1.5}
CELERY_CHOICES = (("threads", 1), ("threads", 2), ("prefork", 1))
"""Pool of two, and torch threads in each."""

Jobs = list[dict[str, Any]]
Contender = Callable[[Jobs], float]


@dataclass
class Ground:
    """Where everybody works: the farm's own servers and a folder."""

    folder: Path
    model: Path
    stack: Stack
    farm: Farm
    side: int
    steps: int
    first: dict[str, Image.Image] = field(default_factory=dict)
    """The first picture of the last round, by contender."""
    cpu: dict[str, list[float]] = field(default_factory=dict)
    """Processor seconds a picture in every round, by the farm's service, `bare` or `celery`."""
    statements: list[float] = field(default_factory=list)
    """Share of every round that Postgres was at statements of the farm: claim, renew, finish and all others."""

    @property
    def settings(self) -> Settings:
        return self.stack.settings

    def processor_seconds(self) -> dict[str, float]:
        """What each service of the farm has used since it started."""
        return {service.name: processor_seconds(service.pid or 0) for service in self.stack.services}

    def statement_seconds(self) -> float:
        """What Postgres spent in the farm's statements since it started, as far as it has been added up (1 s late)."""
        with psycopg.connect(self.settings.database_url.get_secret_value()) as conn:
            row = conn.execute("SELECT active_time FROM pg_stat_database WHERE datname = current_database()").fetchone()
        assert row is not None
        return float(row[0]) / 1000

    @property
    def redis_url(self) -> str:
        """A database of Valkey that the farm does not use."""
        return self.settings.redis_url.get_secret_value().rsplit("/", 1)[0] + "/1"


def processor_seconds(pid: int) -> float:
    """What a process has used since it started, its child processes included."""
    top = psutil.Process(pid)
    times = [one.cpu_times() for one in (top, *top.children(recursive=True))]
    return sum(time.user + time.system for time in times)


def make_jobs(count: int, round_number: int) -> Jobs:
    rng = np.random.default_rng((7, round_number))
    return [{"prompt": caption(sample_scene(rng), rng), "seed": round_number * 100_000 + n} for n in range(count)]


def through_the_farm(ground: Ground) -> Contender:
    def run(jobs: Jobs) -> float:
        before, asked = ground.processor_seconds(), ground.statement_seconds()
        start, patience = time.time(), time.monotonic() + PATIENCE
        batch = ground.farm.submit_many(jobs, name="benchmark")
        while (counts := ground.farm.batch(batch.id).counts).queued + counts.running:
            if time.monotonic() > patience:
                raise SystemExit(f"the farm is not done after {PATIENCE} s: {counts}")
            time.sleep(ASK_SECONDS)
        used = ground.processor_seconds()
        time.sleep(ADDED_UP_SECONDS)
        asked = ground.statement_seconds() - asked
        every = list(ground.farm.jobs(batch=batch.id))
        ended = [job.finished_at.timestamp() for job in every if job.state == "succeeded" and job.finished_at]
        if len(ended) != len(jobs):
            raise SystemExit(f"not every job succeeded: {counts}")
        for name, before_it in before.items():
            ground.cpu.setdefault(name, []).append((used[name] - before_it) / len(jobs))
        ground.first["farm"] = Image.open(io.BytesIO(ground.farm.image(every[0])))
        # By the clock of the database, which is this machine's: asking often would cost what is measured.
        took = max(ended) - start
        ground.statements.append(asked / took)
        return took

    return run


def bare_loop(ground: Ground) -> Contender:
    cores = os.cpu_count() or 1
    known: list[Any] = []
    base = next(one for one in ground.farm.checkpoints() if one.name == "crack-tiny")
    lora = next(one for one in ground.farm.adapters() if one.name == "crack-tiny-lcm")

    def texts(job: dict[str, Any]) -> dict[str, str]:
        recipe = Recipe(
            **job, width=ground.side, height=ground.side, steps=ground.steps, guidance_scale=1.0, scheduler="lcm",
            checkpoint=base.hash, acceleration=AdapterUse(hash=lora.hash, weight=1.0),
        )  # fmt: skip
        return metadata(recipe, names={"checkpoint": base.name, "acceleration": "lcm-lora"}, labels={})

    def run(jobs: Jobs) -> float:
        out = ground.folder / "bare"
        out.mkdir(exist_ok=True)
        orders = {
            "model": str(ground.model), "out": str(out), "jobs": jobs, "texts": [texts(job) for job in jobs],
            "micro_batch": ground.settings.micro_batch or choose(ground.settings).micro_batch,
            "side": ground.side, "steps": ground.steps,
            "png_compress_level": ground.settings.png_compress_level,
            "thumbnail_pixels": ground.settings.thumbnail_pixels,
            "threads": sorted({1, max(1, cores // 2), cores}), "settings": known or None, "measure": bool(known),
        }  # fmt: skip
        path = ground.folder / "orders.json"
        path.write_text(json.dumps(orders))
        done = subprocess.run(
            [sys.executable, HERE / "rivals" / "bare.py", path], stdout=subprocess.PIPE, timeout=PATIENCE, check=True
        )
        answer = json.loads(done.stdout)
        if not known:
            known[:] = answer["settings"]
            print(f"bare: torch threads {known[0]}, memory layout {known[1]}, VAE sliced {known[2]}", flush=True)
        elif len(list(out.glob("*.png"))) != len(jobs):
            raise SystemExit("the bare loop left pictures out")
        else:
            ground.cpu.setdefault("bare", []).append(answer["processor_seconds"] / len(jobs))
        ground.first["bare"] = Image.open(io.BytesIO((out / "0.png").read_bytes()))
        return float(answer["seconds"])

    return run


@contextmanager
def celery_worker(ground: Ground, pool: str, torch_threads: int) -> Iterator[tuple[Celery, int]]:
    """A worker with a pool of two: an app to submit with, and the worker's process id."""
    secret = ground.settings.s3_secret_access_key
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
        "PLAIN_REDIS_URL": ground.redis_url,
        "PLAIN_MODEL": str(ground.model),
        "PLAIN_TORCH_THREADS": str(torch_threads),
        "OMP_NUM_THREADS": str(torch_threads),
        "PLAIN_S3_URL": ground.settings.s3_endpoint_url or "",
        "PLAIN_BUCKET": ground.settings.s3_bucket,
        "AWS_ACCESS_KEY_ID": ground.settings.s3_access_key_id or "",
        "AWS_SECRET_ACCESS_KEY": secret.get_secret_value() if secret else "",
        "AWS_DEFAULT_REGION": ground.settings.s3_region,
    }
    command = [sys.executable, "-m", "celery", "--app=rivals.plain_celery", "worker", f"--pool={pool}"]
    command += ["--concurrency=2", "--loglevel=WARNING"]
    log = ground.folder / "celery.log"
    process = spawn(command, environment=environment, log=log, directory=ground.folder)
    identity = Identity.of(process.pid)
    try:
        yield Celery("submitter", broker=ground.redis_url, backend=ground.redis_url), process.pid
        if process.poll() is not None:
            raise SystemExit(f"the plain Celery worker ended:{tail(log)}")
    finally:
        if identity is not None:
            end(identity, grace=20)
        process.wait()


def run_celery(ground: Ground, app: Celery, jobs: Jobs) -> float:
    start = time.perf_counter()
    sent = [
        app.send_task("plain.render", (job["prompt"], job["seed"], ground.steps, ground.side, f"plain/{job['seed']}"))
        for job in jobs
    ]
    for one in sent:
        one.get(timeout=PATIENCE)
    return time.perf_counter() - start


def plain_celery(ground: Ground) -> Contender:
    best: list[tuple[str, int]] = []

    def once(choice: tuple[str, int], jobs: Jobs) -> float:
        with celery_worker(ground, *choice) as (app, pid):
            run_celery(ground, app, make_jobs(WARM_UP, WARM_ROUND))
            before = processor_seconds(pid)
            elapsed = run_celery(ground, app, jobs)
            if best:
                ground.cpu.setdefault("celery", []).append((processor_seconds(pid) - before) / len(jobs))
            return elapsed

    def run(jobs: Jobs) -> float:
        if not best:
            tried = {choice: once(choice, make_jobs(WARM_UP * 2, TRIAL_ROUND)) for choice in CELERY_CHOICES}
            best.append(min(tried, key=tried.__getitem__))
            told = ", ".join(f"{pool} x {n} torch threads {WARM_UP * 2 / s:.1f}/s" for (pool, n), s in tried.items())
            print(f"celery: {told}", flush=True)
            return tried[best[0]]
        return once(best[0], jobs)

    return run


CONTENDERS: dict[str, Callable[[Ground], Contender]] = {
    "farm": through_the_farm,
    "bare": bare_loop,
    "celery": plain_celery,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contender", action="append", choices=list(CONTENDERS), help="only these")
    parser.add_argument(
        "--model", type=Path, default=catalogue.ASSETS, help="folder laid out as farm/assets/crack-tiny"
    )
    options = parser.parse_args()
    # Being asked to leave ends in the same order as being done: nothing stays behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    catalogue.ASSETS = options.model.absolute()
    profile = json.loads((catalogue.ASSETS / "profile.json").read_text())
    with tempfile.TemporaryDirectory(prefix="farm-measure-") as name:
        folder = Path(name)
        folder.chmod(0o711)
        os.environ["FARM_CACHE_DIR"] = str(folder / "cache")
        with Stack(folder / "data", port=0) as stack, Farm(data_dir=folder / "data") as client:
            ground = Ground(folder, catalogue.ASSETS, stack, client, profile["width"], profile["steps"])
            found = measure(ground, options.contender or list(CONTENDERS), options.jobs, options.rounds)
    report(found, options.jobs)
    told = ", ".join(f"{name} {statistics.median(used) * 1000:.1f}" for name, used in ground.cpu.items())
    print(f"processor milliseconds a picture: {told}")
    if ground.statements:
        share = statistics.median(ground.statements[1:] or ground.statements)
        print(f"time in statements, of the farm's time: {share:.2%} (target <= {MOST_STATEMENTS:.0%})")
    if {"farm", "bare"} <= set(ground.first):
        pair = [np.asarray(ground.first[who], dtype=np.int16) for who in ("farm", "bare")]
        print(f"one picture of both: largest difference of a colour value {np.abs(pair[0] - pair[1]).max()} of 255")


def measure(ground: Ground, names: list[str], jobs: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of every round. The round before the first warms up and tries out, and does not count."""
    ready = {name: CONTENDERS[name](ground) for name in names}
    for run in ready.values():
        run(make_jobs(WARM_UP, 0))
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(1, rounds + 1):
        for name, run in ready.items():
            found[name].append(run(make_jobs(jobs, number)))
            print(f"round {number}: {name:6} {found[name][-1]:7.2f} s", flush=True)
    return found


def report(found: dict[str, list[float]], jobs: int) -> None:
    print(f"\n{'':8} {'images/s':>9}   seconds of every round")
    for name, seconds in found.items():
        rounds = " ".join(f"{one:.2f}" for one in seconds)
        print(f"{name:8} {jobs / statistics.median(seconds):9.2f}   {rounds}")
    for name, target in TARGETS.items():
        if {"farm", name} <= set(found):
            ratio = statistics.median(found[name]) / statistics.median(found["farm"])
            print(f"farm / {name}: {ratio:.2f} (target >= {target})")


if __name__ == "__main__":
    main()
