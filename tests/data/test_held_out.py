"""Which pictures are held out: decided by what they hold, so that others may come and go."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from sdlora.data.dataset import ImageDataset, scan_dataset
from sdlora.data.held_out import split_held_out
from sdlora.errors import DatasetError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    for n in range(60):
        Image.new("RGB", (64, 64), (4 * n, 255 - 4 * n, n)).save(root / f"{n:02d}.png")
    return root


def some(dataset: ImageDataset, count: int) -> ImageDataset:
    return ImageDataset(dataset.root, dataset.layout, dataset.examples[:count], ())


def names(dataset: ImageDataset | None) -> set[str]:
    assert dataset is not None
    return {example.path.name for example in dataset.examples}


def test_nothing_is_held_out_unless_it_is_asked_for(folder: Path) -> None:
    dataset = scan_dataset(folder, trigger="ink", decode=False)
    assert split_held_out(dataset) == (dataset, None)


def test_a_share_stays_the_same_when_pictures_come_or_are_renamed(folder: Path, tmp_path: Path) -> None:
    dataset = scan_dataset(folder, trigger="ink", decode=False)
    trained, held = split_held_out(dataset, share=0.25)
    assert names(trained) | names(held) == names(dataset) and not names(trained) & names(held)
    assert abs(len(names(held)) - 15) < 3 * (60 * 0.25 * 0.75) ** 0.5
    half = some(dataset, 30)
    assert names(split_held_out(half, share=0.25)[1]) == names(held) & names(half)
    for path in folder.iterdir():
        (tmp_path / f"renamed-{path.name}").write_bytes(path.read_bytes())
    again = split_held_out(scan_dataset(tmp_path, trigger="ink", decode=False), share=0.25)[1]
    assert names(again) == {f"renamed-{name}" for name in names(held)}


def test_a_count_is_exact_and_one_picture_more_replaces_at_most_one(folder: Path) -> None:
    dataset = scan_dataset(folder, trigger="ink", decode=False)
    before: set[str] = set()
    for total in range(10, 60):
        held = names(split_held_out(some(dataset, total), count=5)[1])
        assert len(held) == 5
        assert total == 10 or len(held - before) <= 1
        before = held


def test_a_small_share_holds_out_at_least_one(folder: Path) -> None:
    dataset = some(scan_dataset(folder, trigger="ink", decode=False), 3)
    assert len(names(split_held_out(dataset, share=1e-9)[1])) == 1


def test_copies_of_a_picture_are_not_on_both_sides(tmp_path: Path) -> None:
    for n in range(3):
        Image.new("RGB", (64, 64), (80 * n, 0, 0)).save(tmp_path / f"{n}.png")
        (tmp_path / f"copy-{n}.png").write_bytes((tmp_path / f"{n}.png").read_bytes())
    held = names(split_held_out(scan_dataset(tmp_path, trigger="ink"), count=1)[1])
    assert len(held) == 2 and {name.removeprefix("copy-") for name in held} == {min(held, key=len)}


def test_something_must_be_left_to_train_on(folder: Path) -> None:
    dataset = some(scan_dataset(folder, trigger="ink", decode=False), 4)
    for options in ({"count": 4}, {"count": 9}, {"share": 0.9999999999}):
        with pytest.raises(DatasetError, match=r"4 of its 4 pictures leaves none.*validation\.share"):
            split_held_out(dataset, **options)
