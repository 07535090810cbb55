"""What a picture costs as a file: the farm's encoders beside Pillow's, on one set of painted walls.

    python -m benchmarks.encoders [--count 4] [--side 1024] [--rounds 5] [--out FILE]

Every encoder takes the same pictures, in turns; of its rounds the fastest counts. Processor time of one core a picture,
bytes a picture, both also as a multiple of the PNG that workers write, and whether every pixel comes back.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from farm.painter import paint, sample_scene
from workers.formats import encode_jpeg, encode_webp
from workers.pictures import Pixels, encode_png

Encoder = Callable[[Pixels], bytes]
OURS = "png, the farm's, level 1"


def pillow(level: int) -> Encoder:
    """Pillow's own PNG at a level of zlib's."""

    def encode(pixels: Pixels) -> bytes:
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "PNG", compress_level=level)
        return out.getvalue()

    return encode


ENCODERS: dict[str, Encoder] = {
    OURS: lambda pixels: encode_png(pixels, texts={}, level=1),
    "png, the farm's, level 6": lambda pixels: encode_png(pixels, texts={}, level=6),
    "png, Pillow, level 1": pillow(1),
    "png, Pillow, level 6": pillow(6),
    "webp, every pixel": lambda pixels: encode_webp(pixels, quality=None, texts={}),
    "webp, quality 90": lambda pixels: encode_webp(pixels, quality=90, texts={}),
    "jpeg, quality 90": lambda pixels: encode_jpeg(pixels, quality=90, texts={}),
}


def walls(count: int, side: int) -> list[Pixels]:
    """Painted pictures, side x side; the same ones every time."""
    rng = np.random.default_rng(1)
    return [paint(sample_scene(rng), side, side, seed).picture for seed in range(count)]


def measure(pictures: Sequence[Pixels], rounds: int) -> list[dict[str, Any]]:
    """For each encoder its `ms` and `bytes` a picture, `times` and `size` (multiples of the farm's PNG), `lossless`."""
    files = {name: [encode(picture) for picture in pictures] for name, encode in ENCODERS.items()}
    seconds = dict.fromkeys(ENCODERS, float("inf"))
    for _ in range(rounds):
        for name, encode in ENCODERS.items():
            start = time.process_time()
            for picture in pictures:
                encode(picture)
            seconds[name] = min(seconds[name], time.process_time() - start)
    sizes = {name: sum(map(len, made)) / len(made) for name, made in files.items()}
    return [
        {
            "encoder": name,
            "ms": 1000 * seconds[name] / len(pictures),
            "bytes": round(sizes[name]),
            "times": seconds[name] / seconds[OURS],
            "size": sizes[name] / sizes[OURS],
            "lossless": all(same(file, one) for file, one in zip(files[name], pictures, strict=True)),
        }
        for name in ENCODERS
    ]


def same(file: bytes, pixels: Pixels) -> bool:
    """Whether the file shows these very pixels."""
    with Image.open(io.BytesIO(file)) as image:
        return bool(np.array_equal(np.asarray(image.convert("RGB")), pixels))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print and keep the table; 1 when a PNG does not give its pixels back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=4, help="pictures")
    parser.add_argument("--side", type=int, default=1024, help="pixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the table as JSON")
    options = parser.parse_args(arguments)
    rows = measure(walls(options.count, options.side), options.rounds)
    print(
        f"{options.count} painted walls of {options.side}x{options.side}, one core, fastest of {options.rounds} rounds"
    )
    print(f"{'':26}{'ms':>8}{'KiB':>8}{'times':>8}{'size':>8}  keeps")
    for row in rows:
        keeps = "every pixel" if row["lossless"] else "most of it"
        figures = f"{row['ms']:8.1f}{row['bytes'] / 1024:8.0f}{row['times']:8.2f}{row['size']:8.2f}"
        print(f"{row['encoder']:26}{figures}  {keeps}")
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1))
    return int(not all(row["lossless"] for row in rows if row["encoder"].startswith("png")))


if __name__ == "__main__":
    sys.exit(main())
