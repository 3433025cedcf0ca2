"""Captions in one table: `metadata.jsonl` or `metadata.csv`, a row for each picture.

A row has `file_name` (relative to the table) and the caption as `text`, `caption` or `prompt`, and may have a `weight`
that says how much the picture counts; other columns are left alone, as the imagefolder convention of Hugging Face has
them.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from sdlora.data.captions import one_line, read_text
from sdlora.data.names import shown_name
from sdlora.errors import DatasetError, Problem

__all__ = ["CAPTION_COLUMNS", "METADATA_NAMES", "MetadataRow", "read_metadata"]

METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
CAPTION_COLUMNS = ("text", "caption", "prompt")

_MAX_BYTES = 64 * 1024 * 1024
_COLUMNS_TEXT = "`text`, `caption` or `prompt`"


@dataclass(frozen=True)
class MetadataRow:
    """One row: the picture's name as written, its caption (None: the row has none), the line it is on, and how much the
    picture counts (None: the row does not say)."""

    file_name: str
    caption: str | None
    line: int
    weight: float | None = None


class _RowError(Exception):
    def __init__(self, what: str, remedy: str):
        self.what, self.remedy = what, remedy


_Record = tuple[int, dict[str, object]]


def read_metadata(path: Path, *, shown: str) -> tuple[list[MetadataRow], list[Problem]]:
    """All sound rows of the table at `path`, and a problem for each of the others; `shown` is its name for people."""
    try:
        text = read_text(path, max_bytes=_MAX_BYTES)
    except DatasetError as error:
        return [], [replace(problem, where=shown) for problem in error.problems]
    records = _jsonl_records if path.suffix.lower() == ".jsonl" else _csv_records
    problems: list[Problem] = []

    def complain(line: int, error: _RowError) -> None:
        problems.append(Problem(f"{shown}, line {line}", error.what, error.remedy))

    rows = []
    for line, record in records(text, complain):
        try:
            rows.append(_row(line, record))
        except _RowError as error:
            complain(line, error)
    return rows, problems


def _jsonl_records(text: str, complain: Callable[[int, _RowError], None]) -> Iterator[_Record]:
    # Not splitlines(): JSON strings may hold U+2028 and its like unescaped.
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            record = json.loads(content)
        except (ValueError, RecursionError) as error:
            complain(line, _RowError(f"is not JSON: {error}.", "Write one JSON object on each line."))
            continue
        if isinstance(record, dict):
            yield line, record
        else:
            complain(line, _RowError("is not a JSON object.", 'Write {"file_name": "a.png", "text": "a fox"}.'))


def _csv_records(text: str, complain: Callable[[int, _RowError], None]) -> Iterator[_Record]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = [name.strip() for name in reader.fieldnames or ()]
        reader.fieldnames = columns
        if "file_name" not in columns or not set(CAPTION_COLUMNS) & set(columns):
            what = f"the header is {','.join(columns)!r}; it lacks `file_name` or a caption column."
            complain(1, _RowError(what, f"Begin with file_name,text (the caption may be {_COLUMNS_TEXT})."))
            return
        for record in reader:
            if None in record:
                what = "has more columns than the header."
                complain(reader.line_num, _RowError(what, 'Put captions with commas in double quotes: "a fox, red".'))
            else:
                yield reader.line_num, {str(key): value for key, value in record.items()}
    except csv.Error as error:
        complain(
            reader.reader.line_num, _RowError(f"is not CSV: {error}.", "Double quotes come in pairs; repair the line.")
        )


def _row(line: int, record: dict[str, object]) -> MetadataRow:
    file_name = record.get("file_name")
    if not isinstance(file_name, str) or not file_name.strip():
        raise _RowError("has no `file_name`.", "Name the picture, relative to this file.")
    texts = {}
    for column in CAPTION_COLUMNS:
        value = record.get(column)
        if value is not None and not isinstance(value, str):
            raise _RowError(f"`{column}` is not text but {type(value).__name__}.", "Put the caption in quotes.")
        if value is not None:
            texts[column] = one_line(value)
    if len(set(texts.values())) > 1:
        raise _RowError(f"{' and '.join(f'`{c}`' for c in texts)} differ.", "Keep one of them.")
    return MetadataRow(file_name.strip(), next(iter(texts.values()), None), line, _weight(record.get("weight")))


def _weight(value: object) -> float | None:
    if value is None or value == "":
        return None
    try:
        weight = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        what = f"`weight` is {shown_name(str(value))!r}, which is no number above 0."
        raise _RowError(what, "1 counts as usual, 2 twice as much; leave it out where nothing is meant.")
    return weight
