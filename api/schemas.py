"""The shapes that neither `farm.views` nor `farm.submission` holds: small bodies, query parameters, service answers."""

from datetime import datetime
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, SkipValidation, field_validator

from farm.errors import InvalidRequest
from farm.families import Profile
from farm.fields import FailedShare, Labels, Moment, UploadHash
from farm.states import JobState

Text = Annotated[str, Field(max_length=200, pattern=r"^[^\x00]*$")]
"""A short text; Postgres stores every character but NUL."""

ProjectName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]

Scope = Literal["jobs:read", "jobs:submit", "jobs:manage", "jobs:write", "admin"]


class Body(BaseModel):
    """Bodies say what they mean: unknown fields and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)


class BatchBody(Body):
    """Many jobs. `defaults` holds any field of a job for those that do not say otherwise. Batch `labels` are the
    defaults' labels unless given. Once `stop_at_failed_share` of the jobs that succeeded or failed have failed, the
    batch stops itself; it is judged from 20 of them on, where it has fewer than 40 jobs from half, at least 2."""

    name: Text = ""
    labels: Labels | None = None
    defaults: dict[str, Any] = {}
    stop_at_failed_share: FailedShare | None = None
    jobs: Annotated[list[SkipValidation[dict[str, Any]]], Field(min_length=1)]
    """Each is looked at later, in its turn: a million wrong ones must not make a million findings."""

    @property
    def batch_labels(self) -> dict[str, str]:
        """The batch's own labels. Defaults that hold no labels worth the name are refused with the jobs."""
        if self.labels is not None:
            return self.labels
        shared = self.defaults.get("labels")
        return shared if isinstance(shared, dict) else {}


class PriorityBody(Body):
    """A batch's new priority: higher goes first."""

    priority: Annotated[int, Field(ge=-100, le=100)]


class KeyBody(Body):
    """A key to make. Without a project it belongs to the project of the key that asks for it."""

    name: Annotated[Text, Field(min_length=1)]
    project: ProjectName | None = None
    scopes: Annotated[list[Scope], Field(min_length=1), FailFast()] = ["jobs:read", "jobs:write"]
    expires_at: Moment | None = None

    @field_validator("expires_at")
    @classmethod
    def _ahead(cls, value: datetime | None) -> datetime | None:
        if value is not None and value <= datetime.now(tz=value.tzinfo):
            raise ValueError("must lie in the future")
        return value


class ModelBody(Body):
    """A model to register. `source` is `hf:owner/name@<40 hex digits>[/folder or file.safetensors]` or
    `s3://bucket/prefix or key.safetensors`. With the name of a `project` only its jobs may name the model."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    source: Annotated[Text, Field(min_length=1, max_length=1000)]
    family: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")] | None = None
    project: ProjectName | None = None


class CheckpointBody(ModelBody):
    """A checkpoint to register. `variant` picks among the number types a folder offers, such as `fp16`; `profile`
    changes what the family's profile says."""

    variant: Annotated[str, Field(pattern=r"^\w{1,30}$")] | None = None
    profile: Profile = Profile()


class VaeBody(ModelBody):
    """A VAE to register. `family` is the one whose latents it decodes, where its configuration does not tell."""

    variant: Annotated[str, Field(pattern=r"^\w{1,30}$")] | None = None


class ControlNetBody(ModelBody):
    """A ControlNet to register. `family` is the one it is made for, where several would take it."""

    variant: Annotated[str, Field(pattern=r"^\w{1,30}$")] | None = None


class MotionProfile(Body):
    """What animations are rendered with unless a job says otherwise: the LCM-LoRA of this name, where a motion adapter
    has one of its own."""

    acceleration: Annotated[Text, Field(min_length=1)] | None = None


class MotionBody(ModelBody):
    """A motion adapter (AnimateDiff) to register."""

    variant: Annotated[str, Field(pattern=r"^\w{1,30}$")] | None = None
    profile: MotionProfile = MotionProfile()


class AdapterBody(ModelBody):
    """A LoRA to register. Without `kind` it is a style, unless the farm knows the repository for an acceleration."""

    kind: Literal["style", "acceleration"] | None = None


Limit = Annotated[int, Field(ge=0, le=2**53 - 1)]


class LimitsBody(Body):
    """Limits of a project to set; null takes one away, what is absent stays."""

    queued_jobs: Limit | None = None
    running_jobs: Limit | None = None
    pixel_steps_per_day: Limit | None = None
    requests_per_second: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    upload_bytes: Limit | None = None


TellOf = Literal["batch.finished", "batch.failed_share", "batch.stopped", "job.failed"]
TellOfs = Annotated[list[TellOf], Field(min_length=1, max_length=len(get_args(TellOf)))]
WebhookUrl = Annotated[str, Field(min_length=1, max_length=2000, examples=["https://example.com/farm"])]


class WebhookBody(Body):
    """Whom to tell of what. `batch.failed_share` is told once when `failed_share` of a batch's jobs have failed."""

    url: WebhookUrl
    events: TellOfs = list(get_args(TellOf))
    failed_share: FailedShare = 0.1


class WebhookChange(Body):
    """What to change of a webhook. Switched off, it forgets what was still to be told."""

    url: WebhookUrl | None = None
    events: TellOfs | None = None
    failed_share: FailedShare | None = None
    enabled: bool | None = None


class Overlap(BaseModel):
    """How long two secrets of a webhook are valid."""

    model_config = ConfigDict(extra="forbid")

    overlap: int = Field(86_400, ge=0, le=2_592_000, description="Seconds that the secret before stays valid too.")


def _pair(value: str) -> str:
    key, equals, _ = value.partition("=")
    if not key or not equals or "\0" in value:
        raise ValueError("must read key=value, such as site=bridge-7")
    return value


class Paging(BaseModel):
    """Which page of a list."""

    model_config = ConfigDict(extra="forbid")

    cursor: Annotated[str, Field(min_length=1, max_length=500)] | None = Field(
        None, description="`next_cursor` of the page before."
    )
    limit: int = Field(50, ge=1, le=500, description="Most items on the page.")


class Listing(Paging):
    """What every list of jobs or batches understands."""

    label: list[Annotated[str, AfterValidator(_pair)]] = Field(
        [], description="Only what carries this label, as `key=value`; may be repeated.", examples=[["site=bridge-7"]]
    )

    @property
    def labels(self) -> dict[str, str]:
        """The labels asked for. Raises InvalidRequest when one key is asked for with two values."""
        pairs = [entry.partition("=")[::2] for entry in self.label]
        labels = dict(pairs)
        if len(set(pairs)) != len(labels):
            problem = "a label has one value, so nothing can carry two"
            raise InvalidRequest("the request is not valid", problems=[{"field": "label", "problem": problem}])
        return labels


class UploadListing(BaseModel):
    """Which uploads to list."""

    model_config = ConfigDict(extra="forbid")

    cursor: UploadHash | None = Field(None, description="`next_cursor` of the page before.")
    limit: int = Field(50, ge=1, le=500, description="Most items on the page.")


class JobListing(Listing):
    """Which jobs to list."""

    state: list[JobState] = Field([], description="Only jobs in this state; may be repeated.")


class BatchListing(Listing):
    """Which batches to list."""

    state: Literal["active", "done", "paused"] | None = Field(None, description="Only batches in this state.")


class Link(BaseModel):
    """How to answer for a picture."""

    model_config = ConfigDict(extra="forbid")

    redirect: bool = Field(True, description="`false` answers the address as JSON instead of redirecting to it.")


class Rehearsal(BaseModel):
    """Whether a submission is only checked."""

    model_config = ConfigDict(extra="forbid")

    dry_run: bool = Field(False, description="Check everything, store nothing.")


class Version(BaseModel):
    """What is running."""

    version: str
    schema_version: str


class Alive(BaseModel):
    """The process answers."""

    status: Literal["alive"] = "alive"


class Readiness(BaseModel):
    """Whether requests can be served: Postgres (with this version's schema) and S3 must answer. Without Redis the farm
    is slower and still right, so it is only reported."""

    status: Literal["ready", "not ready"]
    postgres: Literal["ok", "down", "other schema"]
    s3: Literal["ok", "down"]
    redis: Literal["ok", "down"]


class FieldProblem(BaseModel):
    """One thing wrong with a request."""

    line: int | None = Field(None, description="Line of an NDJSON body, from 1.")
    field: str
    problem: str


class ProblemDocument(BaseModel):
    """RFC 9457. Programs test `code`; people read `detail`."""

    type: str = Field(examples=["urn:lcm-farm:problem:not-found"])
    title: str = Field(examples=["Not Found"])
    status: int = Field(examples=[404])
    detail: str = Field(examples=["there is no such job in your project"])
    instance: str = Field(examples=["/api/v1/jobs/0193f0c2-0000-7000-8000-000000000000"])
    code: str = Field(examples=["not-found"])
    retryable: bool = Field(description="The same request can succeed later.")
    request_id: str = Field(description="The same as the header X-Request-Id; the farm's log has it too.")
    problems: list[FieldProblem] | None = Field(None, description="What is wrong with which field; the first hundred.")
