"""Many pictures in one labelled grid: as a picture, or as a page for a browser. Pillow only."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

__all__ = ["write_page", "write_sheet"]

_FONT_SIZE, _HEAD, _MARGIN = 14, 28, 8
_MAX_LABEL = 220


_STYLE = """
body { font: 15px system-ui, sans-serif; margin: 1.5rem; color: #222; background: #fff; --size: 256px }
table { border-spacing: 4px }
th { background: #fff; padding: 4px 8px; font-weight: 600; max-width: var(--size) }
thead th { position: sticky; top: 0 }
tbody th { position: sticky; left: 0; text-align: right }
img { width: var(--size); display: block; image-rendering: auto }
"""


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


def write_page(columns: Mapping[str, Sequence[Image.Image]], rows: Sequence[str], path: Path, *, title: str) -> None:
    """The same grid as one HTML file that needs nothing else: headings stay in view, a slider sets the size."""
    head = "".join(f"<th>{escape(heading)}</th>" for heading in columns)
    body = "".join(
        f"<tr><th>{escape(text)}</th>"
        + "".join(f"<td>{_embedded(column[row], f'{text}, {heading}')}</td>" for heading, column in columns.items())
        + "</tr>\n"
        for row, text in enumerate(rows)
    )
    slider = (
        '<label>Size <input type="range" min="64" max="1024" value="256" '
        "oninput=\"document.body.style.setProperty('--size', this.value + 'px')\"></label>"
    )
    path.write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>{escape(title)}</h1>{slider}\n"
        f"<table><thead><tr><th></th>{head}</tr></thead>\n<tbody>{body}</tbody></table></body></html>\n",
        encoding="utf-8",
    )


def _embedded(picture: Image.Image, description: str) -> str:
    content = io.BytesIO()
    picture.save(content, format="PNG")
    data = base64.b64encode(content.getvalue()).decode()
    text = escape(description, quote=True)
    return f'<img src="data:image/png;base64,{data}" alt="{text}" title="{text}">'


def _cut(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."
