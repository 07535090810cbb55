"""Which pictures are taken: one whole still picture of a known format, and nothing else in the file."""

import io
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from PIL import Image

from farm import imagefile
from farm.errors import InvalidRequest, TooLarge

PIXELS = 1_000_000


def picture(width: int = 48, height: int = 32, mode: str = "RGB") -> Image.Image:
    source = np.random.default_rng(7).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(source).convert(mode)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(body, zlib.crc32(kind)))


def with_chunk(png: bytes, kind: bytes, body: bytes) -> bytes:
    """The PNG with one more chunk behind its header."""
    return png[:33] + chunk(kind, body) + png[33:]


def archive() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as made:
        made.writestr("run.sh", "echo")
    return out.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"])
def test_every_kind_of_png_is_taken(mode: str) -> None:
    image = picture(mode="L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    found = imagefile.check(saved(image, "PNG"), PIXELS)
    assert found == imagefile.Found("image/png", 48, 32)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 5, "subsampling": 2}])
def test_jpegs_are_taken(options: dict[str, Any]) -> None:
    assert imagefile.check(saved(picture(), "JPEG", **options), PIXELS) == imagefile.Found("image/jpeg", 48, 32)
    assert imagefile.check(saved(picture(mode="CMYK"), "JPEG"), PIXELS).media_type == "image/jpeg"


@pytest.mark.parametrize("options", [{"lossless": True}, {"quality": 50}, {"xmp": b"<x:xmpmeta/>"}])
def test_webps_are_taken(options: dict[str, Any]) -> None:
    for mode in ("RGB", "RGBA"):
        assert imagefile.check(saved(picture(mode=mode), "WEBP", **options), PIXELS).media_type == "image/webp"


def test_a_picture_taken_sideways_is_turned() -> None:
    exif = Image.Exif()
    exif[imagefile.ORIENTATION] = 6
    data = saved(picture(), "PNG", exif=exif)
    assert imagefile.check(data, PIXELS) == imagefile.Found("image/png", 32, 48)
    assert np.array_equal(np.asarray(imagefile.read(data, PIXELS)), np.rot90(np.asarray(picture()), -1))


def test_what_is_read_is_what_was_drawn() -> None:
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        assert np.array_equal(
            np.asarray(imagefile.read(saved(picture(), kind, **options), PIXELS)), np.asarray(picture())
        )


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_whatever_is_missing_is_noticed(kind: str) -> None:
    whole = saved(picture(), kind)
    for length in (0, 1, 4, 11, 20, len(whole) // 4, len(whole) // 2, len(whole) - 13, len(whole) - 1):
        with pytest.raises(InvalidRequest):
            imagefile.check(whole[:length], PIXELS)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_what_follows_a_picture_is_refused(kind: str) -> None:
    for more in (b"\0", archive(), saved(picture(), "JPEG"), b"%PDF-1.7"):
        with pytest.raises(InvalidRequest, match=f"{len(more)} bytes follow the end"):
            imagefile.check(saved(picture(), kind) + more, PIXELS)


FOREIGN: list[tuple[Callable[[], bytes], str]] = [
    (lambda: with_chunk(saved(picture(), "PNG"), b"zzZz", archive()), "a ZIP archive"),
    (lambda: with_chunk(saved(picture(), "PNG"), b"tEXt", b"Comment\0<script>alert(1)</script>"), "a page or program"),
    (lambda: saved(picture(), "JPEG", comment=b"<?php system($_GET[0]); ?>"), "a page or program"),
    (lambda: saved(picture(), "JPEG", comment=b"%PDF-1.4"), "a PDF document"),
    (lambda: saved(picture(), "WEBP", xmp=b"<svg onload=x>"), "a page or program"),
]


@pytest.mark.parametrize(("made", "what"), FOREIGN, ids=[what for _, what in FOREIGN])
def test_what_is_a_picture_and_something_else_is_refused(made: Callable[[], bytes], what: str) -> None:
    with pytest.raises(InvalidRequest, match=what):
        imagefile.check(made(), PIXELS)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF"])
def test_films_are_refused(kind: str) -> None:
    data = saved(picture(), kind, save_all=True, append_images=[picture(mode="L").convert("RGB")])
    with pytest.raises(InvalidRequest, match="no PNG, JPEG or WebP" if kind == "GIF" else "animations"):
        imagefile.check(data, PIXELS)


def flat(level: int) -> Image.Image:
    return Image.new("RGB", (48, 32), (level, level, level))


def long_apng(*, announced: bool) -> bytes:
    """A PNG with 10,000 frames more, said so at its beginning or not at all."""
    still = saved(flat(0), "PNG")
    control = struct.pack(">IIIIIHHBB", 0, 48, 32, 0, 0, 1, 100, 0, 0)
    frame = chunk(b"fcTL", control) + chunk(b"fdAT", bytes(4) + zlib.compress(bytes((48 * 3 + 1) * 32)))
    start = chunk(b"acTL", struct.pack(">II", 10_000, 0)) if announced else b""
    return still[:33] + start + still[33:-12] + frame * 10_000 + still[-12:]


def long_webp(*, announced: bool) -> bytes:
    two = saved(flat(0), "WEBP", save_all=True, append_images=[flat(255)], lossless=True)
    frames = two.index(b"ANMF")
    (length,) = struct.unpack_from("<I", two, frames + 4)
    head = bytearray(two[12:frames])
    head[8] = head[8] if announced else 0
    parts = b"WEBP" + bytes(head) + two[frames : frames + 8 + length + length % 2] * 10_000
    return b"RIFF" + struct.pack("<I", len(parts)) + parts


def long_gif() -> bytes:
    whole = saved(flat(0), "GIF")
    start = whole.index(b"\x2c\0\0\0\0")
    return whole[:start] + whole[start:-1] * 10_000 + b";"


LONG: dict[str, Callable[[], bytes]] = {
    "APNG": lambda: long_apng(announced=True),
    "APNG that does not say so": lambda: long_apng(announced=False),
    "WebP": lambda: long_webp(announced=True),
    "WebP that does not say so": lambda: long_webp(announced=False),
    "GIF": long_gif,
}


@pytest.mark.parametrize("name", LONG)
def test_ten_thousand_frames_are_refused_before_any_decoder_sees_one(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    data = LONG[name]()
    if "say" not in name:
        assert getattr(Image.open(io.BytesIO(data)), "n_frames", 0) >= 10_000, "readers that take films take this one"
    shown: list[object] = []
    monkeypatch.setattr("farm.imagefile.Image.open", lambda *_, **__: shown.append(1))
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequest, match="no PNG, JPEG or WebP" if name == "GIF" else "animations"):
            imagefile.check(data, PIXELS)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert shown == []
    assert peak < 1024 * 1024


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "GIF", "ICO", "PPM"])
def test_other_formats_are_refused(kind: str) -> None:
    with pytest.raises(InvalidRequest, match="no PNG, JPEG or WebP"):
        imagefile.check(saved(picture(), kind), PIXELS)


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred kilobytes that unpacks to gigabytes."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = zlib.compress(bytes(64 * 1024 * 1024), 9)
    return imagefile.PNG_SIGNATURE + header + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_bombs_of_every_format_are_refused_before_any_decoder_sees_them(monkeypatch: pytest.MonkeyPatch) -> None:
    jpeg, size = saved(picture(), "JPEG"), struct.pack(">HH", 32, 48)
    place = jpeg.index(b"\xff\xc0") + 5
    assert jpeg[place : place + 4] == size
    webp = b"WEBP" + struct.pack("<4sI", b"VP8X", 10) + bytes(4) + b"\xff" * 6
    bombs = (
        imagefile.PNG_SIGNATURE + chunk(b"IHDR", struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", b"x") + chunk(b"IEND", b""),
        jpeg[:place] + struct.pack(">HH", 65_535, 65_535) + jpeg[place + 4 :],
        b"RIFF" + struct.pack("<I", len(webp)) + webp,
    )  # fmt: skip
    shown: list[object] = []
    monkeypatch.setattr("farm.imagefile.Image.open", lambda *_, **__: shown.append(1))
    for data in bombs:
        with pytest.raises(TooLarge, match="pixels"):
            imagefile.check(data, PIXELS)
    assert shown == []


def test_bombs_are_refused_before_memory_grows() -> None:
    large = bomb(60_000, 60_000)
    packed_text = with_chunk(saved(picture(), "PNG"), b"zTXt", b"a\0\0" + zlib.compress(bytes(64 * 1024 * 1024), 9))
    tracemalloc.start()
    try:
        with pytest.raises(TooLarge, match="60000x60000"):
            imagefile.check(large, PIXELS)
        with pytest.raises(InvalidRequest, match="too large"):
            imagefile.check(packed_text, PIXELS)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 * 1024 * 1024


def test_one_pixel_too_many() -> None:
    data = saved(picture(40, 25), "PNG")
    assert imagefile.check(data, 1000).width == 40
    with pytest.raises(TooLarge, match="999 at most"):
        imagefile.check(data, 999)


def test_a_header_that_lies_is_refused() -> None:
    png = saved(picture(), "PNG")
    wide = chunk(b"IHDR", struct.pack(">IIBBBBB", 480, 32, 8, 2, 0, 0, 0))
    with pytest.raises(InvalidRequest, match=r"cannot be (read|decoded)"):
        imagefile.check(png[:8] + wide + png[33:], PIXELS)
    flipped = bytearray(png)
    flipped[60] ^= 1
    with pytest.raises(InvalidRequest, match="checksum"):
        imagefile.check(bytes(flipped), PIXELS)
    with pytest.raises(InvalidRequest, match="twice"):
        imagefile.check(png[:33] + png[8:], PIXELS)
    with pytest.raises(InvalidRequest, match="nobody knows"):
        imagefile.check(with_chunk(png, b"ZZZZ", b""), PIXELS)
    with pytest.raises(InvalidRequest, match="no size"):
        imagefile.check(png[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", 0, 32, 8, 2, 0, 0, 0)) + png[33:], PIXELS)


def test_no_bytes_make_anything_else_than_a_refusal() -> None:
    """Files with bytes changed, doubled or left out: taken, or refused with one of the two errors."""
    chance = np.random.default_rng(3)
    for kind in ("PNG", "JPEG", "WEBP"):
        whole = saved(picture(), kind)
        for _ in range(150):
            broken = bytearray(whole)
            for place in chance.integers(0, len(broken), 3):
                broken[place] = int(chance.integers(0, 256))
            if chance.random() < 0.3:
                start = int(chance.integers(0, len(broken)))
                del broken[start : start + int(chance.integers(1, 40))]
            with suppress(InvalidRequest, TooLarge):
                assert imagefile.check(bytes(broken), PIXELS).media_type == f"image/{kind.lower()}"
