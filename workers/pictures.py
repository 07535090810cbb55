"""Pictures as bytes: PNG with the recipe in it, WebP thumbnail; `workers.formats` has the others.

The PNG writer is our own, because encoding is what eats a GPU worker's CPU: one filter over the whole picture in numpy
and zlib take 40 ms at 1024x1024 where Pillow, which tries five filters a row, takes 76 at the same level, for files of
the same size (within 1 % on painted walls; `python -m benchmarks.encoders`), and leave other Python threads running
meanwhile.
"""

import io
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import orjson

# Writes WebP. Without it Pillow would import every format it knows, PDF too, at the first save: 0.12 s of a start.
import PIL.WebPImagePlugin  # noqa: F401
from numpy.typing import NDArray
from PIL import Image

from farm import __version__
from farm.jobs import Difference
from farm.recipe import Recipe

Pixels = NDArray[np.uint8]
"""A picture: uint8, height x width x 3, RGB; an animation has its frames in front."""

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
EIGHT_BIT_RGB = bytes([8, 2, 0, 0, 0])
"""Bit depth 8, colour type 2, and the only compression, filter and interlace methods that matter."""
FILTER_SUB = 1
"""Each byte is stored as its difference to the same channel of the pixel to its left."""
THUMBNAIL_QUALITY = 80
THUMBNAIL_EFFORT = 1
"""libwebp's method: 1 takes a third of the default's time for the same bytes at this size."""

SAMPLERS = {
    "lcm": "LCM", "ddim": "DDIM", "ddpm": "DDPM", "deis": "DEIS", "dpmpp-2m": "DPM++ 2M",
    "dpmpp-2m-karras": "DPM++ 2M Karras", "dpmpp-2m-sde": "DPM++ 2M SDE", "euler": "Euler", "euler-a": "Euler a",
    "heun": "Heun", "pndm": "PLMS", "unipc": "UniPC",
}  # fmt: skip
"""Scheduler names as A1111 writes them; others are written as they are."""


def encode_png(pixels: Pixels, *, texts: Mapping[str, str], level: int) -> bytes:
    """A PNG with text chunks. `level` is zlib's: 0 stores, 1 is fast, 9 is slow and hardly smaller on texture."""
    height, width, channels = pixels.shape
    if channels != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"a picture is uint8, height x width x 3, not {pixels.dtype} {pixels.shape}")
    rows = np.empty((height, 1 + width * 3), np.uint8)
    rows[:, 0] = FILTER_SUB
    flat = pixels.reshape(height, -1)
    rows[:, 1:4] = flat[:, :3]
    np.subtract(flat[:, 3:], flat[:, :-3], out=rows[:, 4:])
    packed = zlib.compress(rows.data, level)
    parts = [PNG_SIGNATURE, _chunk(b"IHDR", struct.pack(">II", width, height) + EIGHT_BIT_RGB)]
    parts += [_text_chunk(key, text) for key, text in texts.items()]
    parts += [_chunk(b"IDAT", packed), _chunk(b"IEND", b"")]
    return b"".join(parts)


def difference(one: Pixels, other: Pixels) -> Difference:
    """How far two pictures of one size are apart. Raises ValueError for two sizes."""
    if one.shape != other.shape:
        raise ValueError(f"pictures of two sizes: {one.shape} and {other.shape}")
    apart = np.abs(one.astype(np.int16) - other)
    return Difference(int(apart.max()), round(float(apart.mean()), 6), round(float(apart.any(axis=-1).mean()), 6))


def encode_thumbnail(pixels: Pixels, *, longer_side: int) -> bytes:
    """A WebP picture of at most `longer_side` pixels a side, never larger than the original; no metadata."""
    image = Image.fromarray(pixels)
    # Two steps of whole-pixel averaging first: a quarter of the time, no visible difference.
    image.thumbnail((longer_side, longer_side), Image.Resampling.LANCZOS, reducing_gap=2.0)
    out = io.BytesIO()
    image.save(out, "WEBP", quality=THUMBNAIL_QUALITY, method=THUMBNAIL_EFFORT)
    return out.getvalue()


def metadata(recipe: Recipe, *, names: Mapping[str, Any], labels: Mapping[str, str]) -> dict[str, str]:
    """The text chunks of a picture: `parameters` as A1111 and its readers know it, `farm` with the whole recipe.

    Never a key, a host or a path: everything in here was in the job.
    """
    full = {
        "farm": __version__,
        "recipe": recipe.model_dump(mode="json", exclude_none=True),
        "recipe_hash": recipe.hash,
        "names": {key: value for key, value in names.items() if key != "models"},
        "models": names.get("models", []),
        "labels": dict(labels),
    }
    return {"parameters": a1111(recipe, names), "farm": orjson.dumps(full, option=orjson.OPT_SORT_KEYS).decode()}


def a1111(recipe: Recipe, names: Mapping[str, Any]) -> str:
    """The recipe as the web UIs write and read it: prompt, negative prompt, then one line of `Key: value` pairs."""
    adapters = names.get("adapters", [])
    prompt = recipe.prompt + "".join(f" <lora:{use['name']}:{use['weight']:g}>" for use in adapters)
    pairs = {
        "Steps": recipe.steps,
        "Sampler": SAMPLERS.get(recipe.scheduler, recipe.scheduler),
        "CFG scale": f"{recipe.guidance_scale:g}",
        "Seed": recipe.seed,
        "Size": f"{recipe.width}x{recipe.height}",
        "Model hash": recipe.checkpoint[:10],
        "Model": names.get("checkpoint", ""),
        "Denoising strength": "" if recipe.strength is None else f"{recipe.strength:g}",
        "Motion": names.get("motion", ""),
        "Frames": recipe.frames or "",
        "VAE": names.get("vae", ""),
        "Acceleration": names.get("acceleration", ""),
        "Version": f"lcm-farm {__version__}",
    }
    lines = [prompt]
    if recipe.negative_prompt:
        lines.append(f"Negative prompt: {recipe.negative_prompt}")
    lines.append(", ".join(f"{key}: {value}" for key, value in pairs.items() if value != ""))
    return "\n".join(lines)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return b"".join(
        (struct.pack(">I", len(body)), kind, body, struct.pack(">I", zlib.crc32(body, zlib.crc32(kind)) & 0xFFFFFFFF))
    )


def _text_chunk(key: str, text: str) -> bytes:
    """Plain Latin-1 where the text is that, because every reader knows it; UTF-8 (iTXt) otherwise."""
    try:
        return _chunk(b"tEXt", key.encode("latin-1") + b"\0" + text.encode("latin-1"))
    except UnicodeEncodeError:
        return _chunk(b"iTXt", key.encode("latin-1") + b"\0\0\0\0\0" + text.encode())
