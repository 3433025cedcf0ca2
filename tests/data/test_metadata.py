"""metadata.jsonl and metadata.csv."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdlora.data.metadata import MetadataRow, read_metadata
from sdlora.errors import Problem


def read(tmp_path: Path, name: str, text: str) -> tuple[list[MetadataRow], list[Problem]]:
    (tmp_path / name).write_bytes(text.encode())
    return read_metadata(tmp_path / name, shown=name)


@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
def test_jsonl_rows_give_name_and_caption(column: str, tmp_path: Path) -> None:
    text = json.dumps({"file_name": "a.png", column: " a\nfox "}) + '\n\n{"file_name": "b.png", "other": 1}'
    rows, problems = read(tmp_path, "metadata.jsonl", text)
    assert rows == [MetadataRow("a.png", "a fox", 1), MetadataRow("b.png", None, 3)]
    assert problems == []


@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
def test_csv_rows_give_name_and_caption_with_commas_and_line_breaks(column: str, tmp_path: Path) -> None:
    text = f'\ufefffile_name, {column},seed\r\na.png,"a fox, red\r\nand ""ink""",1\r\nb.png,,2\r\n'
    rows, problems = read(tmp_path, "metadata.csv", text)
    assert rows == [MetadataRow("a.png", 'a fox, red and "ink"', 3), MetadataRow("b.png", "", 4)]
    assert problems == []


def test_a_json_string_may_hold_a_line_separator(tmp_path: Path) -> None:
    rows, problems = read(tmp_path, "metadata.jsonl", '{"file_name": "a.png", "text": "a\u2028fox"}')
    assert rows == [MetadataRow("a.png", "a fox", 1)]
    assert problems == []


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"file_name": "b.png", "text": "a', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('["b.png"]', "is not a JSON object"),
        ('{"text": "a fox"}', "has no `file_name`"),
        ('{"file_name": 3, "text": "a fox"}', "has no `file_name`"),
        ('{"file_name": "b.png", "text": 3}', "`text` is not text but int"),
        ('{"file_name": "b.png", "text": "x", "prompt": "y"}', "`text` and `prompt` differ"),
    ],
)
def test_a_bad_jsonl_line_is_named_and_the_others_are_read(line: str, what: str, tmp_path: Path) -> None:
    text = f'{{"file_name": "a.png", "text": "x"}}\n{line}\n{{"file_name": "c.png", "text": "z"}}'
    rows, (problem,) = read(tmp_path, "metadata.jsonl", text)
    assert [row.file_name for row in rows] == ["a.png", "c.png"]
    assert problem.where == "metadata.jsonl, line 2"
    assert what in problem.what
    assert problem.remedy


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("file,text\na.png,x", 1, "lacks `file_name` or a caption column"),
        ("file_name,label\na.png,x", 1, "lacks `file_name` or a caption column"),
        ("", 1, "lacks `file_name` or a caption column"),
        ("file_name,text\na.png,a fox, red", 2, "more columns than the header"),
        ('file_name,text\na.png,"a fox" red', 2, "is not CSV"),
        ('file_name,text\na.png,"a fox', 2, "is not CSV"),
        ("file_name,text\n,a fox", 2, "has no `file_name`"),
    ],
)
def test_a_bad_csv_is_named_by_line(text: str, line: int, what: str, tmp_path: Path) -> None:
    rows, (problem,) = read(tmp_path, "metadata.csv", text)
    assert rows == []
    assert problem.where == f"metadata.csv, line {line}"
    assert what in problem.what
    assert problem.remedy


def test_a_table_that_is_not_text_is_one_problem_with_the_byte_offset(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_bytes("file_name,text\na.png,é".encode("latin-1"))
    rows, (problem,) = read_metadata(tmp_path / "metadata.csv", shown="metadata.csv")
    assert rows == []
    assert problem.where == "metadata.csv"
    assert "at byte 21" in problem.what


@pytest.mark.parametrize("value", [2, 0.5, "2", "", None])
def test_a_row_may_say_how_much_its_picture_counts(value: object, tmp_path: Path) -> None:
    text = json.dumps({"file_name": "a.png", "text": "a fox", "weight": value})
    rows, problems = read(tmp_path, "metadata.jsonl", text)
    assert rows == [MetadataRow("a.png", "a fox", 1, float(value) if value else None)]
    assert problems == []


@pytest.mark.parametrize("value", [0, -1, "heavy", True, "nan", "inf", [2]])
def test_a_weight_is_a_number_above_0(value: object, tmp_path: Path) -> None:
    text = json.dumps({"file_name": "a.png", "text": "a fox", "weight": value})
    rows, (problem,) = read(tmp_path, "metadata.jsonl", text)
    assert rows == []
    assert "no number above 0" in problem.what
