"""Bodies as people would send them, for the OpenAPI document; a test sends every one."""

from typing import Any

PROMPTS = (
    "A single split crack on a concrete wall",
    "Sunlight shining on an outdoor concrete wall with split cracks",
    "Vertically split cracks on an old yellow painted concrete wall",
    "Water draining down next to a cracked concrete wall",
)

JOB: dict[str, Any] = {"prompt": PROMPTS[0]}

FULL_JOB: dict[str, Any] = {
    "prompt": PROMPTS[1],
    "negative_prompt": "windows",
    "checkpoint": "crack-tiny",
    "adapters": [],
    "acceleration": "lcm-lora",
    "width": 128,
    "height": 128,
    "steps": 4,
    "guidance_scale": 1.0,
    "scheduler": "lcm",
    "seed": 20250101,
    "priority": 0,
    "labels": {"site": "bridge-7"},
    "run_at": "2025-01-01T08:00:00Z",
    "metadata": True,
}

JOBS_WITH_COUNT: dict[str, Any] = {"prompt": PROMPTS[2], "seed": 7, "count": 4}

BATCH: dict[str, Any] = {
    "name": "walls",
    "defaults": {"steps": 4, "labels": {"site": "bridge-7"}},
    "jobs": [{"prompt": PROMPTS[3]}, {"prompt": PROMPTS[0], "seed": 7}],
}

NDJSON = '{"prompt": "A single split crack on a concrete wall"}\n{"prompt": "A brick wall", "steps": 8}\n'

COMMIT = "0123456789abcdef0123456789abcdef01234567"

CHECKPOINT: dict[str, Any] = {
    "name": "sdxl",
    "source": f"hf:stabilityai/stable-diffusion-xl-base-1.0@{COMMIT}",
    "variant": "fp16",
    "profile": {"vae": "sdxl-vae-fp16-fix"},
}
VAE: dict[str, Any] = {"name": "sdxl-vae-fp16-fix", "source": f"hf:madebyollin/sdxl-vae-fp16-fix@{COMMIT}"}
CONTROLNET: dict[str, Any] = {"name": "edges", "source": f"hf:lllyasviel/control_v11p_sd15_canny@{COMMIT}"}
MOTION: dict[str, Any] = {
    "name": "animatelcm", "source": f"hf:wangfuyun/AnimateLCM@{COMMIT}",
    "profile": {"acceleration": "animatelcm-lora"},
}  # fmt: skip
ACCELERATION: dict[str, Any] = {"name": "lcm-lora-sdxl", "source": f"hf:latent-consistency/lcm-lora-sdxl@{COMMIT}"}
STYLE: dict[str, Any] = {"name": "rust", "source": "s3://loras/rust.safetensors", "family": "sdxl"}

LIMITS: dict[str, Any] = {"queued_jobs": 100_000, "requests_per_second": 50, "running_jobs": None}

WEBHOOK: dict[str, Any] = {"url": "https://example.com/farm", "events": ["batch.finished"]}

KEY: dict[str, Any] = {"name": "importer", "project": "default", "scopes": ["jobs:read", "jobs:write"]}
