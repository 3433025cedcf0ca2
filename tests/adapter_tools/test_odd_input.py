"""Whatever a newcomer gives the tools: one clear sentence with a way out, and nothing of theirs is lost."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from sdlora.adapter_file import AdapterMetadata, read_adapter, write_adapter
from sdlora.adapter_file.safety import MAX_HEADER_BYTES
from sdlora.cli import app
from sdlora.errors import AdapterFileError, SdloraError
from tests.adapters.builders import kohya_tensors, save, simple_pairs

INK = "ïnk & 'quotes' ünï.safetensors"
ODD = {
    "none.safetensors": "there is no such file",
    "folder": "this is a folder",
    "empty.safetensors": "the file is empty",
    "picture.safetensors": "this is a picture (PNG)",
    "pointer.safetensors": "Git LFS pointer",
    "page.safetensors": "this is a web page",
    "answer.safetensors": "this is a JSON text",
    "weights.pt": "this is a pickle",
    "archive.safetensors": "this is a zip archive",
    "cut.safetensors": "the file is truncated",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with an adapter and everything else that is given in its stead."""
    root = tmp_path_factory.mktemp("a folder, ü")
    metadata = AdapterMetadata(title="ink", base_model="some/base")
    write_adapter(root / INK, simple_pairs(width=768), family="sd1", metadata=metadata, dtype=torch.float32)
    (root / "folder").mkdir()
    (root / "empty.safetensors").touch()
    Image.new("RGB", (8, 8)).save(root / "picture.safetensors", format="PNG")
    (root / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    (root / "page.safetensors").write_text("<!DOCTYPE html>\n<html>Log in</html>")
    (root / "answer.safetensors").write_text('{"error": "unauthorized"}')
    torch.save({"a": torch.zeros(1)}, root / "weights.pt")
    with zipfile.ZipFile(root / "archive.safetensors", "w") as archive:
        archive.writestr("ink.safetensors", (root / INK).read_bytes())
    (root / "cut.safetensors").write_bytes((root / INK).read_bytes()[:-9])
    return root


@pytest.fixture
def here(place: Path, monkeypatch) -> Iterator[Path]:
    """That folder as the current one; afterwards every file must be there with the bytes it had, and none more."""
    monkeypatch.chdir(place)
    before = contents(place)
    yield place
    assert contents(place) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["lora", *map(str, arguments)])


def sentence_of(result: Result) -> str:
    """What the user is told: by the error, which alone `main` catches, or by the command itself."""
    assert result.exit_code != 0, result.output
    if isinstance(result.exception, SystemExit):
        # transformers' own notices, which `main` silences, come before.
        return result.output.strip().splitlines()[-1]
    assert isinstance(result.exception, SdloraError), repr(result.exception)
    return str(result.exception)


@pytest.mark.parametrize("name", ODD)
def test_what_is_no_adapter_is_called_what_it_is_by_every_tool(here: Path, name: str) -> None:
    for command in (
        ("inspect", here / name) if name != "folder" else ("convert", name, "new.safetensors"),
        ("convert", name, "new.safetensors"),
        ("resize", name, "new.safetensors", "--rank", 2),
        ("diff", INK, name),
        ("metadata", name),
        ("metadata", name, "--strip"),
        ("metadata", "set", name, "a=b"),
        ("publish", name, "shared", "--license", "mit"),
        ("install", name, "invokeai=folder"),
        ("verify", name, "--base", "tiny"),
    ):
        said = sentence_of(call(*command))
        assert ODD[name] in said and name in said and "\n" not in said, command
    if name not in ("none.safetensors", "folder"):
        assert ODD[name] in sentence_of(call("merge", "new.safetensors", INK, name))


@pytest.mark.parametrize(
    ("command", "match"),
    [
        # What is there already stays.
        (("convert", INK, INK), "is there already. Choose another name, or say --overwrite"),
        (("resize", INK, INK, "--rank", 1), "is there already"),
        (("merge", INK, INK), "the first file named is the one to write"),
        (("extract", "tiny", "tiny", INK), "is there already"),
        (("metadata", INK, "--set", "a=b", "--out", "cut.safetensors"), "is there already"),
        (("bake", INK, INK, "--base", "tiny"), "is there already"),
        (("publish", INK, "folder/..", "--license", "mit", "--name", "ink"), "is there already"),
        # Names that no file can have.
        (("convert", INK, "folder"), "folder is a folder. Name the file to write"),
        (("convert", INK, "new"), "call the file to write new.safetensors"),
        (("merge", "new.ckpt", INK), "call the file to write new.ckpt.safetensors"),
        (("convert", INK, "missing/new.safetensors"), "there is no folder missing. Make it first"),
        (("bake", "missing/new", INK, "--base", "tiny"), "there is no folder missing"),
        (("bake", "new.safetensors", INK, "--base", "tiny"), "name it without .safetensors"),
        (("bake", "new.safetensors", INK, "--base", "none"), "There is no file or folder none"),
        (("bake", "new.safetensors", INK, "--base", "picture.safetensors"), "it is not a safetensors file"),
        (("bake", "new.safetensors", INK, "--base", "weights.pt"), "it is a pickle, which can run code"),
        (("publish", INK, "missing/a.zip", "--license", "mit", "--name", "ink"), "there is no folder missing"),
        # Words that mean nothing.
        (("convert", INK, "new.safetensors", "--format", "lycoris"), "kohya, peft or diffusers"),
        (("convert", INK, "new.safetensors", "--dtype", "int8"), "fp16, bf16 or fp32"),
        (("resize", INK, "new.safetensors"), "give a rank or a share of the energy"),
        (("merge", "new.safetensors", f"{INK}:much"), "is not a number"),
        (("merge", "new.safetensors", f"{INK}:0"), "there is nothing to merge"),
        (("metadata", INK, "--set", "nothing"), "set FILE key=value"),
        (("metadata", "set", INK), "set FILE key=value"),
        (("metadata", "show", INK, "a=b"), "one word too many"),
        (("metadata", "strip", INK, "a=b"), "one word too many"),
        (("metadata", INK, "--set", "=b"), "A text needs a name"),
        (("metadata", INK, "--remove", "nothing"), "has no text called 'nothing'"),
        (("metadata", INK, "--set", "sshs_model_hash=00"), "is worked out from the tensors"),
        (("metadata", INK, "--set", "modelspec.hash_sha256=00"), "is worked out from the tensors"),
        (("metadata", INK, "--out", "new.safetensors"), "Nothing to change is said"),
        (("publish", INK, "shared", "--license", "mit"), "no plain file name"),
        (("publish", INK, "shared", "--license", "mit", "--name", "ink", "--base", "../sd"), "owner/name"),
        (("library", "none"), "there is no such folder"),
        (("library", ".", "--find", "ink"), "6 to 64 digits"),
    ],
)
def test_a_mistake_is_one_sentence_and_every_file_stays_as_it_was(here: Path, command: tuple, match: str) -> None:
    said = sentence_of(call(*command))
    assert match in said and "\n" not in said and said.endswith((".", "?"))


def test_a_name_that_is_nearly_right_is_suggested(here: Path) -> None:
    assert f"did you mean {INK}" in sentence_of(
        call("resize", INK.replace("quotes", "qoutes"), "new.safetensors", "--rank", 2)
    )
    assert f"did you mean {INK}" in sentence_of(call("metadata", INK.removesuffix(".safetensors")))


@pytest.fixture
def ink(place: Path, tmp_path: Path) -> Path:
    path = tmp_path / INK
    path.write_bytes((place / INK).read_bytes())
    return path


def test_names_with_spaces_quotes_and_letters_of_all_kinds_work(ink: Path, tmp_path: Path) -> None:
    target = tmp_path / "smaller 'é' 墨.safetensors"
    assert call("resize", ink, target, "--rank", 2).exit_code == 0
    assert call("diff", ink, target).exit_code == 1
    assert json.loads(call("library", tmp_path, "--json").output.splitlines()[0])["path"] == str(target)
    assert call("merge", tmp_path / "both ü.safetensors", f"{ink}:0.5", f"{target}:-0.5").exit_code == 0


def test_overwrite_writes_over_a_file_even_its_own_source(ink: Path) -> None:
    assert call("resize", ink, ink, "--rank", 2, "--overwrite").exit_code == 0
    assert {pair.rank for pair in read_adapter(ink).unet.values()} == {2}


def test_metadata_takes_the_verbs_and_the_short_form_takes_the_tools(ink: Path) -> None:
    runner = CliRunner()
    assert runner.invoke(app, ["metadata", "set", str(ink), "modelspec.author=Ann", "a.b=c = d"]).exit_code == 0
    shown = runner.invoke(app, ["metadata", "show", str(ink)]).output
    assert "modelspec.author = Ann" in shown and "a.b = c = d" in shown
    assert runner.invoke(app, ["metadata", "strip", str(ink)]).exit_code == 0
    assert "modelspec.author" not in runner.invoke(app, ["metadata", str(ink)]).output
    report = json.loads(runner.invoke(app, ["inspect", str(ink), "--json"]).output.splitlines()[-1])
    assert report["family"] == "sd1"
    assert "No such command" in runner.invoke(app, ["inspekt", str(ink)]).output


def test_a_header_that_could_not_be_read_again_is_not_written(ink: Path) -> None:
    before = ink.read_bytes()
    said = sentence_of(call("metadata", ink, "--set", f"a={'x' * MAX_HEADER_BYTES}"))
    assert "not written: its header would have" in said
    assert ink.read_bytes() == before


def test_half_a_surrogate_from_the_command_line_does_not_spoil_the_file(ink: Path) -> None:
    assert call("metadata", ink, "--set", "modelspec.author=\udce4nn").exit_code == 0
    assert read_adapter(ink).metadata["modelspec.author"] == "?nn"
    assert load_file(ink)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to_is_said(ink: Path, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    for command in (
        ("convert", ink, closed / "a.safetensors"),
        ("publish", ink, closed / "a", "--license", "mit", "--name", "a"),
    ):
        assert "cannot be written" in sentence_of(call(*command))


def test_a_disk_that_is_full_leaves_nothing_behind(ink: Path, tmp_path: Path, monkeypatch) -> None:
    before = contents(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for command in (("convert", ink, tmp_path / "a.safetensors"), ("metadata", "set", ink, "a=b")):
        assert "cannot be written: No space left on device" in sentence_of(call(*command))
    assert contents(tmp_path) == before


def test_tensors_of_others_are_counted_and_named_and_left_out_on_the_word(tmp_path: Path) -> None:
    own = kohya_tensors(simple_pairs(width=768))
    more = {f"bundle_emb.word{n}.string_to_param": torch.zeros(2, 2) for n in range(5)}
    path = save(tmp_path / "a.safetensors", own | more)
    said = sentence_of(call("convert", path, tmp_path / "b.safetensors"))
    assert "it holds 5 tensors that are not part of a LoRA: " in said and "and 2 more; `sdlora lora convert" in said
    with pytest.raises(AdapterFileError, match="5 tensors"):
        read_adapter(path)
    done = call("convert", path, tmp_path / "b.safetensors", "--drop-foreign")
    assert done.exit_code == 0
    assert "Left out 5 tensors that are no part of a LoRA: " in done.output and all(
        name in done.output for name in more
    )
    assert set(load_file(tmp_path / "b.safetensors")) == set(own)
    assert read_adapter(tmp_path / "b.safetensors").unet.keys() == read_adapter(path, drop_foreign=True).unet.keys()
