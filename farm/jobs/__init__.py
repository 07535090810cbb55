"""The verbs of the queue. Each takes an open connection and never commits; doorbells ring after the caller's commit."""

from farm.jobs.changing import (
    cancel_batch,
    cancel_job,
    delete_batch,
    delete_job,
    pause_batch,
    resume_batch,
    retry_batch,
    retry_job,
    set_priority,
)
from farm.jobs.presence import goodbye, hello, tell
from farm.jobs.reading import events, get_batch, get_job, image_of, list_batches, list_jobs, queue, workers
from farm.jobs.replaying import replay_job
from farm.jobs.running import (
    Claimed,
    ClaimedJob,
    Difference,
    Renewal,
    Result,
    StoredImage,
    claim,
    finish,
    renew,
    rescue,
)
from farm.jobs.submitting import idempotent, remember, submit
from farm.scheduling import Warm

__all__ = [
    "Claimed",
    "ClaimedJob",
    "Difference",
    "Renewal",
    "Result",
    "StoredImage",
    "Warm",
    "cancel_batch",
    "cancel_job",
    "claim",
    "delete_batch",
    "delete_job",
    "events",
    "finish",
    "get_batch",
    "get_job",
    "goodbye",
    "hello",
    "idempotent",
    "image_of",
    "list_batches",
    "list_jobs",
    "pause_batch",
    "queue",
    "remember",
    "renew",
    "replay_job",
    "rescue",
    "resume_batch",
    "retry_batch",
    "retry_job",
    "set_priority",
    "submit",
    "tell",
    "workers",
]
