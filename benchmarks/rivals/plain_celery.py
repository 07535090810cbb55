"""The Celery task that people write for this today: a warm pipeline, one picture a task, Pillow, boto3, a Redis broker.

`benchmarks/rendering.py` starts the worker (`celery --app rivals.plain_celery worker`) with the variables below, and
uses `render` to submit. Two threads of one process share the weights; each has a scheduler of its own, because
schedulers keep state.
"""

import io
import os
import threading
from typing import Any

import boto3
from celery import Celery

app = Celery("plain", broker=os.environ["PLAIN_REDIS_URL"], backend=os.environ["PLAIN_REDIS_URL"])
app.conf.update(worker_hijack_root_logger=False, broker_connection_retry_on_startup=True)

_mine = threading.local()
_once = threading.Lock()
_loaded: list[Any] = []


def _pipeline() -> Any:
    """This thread's pipeline; the first call in a process loads the weights."""
    if hasattr(_mine, "pipe"):
        return _mine.pipe
    # Importing diffusers in two threads at once fails now and then, so that is done in turns too.
    with _once:
        import torch
        from diffusers import LCMScheduler, StableDiffusionPipeline

        if not _loaded:
            folder = os.environ["PLAIN_MODEL"]
            pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, torch_dtype=torch.float32)
            pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
            pipe.load_lora_weights(folder, weight_name="lcm-lora.safetensors")
            pipe.fuse_lora()
            pipe.unload_lora_weights()
            _loaded.append(pipe)
        parts = {**_loaded[0].components, "scheduler": LCMScheduler.from_config(_loaded[0].scheduler.config)}
        _mine.pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
        _mine.pipe.set_progress_bar_config(disable=True)
        # torch keeps this number for each thread that starts work.
        torch.set_num_threads(int(os.environ["PLAIN_TORCH_THREADS"]))
    return _mine.pipe


def _s3() -> Any:
    if not hasattr(_mine, "s3"):
        _mine.s3 = boto3.session.Session().client("s3", endpoint_url=os.environ["PLAIN_S3_URL"])
    return _mine.s3


@app.task(name="plain.render")  # type: ignore[untyped-decorator]
def render(prompt: str, seed: int, steps: int, side: int, key: str) -> str:
    """Render, encode, upload; answers the key."""
    pipe = _pipeline()
    import torch

    with torch.inference_mode():
        picture = pipe(
            prompt,
            num_inference_steps=steps,
            guidance_scale=1.0,
            width=side,
            height=side,
            generator=torch.Generator("cpu").manual_seed(seed),
        ).images[0]
    data = io.BytesIO()
    picture.save(data, "PNG")
    _s3().put_object(Bucket=os.environ["PLAIN_BUCKET"], Key=key, Body=data.getvalue(), ContentType="image/png")
    return key
