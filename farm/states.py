"""The states of a job, and the only transition table in the project."""

from enum import StrEnum


class JobState(StrEnum):
    """Where a job stands. Terminal if and only if `finished_at` is set."""

    QUEUED = "queued"
    """Accepted and waiting. Put here by a submission, a retry (after a failure or by a person), a rescue or a
    give-back; `run_at` may lie in the future (schedule, backoff). Taken out by a claim or a cancel."""

    RUNNING = "running"
    """Inside a claim whose lease is held by a worker. Put here by a claim only. Taken out by a finish that names this
    attempt, or by the sweeper once the lease ran out."""

    SUCCEEDED = "succeeded"
    """Its image is stored and recorded. Put here by a fenced finish only; nothing takes it out."""

    FAILED = "failed"
    """Given up with a reason: a permanent error, too many failures, or too many crashes alone. A person's retry puts
    it back to queued."""

    CANCELLED = "cancelled"
    """Stopped by a person before it succeeded. A person's retry puts it back to queued."""

    @property
    def terminal(self) -> bool:
        return self in TERMINAL


class Outcome(StrEnum):
    """How an attempt ended. A running attempt has none."""

    SUCCEEDED = "succeeded"
    """The image was uploaded and published."""
    RETRY = "retry"
    """It failed in a way that can pass; the job was queued again with backoff, or failed at its limit."""
    FAILED = "failed"
    """It failed for good: the same recipe would fail again."""
    CANCELLED = "cancelled"
    """Stopped at a denoising step because the job had been cancelled."""
    GIVEN_BACK = "given_back"
    """Handed back unspent by a worker that is leaving."""
    CRASHED = "crashed"
    """Its worker vanished and the lease ran out."""


TERMINAL = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})

TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.CANCELLED}),
    JobState.RUNNING: frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.QUEUED}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset({JobState.QUEUED}),
    JobState.CANCELLED: frozenset({JobState.QUEUED}),
}
