"""What the farm answers: the shapes that the API sends and the client reads. One definition for both."""

from datetime import datetime
from typing import Annotated, Any, Generic, Literal, TypeVar
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from farm.formats import KINDS, Format, format_of
from farm.modelkinds import ModelKind
from farm.states import JobState

T = TypeVar("T")

Owner = Annotated[
    str | None, Field(description="The project whose jobs alone may name it; null: those of all projects may.")
]


class View(BaseModel):
    """Readers ignore fields they do not know, so an older client reads a newer farm."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Page(View, Generic[T]):
    """One page of a list; `next_cursor` is null on the last."""

    items: list[T]
    next_cursor: str | None = None


class AdapterChoice(View):
    """An adapter by name, at a weight."""

    name: str
    weight: float


class ControlChoice(View):
    """A ControlNet by name and the picture it follows."""

    name: str
    image: str
    weight: float
    start: float
    end: float


class JobError(View):
    """Why a job failed (or why its last attempt did)."""

    code: str
    message: str


class ImageView(View):
    """The stored picture of a job; sizes in pixels and bytes."""

    sha256: str
    bytes: int
    width: int
    height: int


class ReplayView(View):
    """What came of rendering job `of` again: how far the two pictures are apart, at most and on average, in levels of
    255, and the share of pixels that differ at all. Null until both were compared."""

    of: UUID
    levels: int | None = None
    mean_levels: float | None = None
    differing: float | None = None


class JobView(View):
    """A job and the recipe fields it was submitted with. `number` is its place in its batch, from 0; `source` is the
    upload it was told to start from (as `image`), `image` the picture it became."""

    id: UUID
    batch_id: UUID
    number: int
    state: JobState
    attempt: int
    prompt: str
    negative_prompt: str = ""
    checkpoint: str
    adapters: list[AdapterChoice] = []
    acceleration: Literal["lcm-lora", "none"]
    vae: str | None = None
    width: int
    height: int
    steps: int
    guidance_scale: float
    scheduler: str
    task: Literal["txt2img", "img2img", "inpaint"] = "txt2img"
    source: str | None = None
    strength: float | None = None
    mask: str | None = None
    composite: bool | None = None
    controls: list[ControlChoice] = []
    motion: str | None = None
    frames: int | None = None
    fps: int | None = None
    format: Format | None = None
    quality: int | None = None
    seed: int
    priority: int
    labels: dict[str, str] = {}
    warnings: list[str] = []
    error: JobError | None = None
    created_at: datetime
    run_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    image: ImageView | None = None
    replay: ReplayView | None = None

    @property
    def suffix(self) -> str:
        """How a file of its picture is called at the end, such as `png`."""
        return KINDS[format_of({"format": self.format, "motion": self.motion})].suffix


class Counts(View):
    """Jobs of a batch (or lane) by state."""

    queued: int = 0
    running: int = 0
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0

    @property
    def finished(self) -> int:
        return self.succeeded + self.failed + self.cancelled


class BatchView(View):
    """A batch. `images_per_second` covers the last minute, or its life if that is shorter;
    `eta_seconds` is null while nothing moves. `stop_reason` says why it stopped itself, until it is retried."""

    id: UUID
    name: str
    total: int
    priority: int
    paused: bool
    labels: dict[str, str] = {}
    counts: Counts
    images_per_second: float = 0.0
    eta_seconds: float | None = None
    stop_at_failed_share: float | None = None
    stop_reason: str | None = None
    warnings: list[str] = []
    created_at: datetime

    @property
    def done(self) -> bool:
        """Nothing of it is queued or running any more."""
        return self.counts.finished >= self.total


class DryRun(View):
    """What a submission would do: how many jobs in how many lanes and pipelines, and the warnings."""

    jobs: int
    lanes: int
    pipelines: int
    warnings: list[str] = []


class LaneView(View):
    """One lane's queue. Ages in seconds; `images_per_second` covers the last minute."""

    lane: str
    pool: str
    checkpoint: str
    depth: int
    running: int
    oldest_age_seconds: float | None = None
    images_per_second: float = 0.0


class RestView(View):
    """What a worker failed several times in a row and leaves to others, while there are some: a checkpoint, or one lane
    of it. `code` is the last failure's; `seconds` were left at its last heartbeat."""

    of: Literal["checkpoint", "lane"]
    hash: str
    checkpoint: str
    failures: int
    code: str
    seconds: float


class WorkerView(View):
    """A worker process, what it keeps warm (checkpoints and adapters by name, bytes on the device), and how well its
    cache serves: hit rates, load seconds, bytes within budgets, and which checkpoints wait in host memory. `name` is
    the same after a restart: the worker's own, else host and device."""

    id: UUID
    pool: str
    name: str = ""
    host: str
    pid: int
    device: str
    version: str
    state: Literal["starting", "idle", "busy", "leaving", "lost"]
    started_at: datetime
    heartbeat_at: datetime
    running: int = 0
    warm: list[dict[str, Any]] = []
    cache: dict[str, Any] = {}
    resting: list[RestView] = []


class CheckpointView(View):
    """Base weights a job may name. `profile` holds its default size, steps and guidance and its limits; `source` where
    they came from: text, revision, sha256 of a single file."""

    name: str
    hash: str
    family: str
    state: Literal["pending", "available", "refused"]
    bytes: int
    profile: dict[str, Any]
    source: dict[str, Any] = {}
    project: Owner = None
    created_at: datetime


class VaeView(View):
    """A VAE a job may name instead of its checkpoint's own. `family` is the one whose latents it decodes; a `tiny` one
    (TAESD) is also found by `vae: "tiny"`."""

    name: str
    hash: str
    family: str
    state: Literal["pending", "available", "refused"]
    tiny: bool = False
    bytes: int
    source: dict[str, Any] = {}
    project: Owner = None
    created_at: datetime


class ControlNetView(View):
    """A ControlNet a job may name in `controls`. `source` says where it came from."""

    name: str
    hash: str
    family: str
    state: Literal["pending", "available", "refused"]
    bytes: int
    source: dict[str, Any] = {}
    project: Owner = None
    created_at: datetime


class MotionView(View):
    """A motion adapter a job may name as `motion`: at most `max_frames` frames. `acceleration` is the LCM-LoRA that
    animations with it are drawn with; null for the checkpoint's."""

    name: str
    hash: str
    family: str
    state: Literal["pending", "available", "refused"]
    max_frames: int
    acceleration: str | None = None
    bytes: int
    source: dict[str, Any] = {}
    project: Owner = None
    created_at: datetime


class AdapterView(View):
    """LoRA weights a job may name. `source` says where they came from."""

    name: str
    hash: str
    family: str
    kind: Literal["acceleration", "style"]
    state: Literal["pending", "available", "refused"]
    bytes: int
    source: dict[str, Any] = {}
    project: Owner = None
    created_at: datetime


class RegistrationView(View):
    """A model on its way into the farm. `reason` says why it was refused (file, key, what is wrong) or, while it is
    under way, why the last try failed; `notes` what a person should know about an available one. Sizes in bytes."""

    id: UUID
    name: str
    kind: ModelKind
    source: str
    state: Literal["waiting", "fetching", "checking", "storing", "testing", "available", "refused"]
    reason: str | None = None
    notes: list[str] = []
    family: str | None = None
    hash: str | None = None
    bytes: int = 0
    total_bytes: int | None = None
    project: Owner = None
    created_at: datetime
    finished_at: datetime | None = None


class UploadView(View):
    """A picture that jobs may name by its `hash`, the sha256 of its bytes. Sizes in pixels and bytes; `used_at` is when
    it was last sent or named."""

    hash: str
    media_type: Literal["image/png", "image/jpeg", "image/webp"]
    width: int
    height: int
    bytes: int
    created_at: datetime
    used_at: datetime


class KeyView(View):
    """An API key without its secret. `key` is set in the one answer that creates it."""

    id: UUID
    name: str
    prefix: str
    project: str
    scopes: list[str]
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    key: str | None = Field(default=None, description="Shown once, when the key is made.")


class ImageLink(View):
    """Where a picture can be fetched without a key until `expires_at`."""

    url: str
    expires_at: datetime
    sha256: str


class Event(View):
    """One server-sent event of a batch: `job` (a job became terminal), `progress` (the batch) or `done`."""

    id: str
    event: Literal["job", "progress", "done"]
    data: dict[str, Any]
