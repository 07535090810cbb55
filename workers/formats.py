"""Pictures as files of the format that their recipe names, and read again: PNG, WebP, JPEG; animations as WebP."""

import io
import json
from collections.abc import Mapping
from itertools import pairwise

import numpy as np

# Writes JPEG. Without it Pillow would import every format it knows at the first save.
import PIL.JpegImagePlugin  # noqa: F401
from PIL import Image, ImageSequence

from farm.recipe import Recipe
from workers.pictures import Pixels, encode_png

USER_COMMENT, DESCRIPTION, EXIF_IFD = 0x9286, 0x010E, 0x8769
"""EXIF tags. In WebP and JPEG files the web UIs read `parameters` from the first; the whole recipe stands in the
second."""
UNICODE = b"UNICODE\0"
"""How EXIF says that a comment is UTF-16."""
FULL_QUALITY = {"lossless": True, "quality": 0, "method": 0}
"""libwebp: every pixel kept, as PNG does, with the least effort."""
WEBP_EFFORT = 1
"""libwebp's method for a WebP that does not keep every pixel: less than half its default's time for the same bytes."""


def encode(pixels: Pixels, recipe: Recipe, *, texts: Mapping[str, str], png_level: int) -> bytes:
    """The picture of a recipe as the file it asks for, with `texts` (of `metadata`; may be empty) in it."""
    if recipe.fps:
        return encode_animation(pixels, fps=recipe.fps, texts=texts)
    if recipe.format == "webp":
        return encode_webp(pixels, quality=recipe.quality, texts=texts)
    if recipe.format == "jpeg" and recipe.quality is not None:
        return encode_jpeg(pixels, quality=recipe.quality, texts=texts)
    return encode_png(pixels, texts=texts, level=png_level)


def decode(file: bytes, recipe: Recipe) -> Pixels:
    """The pixels that a file of this recipe shows."""
    if recipe.fps and recipe.frames:
        return decode_animation(file, frames=recipe.frames, fps=recipe.fps)
    with Image.open(io.BytesIO(file)) as image:
        return np.asarray(image.convert("RGB"))


def encode_webp(pixels: Pixels, *, quality: int | None, texts: Mapping[str, str]) -> bytes:
    """A WebP with the texts as EXIF: every pixel kept, or of a quality (1..100)."""
    options = FULL_QUALITY if quality is None else {"quality": quality, "method": WEBP_EFFORT}
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "WEBP", exif=exif(texts), **options)
    return out.getvalue()


def encode_jpeg(pixels: Pixels, *, quality: int, texts: Mapping[str, str]) -> bytes:
    """A JPEG of a quality (1..100) with the texts as EXIF. Colour in full resolution: a crack is a pixel wide, and half
    of it would be gone. Raises ValueError for texts that have no room in a JPEG."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=quality, subsampling=0, exif=exif(texts))
    return out.getvalue()


def encode_animation(pixels: Pixels, *, fps: int, texts: Mapping[str, str]) -> bytes:
    """An animated WebP, lossless, shown for ever, with the texts as EXIF. `pixels`: frames x height x width x 3."""
    first, *rest = [Image.fromarray(frame) for frame in pixels]
    out = io.BytesIO()
    # The end of each frame is rounded, not its length: 60 a second stay 60 a second.
    ends = [round(1000 * number / fps) for number in range(len(pixels) + 1)]
    lengths = [end - start for start, end in pairwise(ends)]
    first.save(
        out, "WEBP", save_all=True, append_images=rest, duration=lengths, loop=0, exif=exif(texts), **FULL_QUALITY
    )
    return out.getvalue()


def decode_animation(webp: bytes, *, frames: int, fps: int) -> Pixels:
    """The frames that `encode_animation` wrote; equal ones in a row, which the format keeps as one, all of them."""
    found: list[Pixels] = []
    shown = 0
    with Image.open(io.BytesIO(webp)) as image:
        for frame in ImageSequence.Iterator(image):
            pixels = np.asarray(frame.convert("RGB"))
            shown += int(frame.info["duration"])
            found += [pixels] * (round(shown * fps / 1000) - len(found))
    # Frames that are all equal are kept as a picture that is shown for no time.
    return np.stack(found or [pixels] * frames)


def exif(texts: Mapping[str, str]) -> bytes:
    """The text chunks of a picture (`metadata`) as EXIF; nothing for none."""
    if not texts:
        return b""
    made = Image.Exif()
    # In ASCII: what else there is, the format has no agreed meaning for.
    made[DESCRIPTION] = json.dumps(json.loads(texts["farm"]))
    made.get_ifd(EXIF_IFD)[USER_COMMENT] = UNICODE + texts["parameters"].encode("utf-16-be")
    return made.tobytes()
