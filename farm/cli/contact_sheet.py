"""A contact sheet: pictures side by side, each with its prompt beneath."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

CELL = 384
"""Longer side of a picture on the sheet, pixels; smaller ones are enlarged to it."""
MARGIN = 24
TEXT = 20
"""Height of the letters, pixels."""
PAPER, INK = (250, 250, 248), (30, 30, 30)


def draw(pictures: Sequence[tuple[Image.Image, str]], columns: int = 2) -> Image.Image:
    """One RGB picture holding all of them, `columns` to a row."""
    font = ImageFont.load_default(TEXT)
    captions = [wrap(text, font, CELL) for _, text in pictures]
    line = TEXT * 13 // 10
    caption_height = line * max((len(lines) for lines in captions), default=0)
    width = MARGIN + columns * (CELL + MARGIN)
    height = MARGIN + -(-len(pictures) // columns) * (CELL + MARGIN // 2 + caption_height + MARGIN)
    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    for index, ((picture, _), lines) in enumerate(zip(pictures, captions, strict=True)):
        row, column = divmod(index, columns)
        left = MARGIN + column * (CELL + MARGIN)
        top = MARGIN + row * (CELL + MARGIN // 2 + caption_height + MARGIN)
        fitted = _fitted(picture)
        sheet.paste(fitted, (left + (CELL - fitted.width) // 2, top + (CELL - fitted.height) // 2))
        for number, text in enumerate(lines):
            pen.text((left, top + CELL + MARGIN // 2 + number * line), text, INK, font)
    return sheet


def _fitted(picture: Image.Image) -> Image.Image:
    scale = CELL / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """The text in lines no wider than `width` pixels, broken between words; a longer word has a line of its own."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
