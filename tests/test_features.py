"""docs/FEATURES.md names settings and commands that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sdlora import cli
from sdlora.config import TrainConfig, setting_names

TEXT = (Path(__file__).parents[1] / "docs" / "FEATURES.md").read_text(encoding="utf-8")


def test_every_setting_exists() -> None:
    sections = "|".join(TrainConfig.model_fields)
    named = set(re.findall(rf"`((?:{sections})\.[a-z_]+)`", TEXT))
    assert len(named) > 30
    assert named <= set(setting_names())


def test_every_row_has_an_answer() -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith("| ") and not line.startswith("| feature")]
    assert len(rows) > 60
    assert all(len(row.strip("| ").split(" | ")) == 2 for row in rows)


@pytest.mark.parametrize("command", sorted(set(re.findall(r"`sdlora ((?:lora |runs |data )?[a-z]+)", TEXT))))
def test_every_command_exists(command: str) -> None:
    assert CliRunner().invoke(cli.app, [*command.split(), "--help"]).exit_code == 0
