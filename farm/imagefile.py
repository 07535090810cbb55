"""Pictures that people send: which are taken, and how they are read. No torch.

A file is walked by its own format's rules before any decoder sees it: every byte must belong to one picture, which is
no larger than allowed. So a bomb, a film, a second file behind the first or a torn download is refused before memory
grows.
"""

import io
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageOps

from farm.errors import InvalidRequest, TooLarge

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
MOST_PIECES = 50_000
"""PNG chunks or JPEG segments of one file; a picture of many megabytes has a few thousand."""
MOST_SCANS = 200
"""Scans of one progressive JPEG, each of which costs a pass over the whole picture."""
ORIENTATION = 0x0112
"""EXIF: how a camera was held. 5 to 8 are pictures that lie on their side."""
ANIMATED_PNG = frozenset({b"acTL", b"fcTL", b"fdAT"})
CRITICAL_PNG = frozenset({b"IHDR", b"PLTE", b"IDAT", b"IEND"})
STILL_WEBP = frozenset({b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ICCP", b"EXIF", b"XMP "})
JPEG_SIZES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Segments that hold a JPEG's size: start of frame, whatever the coding."""
JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]", re.DOTALL)
"""The next segment after coded pixels, in which FF is followed by 00 or a restart."""
MARKUP = re.compile(rb"<\?php|<script|<html|<!doctype|<svg", re.IGNORECASE)
PDF = (b"%PDF-", 1024)
"""How a PDF begins, and within how many bytes readers look for that."""


@dataclass(frozen=True, slots=True)
class Found:
    """A picture that was looked at. Sizes in pixels, as it is seen: turned the way its EXIF says."""

    media_type: str
    width: int
    height: int


def check(data: bytes, most_pixels: int) -> Found:
    """Look at a file and decode it once. Raises InvalidRequest for what is no whole, still PNG, JPEG or WebP, and
    TooLarge for one of more than `most_pixels`, before a pixel of it is decoded."""
    image, found = _opened(data, most_pixels)
    with image:
        _load(image)
    return found


def read(data: bytes, most_pixels: int) -> Image.Image:
    """The picture in a file, decoded, the right way up. Raises as `check` does."""
    image, _ = _opened(data, most_pixels)
    with image:
        _load(image)
        return ImageOps.exif_transpose(image)


def _opened(data: bytes, most_pixels: int) -> tuple[Image.Image, Found]:
    name, (width, height, rest) = _walked(data)
    if width < 1 or height < 1:
        raise InvalidRequest(f"the {name} picture has no size: {width}x{height}")
    if width * height > most_pixels:
        raise TooLarge(
            f"the picture has {width}x{height} = {width * height} pixels, {most_pixels} at most are taken; make it "
            "smaller",
            limit=most_pixels,
        )
    _refuse_others(data, rest)
    try:
        image = Image.open(io.BytesIO(data), formats=[name.upper()])
        if getattr(image, "n_frames", 1) != 1:
            raise InvalidRequest("animations are not taken; send one still picture")
        if image.size != (width, height):
            raise InvalidRequest(
                f"the {name} file says two sizes: {width}x{height} and {image.size[0]}x{image.size[1]}"
            )
        turned = image.getexif().get(ORIENTATION, 1) in range(5, 9)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InvalidRequest(f"the {name} file cannot be read: {error}") from error
    size = (height, width) if turned else (width, height)
    return image, Found(f"image/{name.lower()}", *size)


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except (OSError, SyntaxError, ValueError, zlib.error, Image.DecompressionBombError) as error:
        raise InvalidRequest(f"the picture cannot be decoded, part of it is missing or wrong: {error}") from error


Walked = tuple[int, int, bytes]
"""Width and height as the file's header has them, and every byte that is no coded pixel."""


def _walked(data: bytes) -> tuple[str, Walked]:
    walk: dict[str, tuple[bytes, Callable[[bytes], Walked]]] = {
        "PNG": (PNG_SIGNATURE, _png), "JPEG": (b"\xff\xd8\xff", _jpeg), "WebP": (b"RIFF", _webp),
    }  # fmt: skip
    for name, (start, walking) in walk.items():
        if data.startswith(start) and (name != "WebP" or data[8:12] == b"WEBP"):
            try:
                return name, walking(data)
            except (IndexError, struct.error) as error:
                raise InvalidRequest(f"the {name} file is cut off") from error
    raise InvalidRequest("this is no PNG, JPEG or WebP picture")


def _png(data: bytes) -> Walked:
    place, rest, size = len(PNG_SIGNATURE), bytearray(), (0, 0)
    for number in range(MOST_PIECES):
        length, kind = struct.unpack_from(">I4s", data, place)
        body = data[place + 8 : place + 8 + length]
        (crc,) = struct.unpack_from(">I", data, place + 8 + length)
        if zlib.crc32(body, zlib.crc32(kind)) != crc:
            raise InvalidRequest(f"the PNG file is damaged: the checksum of its part {kind!r} is wrong")
        if (number == 0) != (kind == b"IHDR"):
            raise InvalidRequest("the PNG file has no header, or has it twice")
        if kind in ANIMATED_PNG:
            raise InvalidRequest("animations are not taken; send one still picture")
        if kind not in CRITICAL_PNG and kind[:1].isupper():
            raise InvalidRequest(f"the PNG file has a part {kind!r}, which nobody knows")
        if kind == b"IHDR":
            size = struct.unpack_from(">II", body)
        elif kind != b"IDAT":
            rest += body
        place += 12 + length
        if kind == b"IEND":
            _refuse_more(len(data) - place)
            return *size, bytes(rest)
    raise InvalidRequest(f"the PNG file has more than {MOST_PIECES} parts")


def _jpeg(data: bytes) -> Walked:
    place, rest, size, scans = 2, bytearray(), (0, 0), 0
    for _ in range(MOST_PIECES):
        if data[place] != 0xFF:
            raise InvalidRequest(f"the JPEG file is damaged at byte {place}")
        marker = data[place + 1]
        if marker == 0xFF:
            place += 1
            continue
        if marker == 0xD9:
            _refuse_more(len(data) - place - 2)
            return *size, bytes(rest)
        (length,) = struct.unpack_from(">H", data, place + 2)
        body = data[place + 4 : place + 2 + length]
        if len(body) != length - 2:
            raise InvalidRequest("the JPEG file is cut off")
        if marker in JPEG_SIZES:
            height, width = struct.unpack_from(">HH", body, 1)
            if size != (0, 0):
                raise InvalidRequest("the JPEG file holds more than one picture")
            size = (width, height)
        else:
            rest += body
        place += 2 + length
        if marker == 0xDA:
            scans += 1
            if scans > MOST_SCANS:
                raise InvalidRequest(f"the JPEG file has more than {MOST_SCANS} scans")
            found = JPEG_MARKER.search(data, place)
            if found is None:
                raise InvalidRequest("the JPEG file is cut off")
            place = found.start()
    raise InvalidRequest(f"the JPEG file has more than {MOST_PIECES} parts")


def _webp(data: bytes) -> Walked:
    (length,) = struct.unpack_from("<I", data, 4)
    if length + 8 > len(data):
        raise InvalidRequest("the WebP file is cut off")
    _refuse_more(len(data) - length - 8)
    place, rest, size = 12, bytearray(), (0, 0)
    while place < len(data):
        kind, length = struct.unpack_from("<4sI", data, place)
        body = data[place + 8 : place + 8 + length]
        if len(body) != length:
            raise InvalidRequest("the WebP file is cut off")
        if kind in {b"ANIM", b"ANMF"} or (kind == b"VP8X" and body[0] & 2):
            raise InvalidRequest("animations are not taken; send one still picture")
        if kind not in STILL_WEBP:
            raise InvalidRequest(f"the WebP file has a part {kind!r}, which a still picture has not")
        if size == (0, 0):
            size = _webp_size(kind, body)
        if kind in {b"ICCP", b"EXIF", b"XMP "}:
            rest += body
        place += 8 + length + length % 2
    if place != len(data):
        raise InvalidRequest("the WebP file is cut off")
    return *size, bytes(rest)


def _webp_size(kind: bytes, body: bytes) -> tuple[int, int]:
    """Width and height from a WebP file's first part (RFC 9649)."""
    if kind == b"VP8X":
        return int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
    if kind == b"VP8L":
        (packed,) = struct.unpack_from("<I", body, 1)
        return (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", body, 6)
        return width & 0x3FFF, height & 0x3FFF
    raise InvalidRequest(f"the WebP file begins with a part {kind!r}")


def _refuse_more(extra: int) -> None:
    if extra:
        raise InvalidRequest(
            f"{extra} bytes follow the end of the picture: a second picture of a camera, or another file; save it anew "
            "as one plain picture"
        )


def _refuse_others(data: bytes, rest: bytes) -> None:
    """What is a picture and something else as well."""
    other = None
    if MARKUP.search(rest):
        other = "a page or program"
    elif PDF[0] in data[: PDF[1]]:
        other = "a PDF document"
    elif _is_archive(data):
        other = "a ZIP archive"
    if other:
        raise InvalidRequest(f"this picture is {other} as well; save it anew as a plain picture")


def _is_archive(data: bytes) -> bool:
    # The mark of an archive's end turns up in coded pixels by chance; a whole directory of files does not.
    file = io.BytesIO(data)
    if not zipfile.is_zipfile(file):
        return False
    try:
        with zipfile.ZipFile(file) as archive:
            return bool(archive.namelist())
    except (zipfile.BadZipFile, ValueError, OSError, struct.error, RuntimeError):
        # RuntimeError: it asks for what this reader does not know.
        return False
