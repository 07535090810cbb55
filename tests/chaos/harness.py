"""One farm for one row of the suite: its database, bucket and processes, its client, and who watches them."""

import random
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sqlalchemy import text

from farm import catalogue, keys, webhooks
from farm.db import Database
from farm.errors import Unavailable
from farm.stack import Servers
from farm.stack.ports import LOOPBACK, answers, free_port
from farm.storage import Store
from tests.api.conftest import add_models
from tests.chaos import audit, hooks, invariants, listening, secrets
from tests.chaos.client import Client
from tests.chaos.faults import Faults, on_last_try
from tests.chaos.history import History
from tests.chaos.invariants import Violation
from tests.chaos.processes import Process
from tests.chaos.setting import PRODUCTION_BOUND, SCALED, SCALED_BOUND, TEMPLATE, Figures, Worker, prepare, verdict
from tests.chaos.stalls import Stalls
from tests.conftest import administer, with_database
from tests.farm.receivers import receiving
from tests.workers.conftest import environment_of

LOOK_SECONDS = 0.25
TOLD_SECONDS, TOLD_SECONDS_OF_FAILED = 90, 20
"""How long messages to webhooks are waited for at the end; less in a run that failed already."""
NOTHING = Faults()


class Chaos:
    """A running farm and everything a row does to it. Everything it started ends with the block."""

    def __init__(
        self,
        servers: Servers,
        folder: Path,
        *,
        seed: int,
        slack: float,
        production: bool = False,
        real: bool = False,
        **settings: Any,
    ) -> None:
        """`slack`: seconds that a busy machine may be late by. `production`: the timers as they are shipped.
        `real`: with the models of the package, for workers that really render."""
        base = prepare(servers)
        name = f"chaos_{uuid.uuid4().hex[:12]}"
        administer(base, f"CREATE DATABASE {name} TEMPLATE {TEMPLATE} STRATEGY FILE_COPY")
        timers = {} if production else SCALED
        self.settings = with_database(base, name).model_copy(
            update={
                "s3_bucket": name.replace("_", "-"),
                "redis_prefix": f"{name}:",
                "api_host": LOOPBACK,
                "api_port": free_port(),
                "cache_dir": folder / "cache",
                "micro_batch": 4,
                # Two objects for each picture: a crash may come between them.
                "thumbnail_pixels": 32,
                "database_pool_size": 6,
                "log_format": "console",
                "webhook_networks": "127.0.0.0/8",
                **timers,
                **settings,
            }
        )
        self.bound = PRODUCTION_BOUND if production else SCALED_BOUND
        self.slack = slack
        self.servers = servers
        self.folder = folder
        self.random = random.Random(seed)
        self.history_path = folder / "history.ndjson"
        self.history = History(self.history_path, "run")
        self.figures = Figures()
        self.violations: list[Violation] = []
        self.poison: set[str] = set()
        """Words of prompts whose jobs must fail."""
        self.pictures = not real
        self.blocked = 0.0
        """Seconds for which a row keeps everybody, the sweeper too, from the database's rows."""
        self.worker_settings: dict[str, Any] = {}
        """What workers started from now on are set to beside the farm's settings."""
        self._real = real
        self.database = Database(self.settings, pool_size=4)
        self.store = Store(self.settings)
        self.workers: list[Worker] = []
        self.others: list[Process] = []
        self._wanted: list[Faults] = []
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._logs = 0
        self._looks = 0
        self._opened = ExitStack()

    def __enter__(self) -> Self:
        self.store.ensure_bucket()
        if not self._real:
            add_models(self.database)
        with self.database.transaction() as conn:
            if self._real:
                catalogue.install_default(conn, self.store)
            audit.install(conn)
            made = keys.create_key(conn, project="chaos", name="chaos", scopes=list(keys.SCOPES))
            self.receiver = self._opened.enter_context(receiving())
            project = conn.execute(text("SELECT id FROM projects WHERE name = 'chaos'")).scalar_one()
            self.webhook = webhooks.create(
                conn, project, url=self.receiver.url, events=["batch.finished"], settings=self.settings
            )
            self.inspector = hooks.Inspector(str(self.webhook.secret))
            self.receiver.look = self.inspector.look
        self.stalls = Stalls()
        self._opened.callback(self.stalls.close)
        url = f"http://{LOOPBACK}:{self.settings.api_port}"
        told = {"the API key": str(made.key), "the webhook's secret": str(self.webhook.secret)}
        self.secrets = secrets.of(self.settings, **told)
        self.client = Client(url, str(made.key), self.history, self.secrets)
        self.listener = listening.Listener(self.settings, self.secrets)
        self._opened.callback(self.listener.close)
        for name, run in (("keeper", self._keep), ("watcher", self._watch)):
            thread = threading.Thread(target=self._stand_by, args=[name, run], name=name, daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)
        for process in [*(worker.process for worker in self.workers), *self.others]:
            process.kill()
        self._opened.close()
        self.client.http.close()
        self.database.dispose()
        self.history.close()
        # The bucket and the database go with their servers; a database of a failed row is worth a look.
        if error is None and not self.violations:
            administer(self.settings, f"DROP DATABASE {self.database.url.database} WITH (FORCE)")
            shutil.rmtree(self.folder / "cache", ignore_errors=True)

    # Processes

    def start(self, part: str, faults: Faults = NOTHING, **changes: Any) -> Process:
        """Start the API or a sweeper, with settings changed as said."""
        process = self._spawn(part, faults, changes, {})
        self.others.append(process)
        if part == "api":
            self.until(lambda: answers(self.settings.api_port, "/api/v1/health/live") or not process.alive)
        return process

    def stop_part(self, part: str) -> None:
        """End every process of that part, at once."""
        for process in [process for process in self.others if process.part == part]:
            process.kill()
            self.others.remove(process)

    def worker(self, faults: Faults = NOTHING, **changes: Any) -> Worker:
        """Start a worker, which nobody restarts."""
        made = uuid.uuid4()
        part = "engine" if self._real else "worker"
        with self._lock:
            # As under a supervisor, the next process at a place has the name of the one before.
            taken = {one.place for one in self.alive()}
            place = next(n for n in range(len(taken) + 1) if n not in taken)
            changes = {"worker_name": f"place-{place}"} | self.worker_settings | changes
            process = self._spawn(part, faults, changes, {"FARM_WORKER_ID": str(made)})
            worker = Worker(made, process, place)
            self.workers.append(worker)
        self.history.write("worker", id=made, pid=process.pid)
        return worker

    def keep(self, count: int, faults: Faults = NOTHING) -> None:
        """From now on see that so many such workers run, as a supervisor would (which takes no jobs back for them)."""
        with self._lock:
            self._wanted = [faults] * count
        self._refill()

    def ready(self) -> None:
        """Wait until every worker takes work."""
        self.until(lambda: all(one.process.said(" ready ") for one in self.alive()) and self.alive(), 90, "ready")

    def _spawn(self, part: str, faults: Faults, changes: dict[str, Any], more: dict[str, str]) -> Process:
        with self._lock:
            self._logs += 1
            log = self.folder / f"{part}-{self._logs}.log"
        environment = environment_of(self.settings.model_copy(update=changes)) | more
        return Process(part, environment, log, faults, self.history_path)

    def _stand_by(self, name: str, run: Callable[[], None]) -> None:
        """A thread that ended would keep or watch nothing, and nobody would know."""
        try:
            run()
        except Exception as error:  # noqa: BLE001  # whatever it was, the run must not pass
            self.fail(f"the run's own {name} ended: {error!r}")

    def _keep(self) -> None:
        while not self._stop.wait(0.05):
            self._refill()

    def _refill(self) -> None:
        with self._lock:
            if self._stop.is_set():
                return
            missing = len(self._wanted) - len(self.alive())
            faults = self._wanted[0] if self._wanted else NOTHING
            for _ in range(missing):
                self.worker(faults)

    def alive(self) -> list[Worker]:
        with self._lock:
            return [worker for worker in self.workers if worker.process.alive]

    def kill(self, worker: Worker) -> None:
        """SIGKILL, noting when."""
        worker.killed_at = time.time()
        worker.process.send(signal.SIGKILL)
        self.history.write("kill", worker=worker.id)
        self.figures.add("kills")

    def catch(self, found: Sequence[Worker]) -> Worker | None:
        """Freeze one of these workers, whichever; None for one that has a job on its last try, and goes on."""
        if not found:
            return None
        worker = self.random.choice(found)
        worker.process.send(signal.SIGSTOP)
        spared = True
        try:
            # Frozen first: it cannot take such a job after it was looked at.
            with self.database.transaction() as conn:
                spared = on_last_try(conn, worker=worker.id)
        finally:
            if spared:
                worker.process.send(signal.SIGCONT)
        if spared:
            self.figures.add("kills spared")
        return None if spared else worker

    # Questions

    def ask(self, statement: str, **parameters: Any) -> Any:
        """Rows of one question to the database."""
        with self.database.transaction() as conn:
            return conn.execute(text(statement), parameters).all()

    def counts(self) -> dict[str, int]:
        """Jobs by state, counted."""
        return {row.state: row.n for row in self.ask("SELECT state, count(*) AS n FROM jobs GROUP BY 1")}

    def backlog(self) -> int:
        """Jobs not finished yet."""
        return int(self.ask("SELECT count(*) AS n FROM jobs WHERE finished_at IS NULL")[0].n)

    def holding(self) -> list[Worker]:
        """Running workers that hold a claim just now."""
        held = {row.worker_id for row in self.ask("SELECT worker_id FROM claims WHERE closed_at IS NULL")}
        return [worker for worker in self.alive() if worker.id in held and not worker.frozen]

    def until(self, said: Callable[[], Any], seconds: float = 120.0, what: str = "") -> Any:
        """Ask until the answer is true. Postgres being away is no answer. Fails after `seconds`."""
        end = time.monotonic() + seconds
        while True:
            try:
                if answer := said():
                    return answer
            except Unavailable:
                pass
            if time.monotonic() > end:
                raise TimeoutError(f"it did not happen within {seconds:.0f} s: {what}")
            time.sleep(0.05)

    def until_done(self, seconds: float) -> None:
        """Wait until every job has ended; after `seconds`, what is open becomes violations."""
        try:
            self.until(lambda: self.backlog() == 0, seconds)
        except TimeoutError:
            self.history.write("not done", counts=self.counts())

    # Verdicts

    def _watch(self) -> None:
        seen: set[Violation] = set()
        pause = LOOK_SECONDS
        while not self._stop.wait(pause):
            began = time.monotonic()
            try:
                self._look(seen)
            except Unavailable:
                continue
            self._looks += 1
            # Looking reads every job: in a long run it must not become the load.
            pause = max(LOOK_SECONDS, 10 * (time.monotonic() - began))

    def _look(self, seen: set[Violation]) -> None:
        for violation in self._along():
            # Seconds and counts change with every look; the same trouble is told once.
            same = Violation(violation.invariant, violation.what.split(" ran ")[0].split(" counts/has ")[0])
            if same not in seen:
                seen.add(same)
                self.violations.append(violation)
                self.history.write("violation", invariant=violation.invariant, what=violation.what)

    def _along(self) -> list[Violation]:
        accepted = self.client.accepted
        # Whoever lost its lease is taken back within a lease and two sweeps: what was before excuses nobody now.
        waited = self.settings.lease + 2 * self.settings.rescue_every
        slack = timedelta(seconds=self.slack + self.blocked + self.stalls.lately(waited.total_seconds()))
        with self.database.transaction() as conn:
            return invariants.all_along(conn, self.settings, accepted=accepted, slack=slack)

    def _all_told(self) -> bool:
        with self.database.transaction() as conn:
            return hooks.all_told(conn)

    def fail(self, what: str) -> None:
        """Something this row promises did not hold."""
        self.violations.append(Violation("row", what))
        self.history.write("violation", invariant="row", what=what)

    def judge(self) -> None:
        """The last look, at everything; and how long jobs of killed workers were out of reach."""
        if not self.backlog():
            # A run that failed already waits too, or it would blame the courier for what it did not wait for.
            with suppress(TimeoutError):
                self.until(self._all_told, TOLD_SECONDS_OF_FAILED if self.violations else TOLD_SECONDS)
        self._stop.set()
        for thread in self._threads:
            thread.join(30)
            if thread.is_alive():
                self.fail(f"the run's own {thread.name} hangs")
        self.figures.add("looks", self._looks)
        if not self._looks:
            self.fail("nobody looked at the invariants while it ran")
        found = self._along()
        with self.database.transaction() as conn:
            found += invariants.at_the_end(conn, self.settings, accepted=self.client.accepted, poison=self.poison)
            found += hooks.check(conn, self.inspector, self.receiver.seen)
        found += invariants.check_pictures(self.database, self.store, pictures=self.pictures, secrets=self.secrets)
        found += [*self.client.leaks, *self._leaks()]
        with self.database.transaction() as conn:
            known = {violation.what for violation in self.violations}
            self.violations += [violation for violation in found if violation.what not in known]
            self._measure(conn)
            for row in conn.execute(text("SELECT * FROM attempts ORDER BY started_at, job_id")).mappings():
                self.history.write("attempt", **row)
        if self.stalls.seconds:
            self.figures.add("machine stood still s", self.stalls.seconds)
        self._judge_recovery()

    def _leaks(self) -> list[Violation]:
        """Canaries where nobody may find one: logs, the servers' too, messages to webhooks, and the broker."""
        self.figures.add("broker messages heard", self.listener.heard)
        return [
            *secrets.in_files(self.folder, self.servers, self.secrets),
            *hooks.leaks(self.receiver.seen, self.secrets),
            *self.listener.leaks,
            *listening.in_keys(self.settings, self.secrets),
        ]

    def _judge_recovery(self) -> None:
        """A machine that stood still excuses the recovery in which it did, and no other."""
        measured = [(back - killed, self.stalls.within(killed, back)) for killed, back in self.figures.recoveries]
        if not measured:
            return
        seconds, stood = max(measured, key=lambda one: one[0] - one[1])
        slack = 0.0 if self.bound == PRODUCTION_BOUND else self.slack
        self.figures.said["recovery"] = verdict(seconds, self.bound, stood=stood, slack=slack)
        if seconds - stood > self.bound + slack:
            what = f"took {seconds:.1f} s ({stood:.1f} of them stood still), promised are {self.bound:.0f} s"
            self.violations.append(Violation("recovery", what))

    def _measure(self, conn: Any) -> None:
        killed = {worker.id: worker.killed_at for worker in self.workers if worker.killed_at is not None}
        rows = conn.execute(
            text("""
                SELECT c.worker_id, extract(epoch FROM max(a.finished_at)) AS back FROM attempts a
                JOIN claims c ON c.id = a.claim_id WHERE a.outcome = 'crashed' AND c.worker_id = ANY(:ids) GROUP BY 1
            """),
            {"ids": list(killed)},
        )
        for row in rows:
            self.figures.recoveries.append((killed[row.worker_id], float(row.back)))
        outcomes = conn.execute(text("SELECT outcome, count(*) AS n FROM attempts GROUP BY 1"))
        for row in outcomes:
            self.figures.add(f"attempts {row.outcome}", row.n)
