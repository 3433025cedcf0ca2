"""A dataset folder as a whole: layouts, pairing, all problems at once, and hands off."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from sdlora.data.dataset import ImageCaption, ImageDataset, enlarged_images, scan_dataset
from sdlora.errors import DatasetError, Problem
from tests.data.files import drawing, encoded, quadrants, save_drawing

WINDOWS = os.name == "nt"


def captions(dataset: ImageDataset) -> dict[str, str | None]:
    return {e.path.relative_to(dataset.root).as_posix(): e.caption for e in dataset.examples}


def problems(root: Path, **options: object) -> dict[str, Problem]:
    with pytest.raises(DatasetError) as caught:
        scan_dataset(root, **options)
    assert all(problem.what and problem.remedy for problem in caught.value.problems)
    found = {problem.where: problem for problem in caught.value.problems}
    assert len(found) == len(caught.value.problems)
    return found


def warning(root: Path, part: str, **options: object) -> Problem:
    found = [problem for problem in scan_dataset(root, **options).warnings if part in problem.what]
    assert len(found) == 1, scan_dataset(root, **options).warnings
    return found[0]


# Layouts


@pytest.mark.parametrize("suffix", [".txt", ".caption"])
def test_pictures_with_caption_files_beside_them(suffix: str, tmp_path: Path) -> None:
    for seed, name in enumerate(("owl", "fox")):
        save_drawing(tmp_path / f"{name}.png", seed)
        (tmp_path / f"{name}{suffix}").write_text(f"an {name}\n")
    dataset = scan_dataset(tmp_path)
    assert dataset.examples == (
        ImageCaption(tmp_path / "fox.png", "an fox", (64, 64), 1),
        ImageCaption(tmp_path / "owl.png", "an owl", (64, 64), 1),
    )
    assert dataset.layout == f"2 images with {suffix} captions"
    assert dataset.warnings == ()


def test_metadata_jsonl(tmp_path: Path) -> None:
    save_drawing(tmp_path / "a.png", 0)
    save_drawing(tmp_path / "sub" / "b.png", 1)
    rows = [{"file_name": "a.png", "text": "a fox"}, {"file_name": "sub/b.png", "text": "an owl"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dataset = scan_dataset(tmp_path)
    assert captions(dataset) == {"a.png": "a fox", "sub/b.png": "an owl"}
    assert dataset.layout == "2 images with metadata.jsonl captions, in nested folders"


def test_metadata_csv_in_a_subfolder_names_files_beside_it_even_the_windows_way(tmp_path: Path) -> None:
    save_drawing(tmp_path / "train" / "x" / "a.png", 0)
    (tmp_path / "train" / "metadata.csv").write_text('file_name,prompt\nx\\a.png,"a fox, red"\n')
    dataset = scan_dataset(tmp_path)
    assert captions(dataset) == {"train/x/a.png": "a fox, red"}
    assert dataset.layout == "1 image with metadata.csv captions, in nested folders"


def kohya(parent: Path) -> None:
    save_drawing(parent / "10_red fox" / "a.png", 0, "a fox")
    save_drawing(parent / "3_owl" / "b.png", 1, "an owl")
    save_drawing(parent / "3_owl" / "more" / "c.png", 2, "a barn owl")


def test_kohya_folders_given_the_parent(tmp_path: Path) -> None:
    kohya(tmp_path)
    dataset = scan_dataset(tmp_path)
    assert [(e.path.name, e.repeats) for e in dataset.examples] == [("a.png", 10), ("b.png", 3), ("c.png", 3)]
    expected = "3 images with .txt captions, in kohya repeat folders (10_red fox x 10, 3_owl x 3)"
    assert dataset.layout == expected


def test_kohya_folders_given_the_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kohya(tmp_path)
    dataset = scan_dataset(tmp_path / "10_red fox")
    assert [(e.path.name, e.repeats) for e in dataset.examples] == [("a.png", 10)]
    assert dataset.layout == "1 image with .txt captions, in kohya repeat folders (10_red fox x 10)"
    monkeypatch.chdir(tmp_path / "10_red fox")
    assert scan_dataset(Path()).examples[0].repeats == 10


def test_a_year_is_not_a_repeat_count(tmp_path: Path) -> None:
    save_drawing(tmp_path / "2024_drawings" / "a.png", 0, "a fox")
    dataset = scan_dataset(tmp_path)
    assert dataset.examples[0].repeats == 1
    assert "would mean 2024 repeats" in dataset.warnings[0].what


def test_zero_repeats_are_a_problem(tmp_path: Path) -> None:
    save_drawing(tmp_path / "0_fox" / "a.png", 0, "a fox")
    assert "0 repeats" in problems(tmp_path)["0_fox"].what


def test_nested_folders(tmp_path: Path) -> None:
    save_drawing(tmp_path / "animals" / "wild" / "fox.png", 0, "a fox")
    save_drawing(tmp_path / "things" / "fox.png", 1, "a toy fox")
    dataset = scan_dataset(tmp_path)
    assert captions(dataset) == {"animals/wild/fox.png": "a fox", "things/fox.png": "a toy fox"}
    assert dataset.layout == "2 images with .txt captions, in nested folders"


def test_pictures_only_with_a_trigger(tmp_path: Path) -> None:
    save_drawing(tmp_path / "a.png", 0)
    save_drawing(tmp_path / "b.png", 1)
    dataset = scan_dataset(tmp_path, trigger="ink style")
    assert captions(dataset) == {"a.png": None, "b.png": None}
    assert dataset.layout == "2 images without captions"
    assert dataset.warnings == ()


@pytest.mark.parametrize("name", ["heldout", "Held-Out", "validation", "test", "reg"])
def test_folders_set_apart_are_left_out_and_named(name: str, tmp_path: Path) -> None:
    save_drawing(tmp_path / "fox.png", 0, "a fox")
    save_drawing(tmp_path / name / "owl.png", 1, "an owl")
    save_drawing(tmp_path / name / "1_deep" / "cat.png", 2)
    dataset = scan_dataset(tmp_path)
    assert captions(dataset) == {"fox.png": "a fox"}
    assert dataset.layout == f"1 image with .txt captions; left out: {name}/"
    assert dataset.warnings == ()


def test_a_folder_set_apart_can_be_given_itself(tmp_path: Path) -> None:
    save_drawing(tmp_path / "heldout" / "owl.png", 1, "an owl")
    assert captions(scan_dataset(tmp_path / "heldout")) == {"owl.png": "an owl"}
    assert "heldout/ is never trained on" in problems(tmp_path)[tmp_path.as_posix()].what


def test_what_is_no_data_is_passed_over(tmp_path: Path) -> None:
    save_drawing(tmp_path / "fox.png", 0, "a fox")
    for name in ("LICENSE", "README.md", "README.txt", "LICENSE.txt", "Thumbs.db", ".DS_Store", "._fox.png", "fox.npz"):
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07 nothing")
    save_drawing(tmp_path / ".cache" / "owl.png", 1)
    dataset = scan_dataset(tmp_path)
    assert captions(dataset) == {"fox.png": "a fox"}
    assert dataset.warnings == ()


def test_files_of_no_known_kind_are_ignored_with_a_warning(tmp_path: Path) -> None:
    save_drawing(tmp_path / "fox.png", 0, "a fox")
    (tmp_path / "fox.psd").write_bytes(b"8BPS")
    (tmp_path / "BMW").write_bytes(b"BMW and other cars")
    assert warning(tmp_path, "ignored: BMW, fox.psd").where == tmp_path.as_posix()


# Content and names


def test_a_wrong_or_missing_suffix_is_read_by_content_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / "fox.jpg").write_bytes(encoded(drawing(0), "PNG"))
    (tmp_path / "owl").write_bytes(encoded(drawing(1), "WEBP"))
    (tmp_path / "cat.JPEG").write_bytes(encoded(drawing(2), "JPEG"))
    dataset = scan_dataset(tmp_path, trigger="ink")
    assert [e.path.name for e in dataset.examples] == ["cat.JPEG", "fox.jpg", "owl"]
    found = {problem.where: problem for problem in dataset.warnings}
    assert found["fox.jpg"].what == "is a PNG file by its content and is read as that."
    assert found["owl"].remedy == "Rename it to end in .webp."
    assert len(found) == 2


@pytest.mark.parametrize(("image_form", "caption_form"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_an_umlaut_pairs_in_either_unicode_form(image_form: str, caption_form: str, tmp_path: Path) -> None:
    save_drawing(tmp_path / f"{unicodedata.normalize(image_form, 'grün')}.png", 0)
    (tmp_path / f"{unicodedata.normalize(caption_form, 'grün')}.txt").write_text("a fox")
    assert [e.caption for e in scan_dataset(tmp_path).examples] == ["a fox"]


def test_an_umlaut_in_a_table_pairs_in_either_unicode_form(tmp_path: Path) -> None:
    save_drawing(tmp_path / f"{unicodedata.normalize('NFD', 'grün')}.png", 0)
    (tmp_path / "metadata.csv").write_text("file_name,text\ngrün.png,a fox\n", encoding="utf-8")
    assert [e.caption for e in scan_dataset(tmp_path).examples] == ["a fox"]


@pytest.mark.skipif(WINDOWS, reason="these names cannot exist there")
@pytest.mark.parametrize(
    "name", ["a fox", "it's", 'say "hi"', "a\nb", "🦊", "a.b.c", "$(x);&", "back\\slash", "x" * 240, "%s {0}"]
)
def test_odd_names_pair_and_are_shown_on_one_printable_line(name: str, tmp_path: Path) -> None:
    save_drawing(tmp_path / f"{name}.png", 0)
    (tmp_path / f"{name}.txt").write_text("a fox")
    assert [e.caption for e in scan_dataset(tmp_path).examples] == ["a fox"]
    (tmp_path / f"{name}.txt").unlink()
    with pytest.raises(DatasetError) as caught:
        scan_dataset(tmp_path)
    assert caught.value.problems[0].where.isprintable()
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="names are Unicode elsewhere")
def test_a_name_that_is_not_unicode_is_read_and_shown(tmp_path: Path) -> None:
    name = os.fsdecode(b"f\xfcchs")
    save_drawing(tmp_path / f"{name}.png", 0)
    (tmp_path / f"{name}.txt").write_text("a fox")
    assert [e.caption for e in scan_dataset(tmp_path).examples] == ["a fox"]
    (tmp_path / f"{name}.txt").unlink()
    with pytest.raises(DatasetError) as caught:
        scan_dataset(tmp_path)
    assert "f\\xfcchs.png: has no caption." in str(caught.value)
    str(caught.value).encode()


# Captions


def test_a_missing_caption_is_a_problem_for_each_picture(tmp_path: Path) -> None:
    save_drawing(tmp_path / "a.png", 0, "a fox")
    save_drawing(tmp_path / "b.png", 1)
    save_drawing(tmp_path / "sub" / "c.png", 2)
    found = problems(tmp_path)
    assert set(found) == {"b.png", "sub/c.png"}
    assert found["b.png"].what == "has no caption."
    assert found["b.png"].remedy == "Add b.txt, or give a trigger phrase (--trigger)."


@pytest.mark.parametrize("trigger", [None, "", "  "])
def test_a_folder_without_any_caption_is_one_problem(trigger: str | None, tmp_path: Path) -> None:
    for seed in range(8):
        save_drawing(tmp_path / f"{seed}.png", seed)
    (problem,) = problems(tmp_path, trigger=trigger).values()
    assert problem.what == ("none of its 8 pictures has a caption: 0.png, 1.png, 2.png, 3.png, 4.png and 3 more.")
    assert "--trigger" in problem.remedy


def test_a_missing_caption_with_a_trigger_is_a_warning_among_captioned_pictures(tmp_path: Path) -> None:
    save_drawing(tmp_path / "a.png", 0, "a fox")
    save_drawing(tmp_path / "b.png", 1)
    assert captions(scan_dataset(tmp_path, trigger="ink")) == {"a.png": "a fox", "b.png": None}
    assert "1 picture without a caption" in warning(tmp_path, "trigger alone: b.png", trigger="ink").what


def test_an_empty_caption_is_legal_and_warned_of(tmp_path: Path) -> None:
    save_drawing(tmp_path / "a.png", 0, " \n")
    save_drawing(tmp_path / "b.png", 1, "")
    assert captions(scan_dataset(tmp_path)) == {"a.png": "", "b.png": ""}
    assert warning(tmp_path, "empty").what == "2 pictures with an empty caption: a.png, b.png."


def test_a_row_without_text_is_a_missing_caption(tmp_path: Path) -> None:
    save_drawing(tmp_path / "a.png", 0)
    save_drawing(tmp_path / "b.png", 1)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": null}\n{"file_name": "b.png", "text": ""}')
    (problem,) = problems(tmp_path).values()
    assert (problem.where, problem.what) == ("a.png", "has no caption.")
    assert "a row in metadata.jsonl" in problem.remedy


def test_a_caption_that_cannot_be_read_is_one_problem_and_not_also_missing(tmp_path: Path) -> None:
    save_drawing(tmp_path / "a.png", 0)
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (problem,) = problems(tmp_path).values()
    assert (problem.where, problem.what) == ("a.txt", "is not UTF-8 text: 0xe9 is no UTF-8 at byte 3.")


def test_two_captions_that_differ_are_a_problem_and_two_that_agree_are_not(tmp_path: Path) -> None:
    save_drawing(tmp_path / "a.png", 0, "a fox")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a fox\n")
    assert captions(scan_dataset(tmp_path)) == {"a.png": "a fox"}
    (tmp_path / "a.caption").write_text("an owl")
    assert problems(tmp_path)["a.png"].what == "has 2 different captions: a.caption, a.txt, metadata.csv, line 2."


def test_a_caption_without_a_picture_is_a_warning_that_guesses_the_right_name(tmp_path: Path) -> None:
    save_drawing(tmp_path / "fox.png", 0)
    (tmp_path / "fox.png.txt").write_text("a fox")
    (tmp_path / "notes.txt").write_text("buy milk")
    dataset = scan_dataset(tmp_path, trigger="ink")
    found = {problem.where: problem for problem in dataset.warnings}
    assert set(found) == {"fox.png.txt", "notes.txt"}
    assert found["fox.png.txt"].remedy == "If it belongs to fox.png, rename it to fox.txt."
    assert found["notes.txt"].remedy == ""


def test_one_caption_for_two_pictures_is_a_warning(tmp_path: Path) -> None:
    save_drawing(tmp_path / "fox.png", 0, "a fox")
    save_drawing(tmp_path / "fox.bmp", 1)
    assert captions(scan_dataset(tmp_path)) == {"fox.bmp": "a fox", "fox.png": "a fox"}
    assert warning(tmp_path, "is the caption of 2 pictures: fox.bmp, fox.png").where == "fox.txt"


def test_equal_captions_are_a_warning(tmp_path: Path) -> None:
    for seed in range(3):
        save_drawing(tmp_path / f"{seed}.png", seed, "a Fox" if seed else "a fox")
    assert warning(tmp_path, "same caption").what == '3 pictures have the same caption "a fox": 0.png, 1.png, 2.png.'


def test_rows_that_name_no_picture_are_problems(tmp_path: Path) -> None:
    save_drawing(tmp_path / "set" / "a.png", 0)
    save_drawing(tmp_path / "set" / "heldout" / "b.png", 1)
    save_drawing(tmp_path / "secret.png", 2)
    names = ["a.png", "a.png", "nope.png", "../secret.png", str(tmp_path / "secret.png"), "heldout/b.png"]
    rows = [json.dumps({"file_name": name, "text": "a fox"}) for name in names]
    (tmp_path / "set" / "metadata.jsonl").write_text("\n".join(rows))
    found = {where: problem.what for where, problem in problems(tmp_path / "set").items()}
    assert list(found) == [f"metadata.jsonl, line {line}" for line in (2, 3, 4, 5, 6)]
    assert found["metadata.jsonl, line 2"] == "names a.png again, after line 1."
    assert found["metadata.jsonl, line 3"] == "names nope.png, and there is no such picture."
    assert found["metadata.jsonl, line 4"] == "names ../secret.png, outside the folder."
    assert "outside the folder" in found["metadata.jsonl, line 5"]
    assert found["metadata.jsonl, line 6"] == "names heldout/b.png, but heldout/ is not trained on."


def test_a_parquet_table_is_a_problem_and_not_a_silence(tmp_path: Path) -> None:
    save_drawing(tmp_path / "a.png", 0, "a fox")
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1")
    assert "metadata.jsonl" in problems(tmp_path)["metadata.parquet"].remedy


# Pictures


@pytest.mark.parametrize(
    ("size_hw", "what"),
    [
        ((16, 16), "is only 16 x 16 pixels; the shorter side must have 64."),
        ((40, 3000), "is only 3000 x 40 pixels; the shorter side must have 64."),
        ((257, 64), "is 64 x 257 pixels, longer than 4 : 1; most of it would be cut off."),
    ],
)
@pytest.mark.parametrize("decode", [True, False])
def test_tiny_and_stretched_pictures_are_problems(
    size_hw: tuple[int, int], what: str, decode: bool, tmp_path: Path
) -> None:
    drawing(0, size_hw=size_hw).save(tmp_path / "a.png")
    assert problems(tmp_path, trigger="ink", decode=decode)["a.png"].what == what


def test_the_smallest_and_the_longest_legal_picture(tmp_path: Path) -> None:
    drawing(0, size_hw=(256, 64)).save(tmp_path / "a.png")
    assert scan_dataset(tmp_path, trigger="ink").examples[0].size_hw == (256, 64)


def test_sizes_are_those_after_rotation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    quadrants((64, 96)).save(tmp_path / "a.jpg", exif=exif)
    for decode in (True, False):
        assert scan_dataset(tmp_path, trigger="ink", decode=decode).examples[0].size_hw == (96, 64)


def test_transparent_pictures_are_counted_in_one_warning_naming_the_background(tmp_path: Path) -> None:
    for seed in range(3):
        image = drawing(seed).convert("RGBA")
        image.putalpha(255 if seed == 0 else 128)
        image.save(tmp_path / f"{seed}.png")
    expected = "2 pictures with transparent parts, laid on the background colour (0, 9, 0): 1.png, 2.png."
    assert warning(tmp_path, "transparent", trigger="ink", background=(0, 9, 0)).what == expected


def test_near_duplicates_are_a_warning(tmp_path: Path) -> None:
    for seed in range(3):
        drawing(seed, size_hw=(96, 96)).save(tmp_path / f"{seed}.png")
    drawing(1, size_hw=(96, 96)).resize((70, 70)).save(tmp_path / "again.jpg", quality=60)
    expected = "2 pictures look (almost) the same: 1.png, again.jpg."
    assert warning(tmp_path, "almost", trigger="ink").what == expected
    assert scan_dataset(tmp_path, trigger="ink", decode=False).warnings == ()


def test_enlarged_pictures_are_named(tmp_path: Path) -> None:
    drawing(0, size_hw=(64, 64)).save(tmp_path / "a.png")
    drawing(1, size_hw=(128, 128)).save(tmp_path / "b.png")
    dataset = scan_dataset(tmp_path, trigger="ink")
    (problem,) = enlarged_images(dataset, resolution=128)
    assert problem.what == "1 picture enlarged to more than twice the area: a.png (64 x 64)."
    assert enlarged_images(dataset, resolution=64) == ()


# What is not a plain file


def test_a_link_to_a_picture_is_followed_and_one_that_leads_outside_is_reported(tmp_path: Path) -> None:
    outside = tmp_path / "blobs" / "0123"
    outside.parent.mkdir()
    outside.write_bytes(encoded(drawing(0), "PNG"))
    root = tmp_path / "set"
    root.mkdir()
    (root / "a.png").symlink_to(outside)
    (root / "a.txt").write_text("a fox")
    dataset = scan_dataset(root)
    assert captions(dataset) == {"a.png": "a fox"}
    assert [problem.what for problem in dataset.warnings] == ["links lead out of the folder and were followed: a.png."]


def test_a_folder_linked_twice_is_used_once(tmp_path: Path) -> None:
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "a").write_bytes(encoded(drawing(0), "PNG"))
    (tmp_path / "link").symlink_to(tmp_path / "all", target_is_directory=True)
    dataset = scan_dataset(tmp_path, trigger="ink")
    assert len(dataset.examples) == 1
    assert [p.where for p in dataset.warnings if "same folder" in p.what] == ["link"]


def test_a_link_back_to_the_folder_ends(tmp_path: Path) -> None:
    save_drawing(tmp_path / "a.png", 0, "a fox")
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert captions(scan_dataset(tmp_path)) == {"a.png": "a fox"}


@pytest.mark.parametrize("target", ["nowhere.png", "a.png"], ids=["dangling", "to itself"])
def test_a_broken_link_is_a_problem(target: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to(tmp_path / target)
    save_drawing(tmp_path / "b.png", 0, "a fox")
    assert problems(tmp_path)["a.png"].what == "is a link that leads nowhere."


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["x.png", "a.caption", "metadata.csv", "x"])
def test_a_named_pipe_is_passed_over_with_a_warning(name: str, tmp_path: Path) -> None:
    save_drawing(tmp_path / "a.png", 0, "a fox")
    os.mkfifo(tmp_path / name)
    assert captions(scan_dataset(tmp_path)) == {"a.png": "a fox"}
    assert warning(tmp_path, "not a regular file").where == name


def test_a_folder_named_like_a_picture_is_a_folder(tmp_path: Path) -> None:
    save_drawing(tmp_path / "a.png", 0, "a fox")
    (tmp_path / "x.png").mkdir()
    assert warning(tmp_path, "named like a picture").where == "x.png"
    save_drawing(tmp_path / "x.png" / "b.png", 1, "an owl")
    assert captions(scan_dataset(tmp_path)) == {"a.png": "a fox", "x.png/b.png": "an owl"}


def test_files_and_folders_without_permission_are_listed_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As root nothing is forbidden, so the system's answer is played.
    for seed, name in enumerate(("a", "b", "c")):
        save_drawing(tmp_path / f"{name}.png", seed, name)
    (tmp_path / "locked").mkdir()
    allowed_open, allowed_scandir = Path.open, os.scandir

    def open_or_refuse(path: Path, *args: object, **options: object) -> object:
        if path.name in ("a.png", "b.txt"):
            raise PermissionError(13, "Permission denied")
        return allowed_open(path, *args, **options)

    def scandir_or_refuse(path: Path) -> object:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return allowed_scandir(path)

    monkeypatch.setattr(Path, "open", open_or_refuse)
    monkeypatch.setattr(os, "scandir", scandir_or_refuse)
    found = {where: problem.what for where, problem in problems(tmp_path).items()}
    assert found == {
        "a.png": "may not be read: permission denied.",
        "b.txt": "cannot be read: Permission denied.",
        "locked": "cannot be opened: Permission denied.",
    }


# The folder as a whole


def test_a_root_that_is_no_folder(tmp_path: Path) -> None:
    assert problems(tmp_path / "nope")[(tmp_path / "nope").as_posix()].what == "does not exist."
    path = save_drawing(tmp_path / "a.png")
    assert problems(path)[path.as_posix()].what == "is not a folder."
    too_long = tmp_path / ("x" * 5000)
    assert "cannot be opened" in problems(too_long)[too_long.as_posix()].what


def test_an_empty_folder_says_what_is_expected(tmp_path: Path) -> None:
    problem = problems(tmp_path)[tmp_path.as_posix()]
    assert problem.what == "holds no pictures to train on."
    assert "metadata.jsonl" in problem.remedy
    assert "WEBP" in problem.remedy


def test_all_problems_come_in_one_error_with_the_exit_code_of_datasets(tmp_path: Path) -> None:
    save_drawing(tmp_path / "good.png", 0, "good")
    save_drawing(tmp_path / "missing.png", 1)
    save_drawing(tmp_path / "latin.png", 2)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "cut.jpg").write_bytes(encoded(drawing(3), "JPEG")[:300])
    (tmp_path / "cut.txt").write_text("cut")
    (tmp_path / "page.png").write_bytes(b"<html></html>")
    (tmp_path / "page.txt").write_text("page")
    (tmp_path / "clip.gif").write_bytes(
        encoded(drawing(0), "GIF", save_all=True, append_images=[drawing(1), drawing(2)])
    )
    (tmp_path / "clip.txt").write_text("clip")
    drawing(5, size_hw=(20, 20)).save(tmp_path / "tiny.png")
    (tmp_path / "tiny.txt").write_text("tiny")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "gone"}\nnonsense')
    with pytest.raises(DatasetError) as caught:
        scan_dataset(tmp_path)
    assert [problem.where for problem in caught.value.problems] == [
        "clip.gif",
        "cut.jpg",
        "latin.txt",
        "metadata.jsonl, line 1",
        "metadata.jsonl, line 2",
        "missing.png",
        "page.png",
        "tiny.png",
    ]
    assert all(problem.what and problem.remedy for problem in caught.value.problems)
    assert str(caught.value).startswith(
        f"8 problems in {tmp_path.as_posix()}:\n  clip.gif: is animated: it has 3 frames."
    )
    assert caught.value.exit_code == 3


def snapshot(root: Path) -> dict[str, tuple[object, ...]]:
    def facts(path: Path) -> tuple[object, ...]:
        status = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        return status.st_mode, status.st_size, status.st_mtime_ns, status.st_ino, content

    return {str(path): facts(path) for path in (root, *sorted(root.rglob("*")))}


def test_the_users_folder_is_left_exactly_as_it_was(tmp_path: Path) -> None:
    kohya(tmp_path)
    save_drawing(tmp_path / "heldout" / "h.png", 4, "h")
    (tmp_path / "metadata.csv").write_text("file_name,text\n10_red fox/a.png,a fox\n")
    before = snapshot(tmp_path)
    scan_dataset(tmp_path)
    scan_dataset(tmp_path, decode=False)
    assert snapshot(tmp_path) == before
    shutil.copy(tmp_path / "3_owl" / "b.png", tmp_path / "missing.png")
    before = snapshot(tmp_path)
    problems(tmp_path)
    assert snapshot(tmp_path) == before


def test_the_order_is_that_of_the_names_whatever_the_file_system_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(6):
        save_drawing(tmp_path / f"{seed}.png", seed)
    entries = sorted(os.scandir(tmp_path), key=lambda entry: entry.name, reverse=True)

    class Reversed:
        def __enter__(self) -> list[os.DirEntry[str]]:
            return entries

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(os, "scandir", lambda _: Reversed())
    examples = scan_dataset(tmp_path, trigger="ink").examples
    assert [e.path.name for e in examples] == [f"{seed}.png" for seed in range(6)]


def test_a_dataset_is_scanned_without_torch(tmp_path: Path) -> None:
    save_drawing(tmp_path / "a.png", 0, "a fox")
    code = (
        "import sys, pathlib; from sdlora.data.dataset import scan_dataset; import sdlora.data.pixels;"
        "scan_dataset(pathlib.Path(sys.argv[1]));"
        "print([m for m in ('torch', 'diffusers', 'transformers', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_weights_come_from_the_table_and_two_tables_must_agree(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        save_drawing(tmp_path / f"{name}.png", seed, f"thing {name}")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "weight": 2.5}\n{"file_name": "b.png"}')
    assert [example.weight for example in scan_dataset(tmp_path).examples] == [2.5, 1.0]
    (tmp_path / "metadata.csv").write_text("file_name,text,weight\na.png,thing a,3\n")
    (problem,) = problems(tmp_path).values()
    assert "the weight 2.5, another table 3" in problem.what or "the weight 3, another table 2.5" in problem.what
