"""Rows about workers that go and jobs that kill: R8 poison, R10 rolling restarts and spot notices."""

import signal
import time
from threading import Event, Thread

import psutil

from tests.chaos.faults import Faults
from tests.chaos.harness import Chaos
from tests.chaos.setting import Worker, verdict

MOST_BYTES = 700 * 1024 * 1024
"""Resident memory at which a worker is ended, as the kernel would when a machine runs out."""
GIVEN_BACK_WITHIN = 5.0
SPOT_SECONDS = 15.0
MANY_STEPS = 40
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
    notices: list[list[Worker]] = []
    chaos.keep(workers, quick)
    for wave in range(waves):
        spot = wave % 2 == 1
        chaos.client.submit(6 * workers, steps=MANY_STEPS if spot else 4)
        # All that are told in a spot notice are slow ones, and some hold what is long for them: that must come back.
        chaos.until(lambda spot=spot: len(_holding(chaos, spot)) >= max(1, workers // 2), 60)  # type: ignore[misc]
        leaving = chaos.alive()
        chaos.keep(workers, quick if spot else long)
        for worker in leaving:
            _terminate(chaos, worker)
            if not spot:
                time.sleep(0.3)
        for worker in leaving:
            seconds = worker.told_at + SPOT_SECONDS - time.time()
            if worker.process.wait(max(0.1, seconds)) is None:
                chaos.fail("a worker was still there 15 s after its notice")
                chaos.kill(worker)
        if spot:
            notices.append(leaving)
        chaos.figures.add("spot notices" if spot else "rolling restarts")
    chaos.keep(workers, Faults())
    for worker in [worker for worker in chaos.alive() if worker.process.faults.step_seconds > 0.01]:
        _terminate(chaos, worker)
    chaos.until_done(120)
    _judge_leaving(chaos, notices)


def _holding(chaos: Chaos, long: bool) -> list[Worker]:
    """Workers that hold a job; if asked for, one of many steps that itself takes long for."""
    if not long:
        return chaos.holding()
    rows = chaos.ask(
        """
        SELECT DISTINCT c.worker_id FROM claims c JOIN attempts a ON a.claim_id = c.id AND a.outcome IS NULL
        JOIN recipes r ON r.job_id = a.job_id
        WHERE c.closed_at IS NULL AND CAST(r.body ->> 'steps' AS int) >= :steps
        """,
        steps=MANY_STEPS,
    )
    held = {row.worker_id for row in rows}
    return [worker for worker in chaos.holding() if worker.id in held and worker.process.faults.step_seconds >= 1]


def _judge_leaving(chaos: Chaos, notices: list[list[Worker]]) -> None:
    told = {worker.id: worker.told_at for worker in chaos.workers if worker.told_at}
    lease = chaos.settings.lease.total_seconds()
    rows = chaos.ask("""
        SELECT a.job_id, c.worker_id, a.outcome, extract(epoch FROM a.finished_at) AS at FROM attempts a
        JOIN claims c ON c.id = a.claim_id
    """)
    excused = set()
    for row in rows:
        if row.outcome != "crashed":
            continue
        # Nobody renews a lease on a machine that stands still.
        if chaos.stalls.lately(lease, float(row.at)) > lease / 2:
            excused.add(row.job_id)
        else:
            chaos.fail(f"worker {row.worker_id} was told to leave and lost a job")
    # What was nearly done may be finished in the grace period; that is no give-back.
    given = [(row.worker_id, float(row.at)) for row in rows if row.outcome == "given_back"]
    for worker_id in {one for one, _ in given} - told.keys():
        chaos.fail(f"worker {worker_id} gave a job back and nobody had told it to leave")
    for number, leaving in enumerate(notices, 1):
        back = sum(one in {worker.id for worker in leaving} for one, _ in given)
        chaos.figures.add("given back at spot notices", back)
        if not back:
            chaos.fail(f"nothing was given back at spot notice {number}: the row tried nothing")
    took = [(at - told[one], chaos.stalls.within(told[one], at)) for one, at in given if one in told]
    if took:
        slowest, stood = max(took, key=lambda one: one[0] - one[1])
        chaos.figures.add("slowest give-back s", slowest)
        chaos.figures.said["give-back"] = verdict(slowest, GIVEN_BACK_WITHIN, stood=stood, slack=chaos.slack)
        if slowest - stood > GIVEN_BACK_WITHIN + chaos.slack:
            chaos.fail(f"a leaving worker held its jobs for {slowest:.1f} s")
    spent = {row.id for row in chaos.ask("SELECT id FROM jobs WHERE failures > 0 OR crashes > 0 OR alone")} - excused
    if spent:
        chaos.fail(f"{len(spent)} jobs had an attempt spent")


def _terminate(chaos: Chaos, worker: Worker) -> None:
    worker.told_at = time.time()
    worker.process.send(signal.SIGTERM)
    chaos.history.write("term", worker=worker.id)
