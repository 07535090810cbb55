"""Contact sheets: many pictures in one, in rows that may carry a label."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

LABEL = 150
"""Pixels for the text before a row."""


def grid(pictures: NDArray[np.uint8], path: Path, columns: int = 8) -> None:
    """Pictures (n, h, w, 3) in rows of `columns`."""
    rows = [(pictures[at : at + columns], "") for at in range(0, len(pictures), columns)]
    labelled(rows, path)


def labelled(rows: Sequence[tuple[NDArray[np.uint8], str]], path: Path) -> None:
    """One row of pictures after another, each behind its label."""
    height, width = rows[0][0].shape[1:3]
    left = LABEL if any(label for _, label in rows) else 0
    across = left + width * max(len(pictures) for pictures, _ in rows)
    sheet = Image.new("RGB", (across, height * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (pictures, label) in enumerate(rows):
        draw.multiline_text((6, number * height + 6), label.replace(", ", "\n"), "black")
        for column, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture), (left + column * width, number * height))
    sheet.save(path)
