"""Random sequences of submit, claim, renew, finish, crash, rescue, cancel, pause and retry against a small model,
and two connections that race for the same jobs."""

import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import HealthCheck, settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from sqlalchemy import text

from farm import jobs
from farm.errors import Conflict
from farm.jobs import Claimed, Warm
from farm.jobs.changing import turn_cancelled
from farm.queries import changing, claiming, maintaining, stopping
from farm.states import TRANSITIONS, JobState, Outcome
from tests.farm.conftest import Queue
from tests.farm.test_running import old_server


def machine_for(queue: Queue) -> type[RuleBasedStateMachine]:
    class Machine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            tables = "jobs, recipes, attempts, claims, images, segments, counters, counter_deltas, rates, batches"
            queue.do(lambda conn: conn.execute(text(f"TRUNCATE {tables}, doomed_objects")))
            self.batches: list[Any] = []
            self.claims: list[tuple[uuid.UUID, Claimed]] = []
            self.seen: dict[uuid.UUID, tuple[str, int]] = {}

        @rule(count=strategies.integers(1, 5), steps=strategies.sampled_from([4, 5]))
        def submit(self, count: int, steps: int) -> None:
            self.batches.append(queue.submit(count, steps=steps))

        @rule(limit=strategies.integers(1, 4))
        def claim(self, limit: int) -> None:
            worker = uuid.uuid4()
            claimed = queue.claim(limit=limit, worker=worker, warm=Warm())
            if claimed is not None:
                self.claims.append((worker, claimed))

        @precondition(lambda self: self.claims)
        @rule(data=strategies.data(), outcome=strategies.sampled_from([o for o in Outcome if o != Outcome.CRASHED]))
        def finish(self, data: Any, outcome: Outcome) -> None:
            # Also claims that were rescued or finished before: a late finish must change nothing.
            _, claimed = self._one_of(data, self.claims)
            before = self.rows()
            answers = queue.finish(claimed, outcome, "x")
            after = self.rows()
            for job in claimed.jobs:
                if before[job.id][:2] != ("running", job.attempt):
                    assert after[job.id] == before[job.id]
                else:
                    assert answers[job.id] == "done"

        @precondition(lambda self: self.claims)
        @rule(data=strategies.data())
        def crash(self, data: Any) -> None:
            worker, _ = self._one_of(data, self.claims)
            queue.do(jobs.rescue, settings=queue.settings, worker=worker)

        @precondition(lambda self: self.claims)
        @rule(data=strategies.data())
        def renew(self, data: Any) -> None:
            """A claim is held as long as one of its attempts is open, and no longer; nothing else changes."""
            worker, claimed = self._one_of(data, self.claims)
            before = self.rows()
            told = queue.do(jobs.renew, worker=worker, claims=[claimed.claim_id], settings=queue.settings)
            held = any(before[job.id][:2] == ("running", job.attempt) for job in claimed.jobs)
            assert told.lost == (set() if held else {claimed.claim_id})
            assert self.rows() == before

        @precondition(lambda self: self.claims)
        @rule()
        def time_passes(self) -> None:
            """Leases run out, of all that nobody renews: those jobs come back, the others stay."""
            kept = self.claims[-1] if self.claims else None
            # After the last lease: an earlier passing of time has renewed one far beyond the database's clock.
            last = text("SELECT greatest(clock_timestamp(), max(lease_until)) FROM claims")
            later = queue.do(lambda conn: conn.scalar(last)) + queue.settings.lease * 1.5
            if kept is not None:
                who, claimed = kept
                queue.do(jobs.renew, worker=who, claims=[claimed.claim_id], settings=queue.settings, now=later)
            before = self.rows()
            queue.do(jobs.rescue, settings=queue.settings, now=later + queue.settings.lease * 0.5)
            after = self.rows()
            mine = {job.id for job in kept[1].jobs} if kept is not None else set()
            for job, (state, attempt) in before.items():
                if state != "running" or (job in mine and attempt == self._attempt_of(kept, job)):
                    assert after[job] == (state, attempt)
                else:
                    assert after[job][0] != "running"

        @staticmethod
        def _one_of(data: Any, some: list[Any]) -> Any:
            """One of them. How many there are is decided by races, and what is drawn must not depend on that."""
            return some[data.draw(strategies.integers(0, 255)) % len(some)]

        @staticmethod
        def _attempt_of(kept: Any, job: uuid.UUID) -> int:
            return next(one.attempt for one in kept[1].jobs if one.id == job)

        @precondition(lambda self: self.claims)
        @rule(data=strategies.data(), rival=strategies.sampled_from(["claim", "rescue", "cancel", "finish", "renew"]))
        def race(self, data: Any, rival: str) -> None:
            """Two connections at the same moment: a worker finishes while somebody else means the same jobs.

            Whoever comes second finds what the first left; the invariants say whether anything was torn.
            """
            worker, claimed = self._one_of(data, self.claims)
            acts = {
                "claim": lambda: self.claim(4),
                "rescue": lambda: queue.do(jobs.rescue, settings=queue.settings, worker=worker),
                "cancel": lambda: queue.do(jobs.cancel_batch, queue.project, claimed.jobs[0].batch_id),
                "finish": lambda: queue.finish(claimed, Outcome.GIVEN_BACK),
                "renew": lambda: queue.do(
                    jobs.renew, worker=worker, claims=[claimed.claim_id], settings=queue.settings
                ),
            }
            with ThreadPoolExecutor(2) as threads:
                both = [threads.submit(queue.finish, claimed), threads.submit(acts[rival])]
                answers = both[0].result()
                both[1].result()
            after = self.rows()
            for job in claimed.jobs:
                if rival != "finish" and answers[job.id] == "done":
                    assert after[job.id] == ("succeeded", job.attempt)

        @precondition(lambda self: self.batches)
        @rule(data=strategies.data(), verb=strategies.sampled_from(["cancel", "pause", "resume", "retry"]))
        def change_batch(self, data: Any, verb: str) -> None:
            batch = self._one_of(data, self.batches)
            try:
                queue.do(getattr(jobs, f"{verb}_batch"), queue.project, batch.id)
            except Conflict:
                assert verb == "retry"

        @precondition(lambda self: self.batches)
        @rule(data=strategies.data())
        def stop_itself(self, data: Any) -> None:
            """As the sweeper does at a failed share: nothing of it is claimed any more, and what runs goes on."""
            batch = self._one_of(data, self.batches)
            queue.do(stopping.stop, batch.id, "too many failed")
            running = (
                "SELECT id FROM jobs WHERE batch_id = :batch AND state = 'running' AND cancel_requested_at IS NULL"
            )
            runs = set(queue.do(lambda conn: conn.execute(text(running), {"batch": batch.id}).scalars().all()))
            claims = [claimed.claim_id for _, claimed in self.claims]
            assert not queue.do(claiming.cancelled_of, claims) & runs

        @rule()
        def turn(self) -> None:
            """The sweeper turns over what a cancel or a stop left."""
            for segment in queue.do(changing.turning, 100):
                if segment["cancelling"]:
                    queue.do(turn_cancelled, segment["id"], 100)

        @precondition(lambda self: self.batches)
        @rule(data=strategies.data(), verb=strategies.sampled_from(["cancel", "retry"]))
        def change_job(self, data: Any, verb: str) -> None:
            job = data.draw(strategies.sampled_from(sorted(self.rows())))
            try:
                queue.do(getattr(jobs, f"{verb}_job"), queue.project, job)
            except Conflict:
                assert self.rows()[job][0] != "queued" or verb == "retry"

        @rule()
        def fold(self) -> None:
            queue.do(maintaining.fold, 3)

        @rule()
        def settle(self) -> None:
            ids = queue.do(lambda conn: list(conn.scalars(text("SELECT id FROM segments"))))
            queue.do(claiming.settle_heads, ids)

        def rows(self) -> dict[uuid.UUID, tuple[str, int]]:
            query = text("SELECT id, state, attempt FROM jobs")
            return {row.id: (row.state, row.attempt) for row in queue.do(lambda conn: conn.execute(query).all())}

        @invariant()
        def states_move_along_the_table_and_attempts_only_rise(self) -> None:
            now = self.rows()
            for job, (state, attempt) in now.items():
                old_state, old_attempt = self.seen.get(job, (state, attempt))
                assert attempt >= old_attempt
                # One rule may make two moves (a cancel that turns a rescued job): every path has to exist.
                if state != old_state and JobState(state) not in TRANSITIONS[JobState(old_state)]:
                    assert any(JobState(state) in TRANSITIONS[via] for via in TRANSITIONS[JobState(old_state)])
                assert old_state != "succeeded" or state == "succeeded"
            self.seen = now

        @invariant()
        def one_image_for_each_success_and_none_else(self) -> None:
            query = text(
                "SELECT j.id FROM jobs j FULL JOIN images i ON i.job_id = j.id "
                "WHERE (j.state = 'succeeded') <> (i.job_id IS NOT NULL) OR j.id IS NULL"
            )
            assert queue.do(lambda conn: conn.execute(query).all()) == []

        @invariant()
        def counters_equal_recounted_jobs(self) -> None:
            query = text("""
                SELECT c.state, c.n FROM (SELECT s.state, sum(s.n) AS n FROM (
                    SELECT segment_id, queued, running, succeeded, failed, cancelled FROM counters
                    UNION ALL SELECT segment_id, queued, running, succeeded, failed, cancelled FROM counter_deltas) x
                    CROSS JOIN LATERAL (VALUES ('queued', queued), ('running', running), ('succeeded', succeeded),
                        ('failed', failed), ('cancelled', cancelled)) AS s(state, n) GROUP BY 1) c WHERE n <> 0
            """)
            counted = {row.state: int(row.n) for row in queue.do(lambda conn: conn.execute(query).all())}
            recounted: dict[str, int] = {}
            for state, _ in self.rows().values():
                recounted[state] = recounted.get(state, 0) + 1
            assert counted == recounted

        @invariant()
        def queued_jobs_lie_behind_their_segments_head(self) -> None:
            """Otherwise no claim would ever find them."""
            query = text("""
                SELECT j.id FROM jobs j JOIN segments s ON s.id = j.segment_id WHERE j.state = 'queued'
                AND (s.head_run_at IS NULL OR (j.run_at, j.id) < (s.head_run_at, s.head_id))
            """)
            assert queue.do(lambda conn: conn.execute(query).all()) == []

        @invariant()
        def running_jobs_have_one_open_attempt_and_others_none(self) -> None:
            query = text("""
                SELECT j.id FROM jobs j LEFT JOIN attempts a ON a.job_id = j.id AND a.outcome IS NULL
                GROUP BY j.id, j.state HAVING (j.state = 'running')::int <> count(a.job_id)
            """)
            assert queue.do(lambda conn: conn.execute(query).all()) == []

    return Machine


@pytest.mark.timeout(400)
def test_the_queue_follows_its_model(queue: Queue) -> None:
    old_server(queue)
    run_state_machine_as_test(
        machine_for(queue),
        settings=settings(
            max_examples=50, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
