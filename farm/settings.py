"""Every setting of the farm: one frozen object, read from the environment with the prefix `FARM_`.

docs/settings.md lists them; a test fails on one that is missing there.
"""

from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from farm.addresses import networks_of

PLACEHOLDERS = frozenset({"", "changeme", "change-me", "password", "secret", "farm", "postgres", "minioadmin", "admin"})
"""Passwords that are no secret. Refused outside development."""


def _from_seconds(value: object) -> object:
    """Text that is a plain number counts seconds; the environment holds nothing but text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


Seconds = Annotated[timedelta, BeforeValidator(_from_seconds)]
"""Durations are written in seconds (`20`, `0.5`) or ISO 8601 (`PT20S`)."""

Positive = Annotated[int, Field(gt=0)]


class Settings(BaseSettings):
    """The settings of one process. Frozen; unset and default differ where it matters (`None` means unset)."""

    model_config = SettingsConfigDict(env_prefix="FARM_", frozen=True, extra="ignore")

    environment: Literal["production", "development"] = "production"
    """`development` accepts placeholder secrets; everything else refuses them."""

    database_url: SecretStr
    """Postgres >= 15, `postgresql://user:password@host:port/database`."""
    database_pool_size: Positive = 10
    """Connections one process keeps at most."""
    redis_url: SecretStr
    """Redis or Valkey, `redis://:password@host:port/0`."""
    redis_prefix: str = "farm:"
    """Prefix of every key in Redis, so that two farms may share a server."""

    s3_endpoint_url: str | None = None
    """S3 API; unset means AWS."""
    s3_public_endpoint_url: str | None = None
    """Endpoint that presigned URLs name, where clients reach S3 under another address than the farm does."""
    s3_region: str = "us-east-1"
    s3_bucket: str = "farm"
    s3_access_key_id: str | None = None
    """Unset means the usual AWS chain (environment, profile, instance role)."""
    s3_secret_access_key: SecretStr | None = None
    presign_expiry: Seconds = timedelta(hours=1)
    """How long a presigned URL stays valid."""

    api_host: str = "127.0.0.1"
    api_port: Annotated[int, Field(ge=0, le=65535)] = 8000
    api_threads: Positive = 16
    """Threads that serve blocking routes."""
    max_body_bytes: Positive = 32 * 1024 * 1024
    """Largest JSON body of a batch; every other body may have 1 MiB."""
    max_upload_bytes: Positive = 4 * 1024**3
    """Largest NDJSON body; it is spooled to disk, never held in memory."""
    max_image_bytes: Positive = 32 * 1024 * 1024
    """Largest picture that is taken as an upload."""
    max_image_pixels: Positive = 4096 * 4096
    """Most pixels of one; it is refused before it is decoded."""
    body_silence: Seconds = timedelta(seconds=60)
    """How long a request body may make us wait for its next bytes."""
    body_time: Seconds = timedelta(hours=1)
    """How long a request body may take in all."""
    max_batch_jobs: Positive = 1_000_000
    """Most jobs of one batch."""
    spool_dir: Path | None = None
    """Where NDJSON bodies are spooled; unset means the system's temporary folder."""
    idempotency_ttl: Seconds = timedelta(hours=24)
    """How long the answer to an Idempotency-Key is kept."""

    default_checkpoint: str = "crack-tiny"
    """The checkpoint of a job that names none."""
    pool: str = "default"
    """The pool this worker serves, or a doorbell rings in."""
    worker_name: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """What this worker is called, before and after a restart; unset means by its host and device. Set it where several
    workers share these."""
    device: str = "auto"
    """`auto` (first CUDA device, else CPU), `cpu`, `cuda:N` or `mps` (untested)."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """`auto` is float16 on CUDA and float32 on a CPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether UNet and VAE are compiled while they serve as they are; `auto` does so on CUDA devices."""
    micro_batch: Annotated[int, Field(ge=1, le=64)] | None = None
    """Most jobs denoised together; unset means 8 on a GPU and 16 on a CPU."""
    mix_adapters: bool = True
    """Whether one micro-batch may hold different style adapters; where that was measured to be slower, none does."""
    device_budget_bytes: Positive | None = None
    """Bytes of weights kept on the device; unset means 80 % of a GPU's memory, or 4 GiB on a CPU, at most half of the
    memory there is."""
    host_budget_bytes: Positive | None = None
    """Bytes of host memory for parsed adapters and cold checkpoints; unset means a quarter of the machine's memory, or
    of its container's."""
    threads: Annotated[int, Field(ge=0)] = 0
    """Threads torch uses on a CPU; 0 leaves torch's own choice."""
    max_model_bytes: Positive = 64 * 1024**3
    """Largest checkpoint or adapter that is registered."""
    cache_dir: Path = Path("~/.cache/lcm-farm")
    """Where a worker keeps verified copies of checkpoints and adapters."""
    cache_budget_bytes: Positive = 100 * 1024**3
    """Bytes kept there; least recently used goes first."""
    png_compress_level: Annotated[int, Field(ge=0, le=9)] = 1
    thumbnail_pixels: Annotated[int, Field(ge=16, le=1024)] = 256
    """Longer side of the WebP thumbnail. A picture that is no larger is its own."""

    heartbeat: Seconds = timedelta(seconds=5)
    """How often a worker renews its claims."""
    lease: Seconds = timedelta(seconds=20)
    """How long a claim lives without renewal."""
    poll: Seconds = timedelta(seconds=5)
    """How often an idle worker asks for work that no doorbell announced (jittered)."""
    rescue_every: Seconds = timedelta(seconds=5)
    """How often the sweeper takes back claims whose lease ran out."""
    sweep_every: Seconds = timedelta(seconds=1)
    """How often the sweeper's other duties run."""
    doorbell_expiry: Seconds = timedelta(seconds=60)
    """After this long an unheard doorbell is dropped."""
    affinity_bound: Seconds = timedelta(seconds=30)
    """A job that waited longer is served before warm work of the same priority, by one claim in eight."""
    max_failures: Positive = 3
    """Reported errors after which a job fails."""
    max_crashes: Positive = 3
    """Crashes while claimed alone after which a job is quarantined (failed with cause)."""
    suspect_wait: Seconds = timedelta(seconds=60)
    """How long a job that crashed a worker while claimed alone is left to other workers, where there are some, before
    that one may take it again."""
    rest_after: Positive = 3
    """Micro-batches of one checkpoint or lane that a worker fails in a row before it leaves that to other workers."""
    rest: Seconds = timedelta(seconds=30)
    """For how long it does so first, while there are others; doubles with each further failure, jittered."""
    rest_max: Seconds = timedelta(minutes=15)
    """Longest such rest."""
    retry_backoff: Seconds = timedelta(seconds=2)
    """First pause before a failed attempt is repeated; doubles each time, jittered."""
    retry_backoff_max: Seconds = timedelta(minutes=5)
    limit_load: Seconds = timedelta(minutes=15)
    """Phase limit: fetching and loading a checkpoint."""
    limit_step: Seconds = timedelta(minutes=2)
    """Phase limit: one denoising step, one merge, one decode."""
    limit_store: Seconds = timedelta(minutes=10)
    """Phase limit: encoding and uploading one micro-batch."""
    limit_idle: Seconds = timedelta(seconds=60)
    """A worker that takes nothing for so long while there is work for it ends itself."""
    grace: Seconds = timedelta(seconds=25)
    """What a worker may take to leave after SIGTERM."""
    max_worker_rss_bytes: Positive | None = None
    """A worker whose memory passes this ends between two micro-batches and is started anew."""
    keep_deleted: Seconds = timedelta(minutes=10)
    """How long the objects of deleted jobs and lost attempts stay in S3."""
    keep_uploads: Seconds = timedelta(days=7)
    """How long an upload that no job names stays, counted from when it was last sent or named."""

    webhook_networks: str | None = None
    """Networks that webhooks may lead to beside the public internet, over http too: `10.1.0.0/16,127.0.0.0/8`. Unset
    means none."""
    webhook_timeout: Seconds = timedelta(seconds=15)
    """How long one try to deliver a message may take in all."""
    webhook_keep: Seconds = timedelta(days=30)
    """How long messages to webhooks are kept for looking at."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["json", "console"] = "json"
    flower_user: str = "farm"
    flower_password: SecretStr | None = None
    """Password of Flower's page; `farm up` makes one."""

    @field_validator("webhook_networks")
    @classmethod
    def _networks(cls, value: str | None) -> str | None:
        networks_of(value)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.lease < 3 * self.heartbeat:
            raise ValueError(
                "FARM_LEASE must be at least three times FARM_HEARTBEAT, or one lost heartbeat ends a claim"
            )
        if (self.s3_access_key_id is None) != (self.s3_secret_access_key is None):
            raise ValueError("FARM_S3_ACCESS_KEY_ID and FARM_S3_SECRET_ACCESS_KEY are set together or not at all")
        if self.environment != "development":
            for name, value in self._secrets().items():
                if value is not None and value.lower() in PLACEHOLDERS:
                    raise ValueError(
                        f"{name} holds a placeholder, which is accepted with FARM_ENVIRONMENT=development only; "
                        "make a real one, for example with: openssl rand -hex 24"
                    )
        return self

    def _secrets(self) -> dict[str, str | None]:
        def opened(secret: SecretStr | None) -> str | None:
            return None if secret is None else secret.get_secret_value()

        return {
            "the password in FARM_DATABASE_URL": urlsplit(self.database_url.get_secret_value()).password,
            "the password in FARM_REDIS_URL": urlsplit(self.redis_url.get_secret_value()).password,
            "FARM_S3_SECRET_ACCESS_KEY": opened(self.s3_secret_access_key),
            "FARM_FLOWER_PASSWORD": opened(self.flower_password),
        }


@lru_cache(maxsize=1)
def settings() -> Settings:
    """The settings of this process, read once from the environment."""
    return Settings()
