"""Rows that end and freeze processes: R1, R2, R5, and the leg with the real renderer."""

import io
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
from PIL import Image

from tests.chaos.client import spread
from tests.chaos.faults import BOUNDARIES, Faults
from tests.chaos.harness import Chaos
from tests.chaos.setting import Worker

KILL_EVERY = 1.0
OF_WORKERS = ("claim", "render", "upload", "commit")
"""What workers do, of the boundaries; the rest are the API's and the sweeper's."""


def kill_workers(chaos: Chaos, *, jobs: int, kills: int, workers: int = 4) -> None:
    """R1. Every second one of the workers, whichever, while work keeps coming in."""
    chaos.keep(workers)
    for some in spread(jobs, kills):
        due = time.monotonic() + KILL_EVERY
        chaos.client.submit(some)
        time.sleep(max(0.0, due - time.monotonic()))
        # Every other one while it holds jobs, or starting processes would take most of the kills.
        busy = chaos.random.random() < 0.5
        chaos.kill(chaos.until(lambda busy=busy: chaos.catch((chaos.holding() if busy else []) or chaos.alive())))  # type: ignore[misc]
    chaos.until_done(60 + jobs * 0.1)


def freeze_workers(chaos: Chaos, *, stops: int, workers: int) -> None:
    """R2. Freeze workers in the middle of something for two leases; what they say afterwards comes too late.

    Every fifth one freezes itself inside a transaction, holding locks that others wait for.
    """
    lease = chaos.settings.lease.total_seconds()
    slow = Faults(step_seconds=0.1)
    chaos.keep(workers, slow)
    thawing: list[tuple[float, Worker]] = []
    traps = 0
    frozen = 0
    while frozen < stops or thawing:
        if chaos.backlog() < 8 * workers and frozen < stops:
            chaos.client.submit(8 * workers)
        for due, worker in list(thawing):
            if time.monotonic() > due:
                thawing.remove((due, worker))
                worker.frozen = False
                worker.process.send(signal.SIGCONT)
                if worker.process.faults.at:
                    # Its trap springs once: without leave it would stay, and a long run would be a crowd of them.
                    worker.process.send(signal.SIGTERM)
        for worker in chaos.alive():
            # A trapped one stopped by itself.
            if not worker.frozen and worker.process.faults.at and _is_stopped(worker):
                worker.frozen = True
                thawing.append((time.monotonic() + 2 * lease, worker))
        if frozen < stops and len(thawing) < workers - 1:
            if frozen % 5 == 4:
                at = ("commit-before", "claim-before")[traps % 2]
                chaos.worker(Faults(step_seconds=0.1, at=at, signal=signal.SIGSTOP))
                traps += 1
                frozen += 1
            elif caught := chaos.catch([one for one in chaos.holding() if not one.process.faults.at]):
                caught.frozen = True
                chaos.history.write("freeze", worker=caught.id)
                thawing.append((time.monotonic() + 2 * lease, caught))
                frozen += 1
        time.sleep(0.05)
    chaos.until_done(60 + stops * 2)
    late = sum(worker.process.said("came too late") for worker in chaos.workers)
    chaos.figures.add("stops", frozen)
    chaos.figures.add("workers whose results were refused", late)
    if not late:
        chaos.fail("no worker came back too late: the row tried nothing")


def crash_at_boundaries(chaos: Chaos, *, crashes: int, workers: int) -> None:
    """R5. At every boundary a process ends so many times, at a random passage."""
    plan = [boundary for boundary in BOUNDARIES if boundary.split("-")[0] in OF_WORKERS for _ in range(crashes)]
    chaos.random.shuffle(plan)
    running: list[Worker] = []
    while plan or running:
        for worker in [worker for worker in running if not worker.process.alive]:
            running.remove(worker)
            worker.killed_at = time.time()
            chaos.figures.add(f"crashes {worker.process.faults.at}")
        if chaos.backlog() < 8 * workers:
            chaos.client.submit(8 * workers)
        while plan and len(running) < workers:
            running.append(chaos.worker(Faults(at=plan.pop(), after=chaos.random.randint(1, 6))))
        time.sleep(0.05)
    chaos.keep(2)
    _crash_the_api(chaos, crashes)
    _crash_the_sweeper(chaos, crashes)
    chaos.until_done(60 + crashes)


def _crash_the_api(chaos: Chaos, crashes: int) -> None:
    """The API ends around ringing the doorbell: after its commit, before its answer."""
    chaos.stop_part("api")
    for boundary in (boundary for boundary in BOUNDARIES if boundary.startswith("doorbell")):
        for _ in range(crashes):
            doomed = chaos.start("api", Faults(at=boundary))
            batches = _batches(chaos)
            with ThreadPoolExecutor(1) as thread:
                waiting = thread.submit(chaos.client.submit, 2)
                chaos.until(lambda doomed=doomed: not doomed.alive)  # type: ignore[misc]
                chaos.start("api")
                made = waiting.result()
            if made.tries < 2 or _batches(chaos) != batches + 1:
                chaos.fail(f"a submission whose answer was lost at {boundary} was not accepted exactly once")
            chaos.figures.add(f"crashes {boundary}")
            chaos.stop_part("api")
    chaos.start("api")


def _crash_the_sweeper(chaos: Chaos, crashes: int) -> None:
    """The sweeper ends around telling a webhook: before it says a word, and before it notes the answer."""
    chaos.stop_part("sweeper")
    for boundary in (boundary for boundary in BOUNDARIES if boundary.startswith("webhook")):
        for _ in range(crashes):
            doomed = chaos.start("sweeper", Faults(at=boundary))
            chaos.client.submit(1)
            chaos.until(lambda doomed=doomed: not doomed.alive)  # type: ignore[misc]
            chaos.figures.add(f"crashes {boundary}")
            chaos.stop_part("sweeper")
    chaos.start("sweeper")


def _batches(chaos: Chaos) -> int:
    return int(chaos.ask("SELECT count(*) AS n FROM batches")[0].n)


def _is_stopped(worker: Worker) -> bool:
    try:
        return psutil.Process(worker.process.pid).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def kill_real_workers(chaos: Chaos, *, jobs: int, kills: int) -> None:
    """The leg with `crack-tiny`: what is rendered among crashes is what is rendered in peace."""
    prompts = [f"A single split crack on a concrete wall {n}" for n in range(jobs)]
    ready = "ready"
    size = {"width": 128, "height": 128}
    chaos.keep(1)
    chaos.client.submit(prompts, seeds_from=0, **size)
    chaos.until_done(120 + jobs * 3)
    chaos.client.submit(prompts, seeds_from=0, **size)
    for _ in range(kills):
        chaos.kill(chaos.until(lambda: chaos.catch([one for one in chaos.holding() if one.process.said(ready)]), 120))
    chaos.until_done(120 + jobs * 3)
    pictures: dict[str, list[np.ndarray]] = {}
    for row in chaos.ask("SELECT r.body ->> 'seed' AS seed, i.key FROM images i JOIN recipes r ON r.job_id = i.job_id"):
        with Image.open(io.BytesIO(chaos.store.get(row.key))) as image:
            pictures.setdefault(row.seed, []).append(np.asarray(image).astype(int))
    # After a crash a job is rendered alone, which may move a value by one.
    for seed, found in pictures.items():
        if len(found) != 2 or np.abs(found[0] - found[1]).max() > 1:
            chaos.fail(f"seed {seed} gave another picture after a crash")
