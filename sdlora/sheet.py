"""Many pictures in one labelled grid. Pillow only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

__all__ = ["write_sheet"]

_FONT_SIZE, _HEAD, _MARGIN = 14, 28, 8
_MAX_LABEL = 220


def write_sheet(columns: Mapping[str, Sequence[Image.Image]], rows: Sequence[str], path: Path) -> None:
    """A grid with a heading a column and a label a row; every column holds one picture of one size for each row.

    Labels that are too long for their place end in three dots.
    """
    width, height = next(iter(columns.values()))[0].size
    font = ImageFont.load_default(_FONT_SIZE)
    label = min(_MAX_LABEL, max(int(font.getlength(text)) for text in rows) + 2 * _MARGIN)
    sheet = Image.new("RGB", (label + width * len(columns), _HEAD + height * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, (heading, pictures) in enumerate(columns.items()):
        left = label + column * width
        pen.text((left + width // 2, _HEAD // 2), _cut(heading, width, font), "black", font=font, anchor="mm")
        for row, picture in enumerate(pictures):
            sheet.paste(picture, (left, _HEAD + row * height))
    for row, text in enumerate(rows):
        place = (label - _MARGIN, _HEAD + row * height + height // 2)
        pen.text(place, _cut(text, label - 2 * _MARGIN, font), "black", font=font, anchor="rm")
    sheet.save(path)


def _cut(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."
