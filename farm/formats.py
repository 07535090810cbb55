"""What a picture is stored as: PNG unless a job says otherwise, WebP or JPEG. Pure; whoever encodes is elsewhere."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import orjson

from farm.errors import Problem

Format = Literal["png", "webp", "jpeg"]

JPEG_QUALITY = 90
"""Of a JPEG whose job says none. It is written into the recipe, so that another default later changes no old one."""
EXIF_ROOM = 64_000
"""Bytes of metadata in a JPEG: a segment of it holds 65,533, some of which are tags and the version."""


class Kind(NamedTuple):
    """How a file of a format is called at its end, and its content type."""

    suffix: str
    media_type: str


KINDS: dict[Format, Kind] = {
    "png": Kind("png", "image/png"),
    "webp": Kind("webp", "image/webp"),
    "jpeg": Kind("jpg", "image/jpeg"),
}


class Asked(Protocol):
    """The part of a job that says what its picture is stored as."""

    @property
    def format(self) -> Format | None: ...
    @property
    def quality(self) -> int | None: ...
    @property
    def motion(self) -> str | None: ...


def format_of(body: Mapping[str, Any]) -> Format:
    """What the picture of a recipe's body is stored as: an animation is WebP, whatever else PNG unless it says so."""
    found: Format = body.get("format") or ("webp" if body.get("motion") else "png")
    return found


def problems_of(asked: Asked) -> Iterator[Problem]:
    """What does not go together."""
    if asked.motion is not None:
        if asked.format not in {None, "webp"}:
            yield {"field": "format", "problem": f"an animation is stored as lossless WebP, not as {asked.format}"}
        if asked.quality is not None:
            yield {"field": "quality", "problem": "does not go with motion: an animation keeps every pixel"}
    elif asked.quality is not None and asked.format not in {"webp", "jpeg"}:
        yield {"field": "quality", "problem": "goes with format webp or jpeg; a PNG keeps every pixel"}


def recipe_fields(asked: Asked) -> dict[str, Any]:
    """The recipe's fields. None for a PNG and for animations: their recipes are as they were before there was more."""
    if asked.motion is not None or asked.format in {None, "png"}:
        return {}
    fields: dict[str, Any] = {"format": asked.format}
    if asked.quality is not None or asked.format == "jpeg":
        fields["quality"] = asked.quality or JPEG_QUALITY
    return fields


def refuse_crowded(body: Mapping[str, Any], names: bytes, labels: bytes) -> Problem | None:
    """What is wrong with a JPEG that its metadata does not fit. `names` and `labels` are JSON, `body` a recipe's."""
    if format_of(body) != "jpeg":
        return None
    # Everything as JSON in ASCII; prompts (and models' names, of which the JSON has more) in UTF-16 besides.
    texts = len((body["prompt"] + body["negative_prompt"]).encode("utf-16-be"))
    room = _ascii_bytes(orjson.dumps(body)) + 2 * _ascii_bytes(names) + _ascii_bytes(labels) + texts
    if room <= EXIF_ROOM:
        return None
    problem = f"a JPEG holds {EXIF_ROOM} bytes of metadata, this job's may need {room}; shorten its texts or its "
    return {"field": "format", "problem": problem + "labels, take png or webp, or set metadata to false"}


def _ascii_bytes(text: bytes) -> int:
    """How long UTF-8 JSON is once all else than ASCII is escaped: six bytes for each unit of UTF-16."""
    return 3 * len(text.decode().encode("utf-16-be")) - 5 * sum(byte < 0x80 for byte in text)
