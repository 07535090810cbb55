"""Rows about workers that go and jobs that kill: R8 poison, R10 rolling restarts and spot notices."""

import signal
import time
from threading import Event, Thread

import psutil

from tests.chaos.faults import Faults
from tests.chaos.harness import Chaos
from tests.chaos.setting import Worker

MOST_BYTES = 700 * 1024 * 1024
"""Resident memory at which a worker is ended, as the kernel would when a machine runs out."""
GIVEN_BACK_WITHIN = 5.0
SPOT_SECONDS = 15.0
POISONS = (("CRASH", "poison-crash"), ("HANG", "poison-hang"), ("EAT", "poison-eat"))


def render_poison(chaos: Chaos, *, good: int, each: int, workers: int = 4) -> None:
    """R8. Jobs that crash, hang and eat memory among good ones: they are isolated with their cause, no other fails."""
    chaos.poison = {word for _, word in POISONS}
    prompts = [f"a crack {n}" for n in range(good)]
    prompts += [f"{word} {n}" for _, word in POISONS for n in range(each)]
    chaos.random.shuffle(prompts)
    done = Event()
    guard = Thread(target=_run_out_of_memory, args=[chaos, done], daemon=True)
    guard.start()
    chaos.keep(workers, Faults(words=POISONS))
    pieces = max(1, len(prompts) // 40)
    for number in range(pieces):
        chaos.client.submit(prompts[number::pieces])
    chaos.until_done(120 + each * 60)
    done.set()
    guard.join(10)
    failed = chaos.ask("""
        SELECT split_part(r.body ->> 'prompt', ' ', 1) AS word, j.error_code AS code, j.crashes, count(*) AS n
        FROM jobs j JOIN recipes r ON r.job_id = j.id WHERE j.state = 'failed' GROUP BY 1, 2, 3
    """)
    for row in failed:
        chaos.figures.add(f"{row.word} {row.code}", row.n)
        if row.code != "quarantined" or row.crashes != chaos.settings.max_crashes:
            chaos.fail(f"{row.n} jobs {row.word} ended as {row.code} after {row.crashes} crashes alone")
    for row in chaos.ask("""
        SELECT places, count(*) AS n FROM (
            SELECT count(DISTINCT w.name) AS places FROM jobs j JOIN attempts a ON a.job_id = j.id
            JOIN claims c ON c.id = a.claim_id JOIN workers w ON w.id = c.worker_id
            WHERE j.state = 'failed' AND a.outcome = 'crashed' GROUP BY j.id) tried GROUP BY 1
    """):
        chaos.figures.add(f"crashed {row.places} workers", row.n)
    if sum(row.n for row in failed) != 3 * each:
        chaos.fail(f"{3 * each} jobs are poison, and {sum(row.n for row in failed)} failed")


def _run_out_of_memory(chaos: Chaos, done: Event) -> None:
    while not done.wait(0.1):
        for worker in chaos.alive():
            try:
                eaten = psutil.Process(worker.process.pid).memory_info().rss > MOST_BYTES
            except psutil.NoSuchProcess:
                continue
            if eaten:
                worker.process.send(signal.SIGKILL)
                chaos.figures.add("out of memory")


def roll_workers(chaos: Chaos, *, waves: int, workers: int = 4) -> None:
    """R10. Waves of SIGTERM, one worker after the other; every second one a spot notice to all at once, with SIGKILL
    15 s later. What does not fit the grace period comes back within 5 s, and no attempt is spent."""
    # Forty seconds of work fit no grace period, however late on a busy machine the notice comes.
    quick, long = Faults(step_seconds=0.1), Faults(step_seconds=1.0)
    chaos.keep(workers, quick)
    for wave in range(waves):
        spot = wave % 2 == 1
        chaos.client.submit(6 * workers, steps=40 if spot else 4)
        leaving = chaos.until(lambda: len(chaos.holding()) >= workers // 2 and chaos.alive(), 60)
        chaos.keep(workers, long if spot else quick)
        for worker in leaving:
            _terminate(chaos, worker)
            if not spot:
                time.sleep(0.3)
        for worker in leaving:
            seconds = worker.told_at + SPOT_SECONDS - time.time()
            if worker.process.wait(max(0.1, seconds)) is None:
                chaos.fail("a worker was still there 15 s after its notice")
                chaos.kill(worker)
        chaos.figures.add("spot notices" if spot else "rolling restarts")
    chaos.keep(workers, Faults())
    for worker in [worker for worker in chaos.alive() if worker.process.faults.step_seconds > 0.01]:
        _terminate(chaos, worker)
    chaos.until_done(120)
    told = {worker.id: worker.told_at for worker in chaos.workers if worker.told_at}
    slowest = 0.0
    # Nobody renews a lease on a machine that stands still.
    excused = chaos.stalls.seconds > chaos.settings.lease.total_seconds() / 2
    for row in chaos.ask("""
        SELECT c.worker_id, a.outcome, extract(epoch FROM a.finished_at) AS at FROM attempts a
        JOIN claims c ON c.id = a.claim_id
    """):
        if row.outcome == "crashed" and not excused:
            chaos.fail(f"worker {row.worker_id} was told to leave and lost a job")
        # What was nearly done may be finished in the grace period; that is no give-back.
        if row.outcome == "given_back":
            slowest = max(slowest, float(row.at) - told.get(row.worker_id, float("inf")))
    chaos.figures.add("slowest give-back s", slowest)
    if slowest > GIVEN_BACK_WITHIN + chaos.slack + chaos.stalls.seconds:
        chaos.fail(f"a leaving worker held its jobs for {slowest:.1f} s")
    spent = chaos.ask("SELECT count(*) AS n FROM jobs WHERE failures > 0 OR crashes > 0 OR alone")[0].n
    if spent and not excused:
        chaos.fail(f"{spent} jobs had an attempt spent")


def _terminate(chaos: Chaos, worker: Worker) -> None:
    worker.told_at = time.time()
    worker.process.send(signal.SIGTERM)
    chaos.history.write("term", worker=worker.id)
