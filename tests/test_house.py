"""The house is as its documents say."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_architecture_names_every_module_and_no_other() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    table = text.split("## Where things are")[1].split("Beside the package")[0]
    named = {match[1].rstrip("/") for match in re.finditer(r"^\| `([a-z_/]+)` \|", table, re.MULTILINE)}
    package = ROOT / "sdlora"
    modules = {path.stem for path in package.glob("*.py") if not path.stem.startswith("_")}
    packages = {path.parent.name for path in package.glob("*/__init__.py")}
    assert named == modules | packages


def test_datasets_is_no_package_so_that_the_library_of_that_name_still_imports() -> None:
    assert not (ROOT / "datasets" / "__init__.py").exists()


def test_each_dataset_has_40_pictures_40_held_out_a_licence_and_is_small() -> None:
    for folder in ("blob-emoji", "high-contrast"):
        dataset = ROOT / "datasets" / folder
        trained, held_out = ({path.stem for path in place.glob("*.png")} for place in (dataset, dataset / "heldout"))
        assert len(trained) == len(held_out) == 40
        assert not trained & held_out
        assert {path.stem for path in dataset.rglob("*.txt")} == trained | held_out
        assert (dataset / "LICENSE").is_file() and (dataset / "README.md").is_file()
        assert sum(path.stat().st_size for path in dataset.rglob("*") if path.is_file()) < 3 * 2**20


def test_captions_name_the_subject_and_not_the_style() -> None:
    for path in (ROOT / "datasets").rglob("*.txt"):
        assert not re.search(r"style|emoji|contrast|blob|noto", path.read_text(encoding="utf-8"))


def test_the_package_carries_the_base() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "embedded/**/*" in project["tool"]["setuptools"]["package-data"]["sdlora"]
