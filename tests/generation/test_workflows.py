"""Many prompts, drawing again, comparing: from files to files, on a tiny pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from sdlora.adapter_file import rewrite_metadata
from sdlora.cli import app
from sdlora.errors import GenerationError
from sdlora.picture_file import read_recipe
from sdlora.sheet import write_page, write_sheet
from sdlora.training import train_adapter
from sdlora.workflows import _tell_how_to_draw
from tests.adapters.builders import random_pairs, write
from tests.tiny import tiny_sd1
from tests.training.helpers import make_config, write_pictures

QUICK = ("--steps", 2, "--guidance", 3)


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("loras")
    unet = tiny_sd1().unet
    return {
        name: write(folder / f"{name}.safetensors", random_pairs(unet, seed=seed))
        for seed, name in enumerate(("ink", "blob"))
    }


def run(*arguments: object, code: int = 0, text: str | None = None) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=text, catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_a_file_of_prompts_loses_only_the_bad_ones(base: Path, loras: dict[str, Path], tmp_path: Path) -> None:
    lines = ["a fox <lora:ink:0.5>", "a {red|blue owl", "a fox <lora:nowhere>", "# a note", "a fox"]
    (tmp_path / "prompts.txt").write_text("\n".join(lines), encoding="utf-8")
    folders = ("--base", base, "--lora-dir", loras["ink"].parent, "--out", tmp_path / "out")
    output = run("generate", "--prompts", tmp_path / "prompts.txt", *folders, *QUICK, code=7)
    assert "left out: prompt 2, 'a {red|blue owl'" in output
    assert "left out: prompt 3, 'a fox <lora:nowhere>'" in output
    first, second = sorted((tmp_path / "out").glob("*.png"))
    assert [(a.name, a.weight) for a in read_recipe(first).adapters] == [("ink", 0.5)]
    assert read_recipe(second).adapters == ()
    assert (pixels(first) != pixels(second)).any()


def test_prompts_come_from_standard_input_and_choices_are_taken(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("generate", "--prompts", "-", "--base", base, "--out", out, *QUICK, text="a {red|blue} fox\na {red|blue} fox\n")
    prompts = [read_recipe(path).prompt for path in sorted(out.glob("*.png"))]
    assert len(prompts) == 2 and set(prompts) <= {"a red fox", "a blue fox"}


def test_a_prompt_and_a_file_or_neither_is_refused(tmp_path: Path) -> None:
    for arguments in ((), ("a fox", "--prompts", "x.txt")):
        with pytest.raises(GenerationError, match="and not both"):
            run("generate", *arguments)
    with pytest.raises(GenerationError, match="cannot be read"):
        run("generate", "--prompts", tmp_path / "none.txt")


def test_one_file_named_twice_counts_with_both_weights(base: Path, loras: dict[str, Path], tmp_path: Path) -> None:
    for name, arguments in (
        ("once", ("a fox", "--lora", f"{loras['ink']}:0.8")),
        ("twice", (f"a fox <lora:{loras['ink']}:0.3>", "--lora", f"{loras['ink']}:0.5")),
    ):
        run("generate", *arguments, "--base", base, "--out", tmp_path / name, *QUICK)
    once, twice = (next((tmp_path / name).glob("*.png")) for name in ("once", "twice"))
    assert (pixels(once) == pixels(twice)).all()


@pytest.fixture
def picture(base: Path, loras: dict[str, Path], tmp_path: Path) -> Path:
    arguments = ("--lora", f"{loras['ink']}:0.7", "--lora", f"{loras['blob']}:0.4", "--scheduler", "euler-a")
    run("generate", "a fox", "--negative", "grey", "--seed", 5, *arguments, "--base", base, "--out", tmp_path, *QUICK)
    return next(tmp_path.glob("*.png"))


def test_again_draws_the_same_picture_with_renamed_and_edited_adapters(
    picture: Path, base: Path, loras: dict[str, Path], tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    rewrite_metadata(loras["ink"], moved / "other name.safetensors", {"modelspec.author": "me"})
    (moved / "ink.safetensors").write_bytes(loras["blob"].read_bytes())
    output = run("again", picture, "--base", base, "--lora-dir", moved, "--out", tmp_path / "again")
    assert "The same picture, to the last pixel." in output
    drawn = tmp_path / "again" / picture.name
    assert (pixels(drawn) == pixels(picture)).all()
    assert read_recipe(drawn).negative_prompt == "grey"
    run("again", picture, "--base", base, "--lora-dir", moved, "--out", tmp_path / "again")
    assert (tmp_path / "again" / f"{picture.stem}-2.png").exists()


def test_again_says_what_is_missing_and_what_differs(picture: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(GenerationError, match=r"local model 'sd1'\. Say where it lies with --base"):
        run("again", picture)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(GenerationError, match=r"ink\.safetensors \(tensor hash \w{12}\), which is nowhere below"):
        run("again", picture, "--base", base, "--lora-dir", empty)
    plain = tmp_path / "plain.png"
    Image.new("RGB", (8, 8)).save(plain)
    with pytest.raises(GenerationError, match="no sdlora recipe"):
        run("again", plain)


def test_again_tells_a_changed_picture_and_why(base: Path, tmp_path: Path) -> None:
    run("generate", "a fox", "--base", base, "--out", tmp_path, *QUICK)
    (picture,) = tmp_path.glob("*.png")
    with Image.open(picture) as image:
        info, recipe = image.info, json.loads(image.info["sdlora"])
        changed = Image.eval(image, lambda value: 255 - value)
    recipe["versions"]["torch"] = "1.0"
    from PIL.PngImagePlugin import PngInfo

    texts = PngInfo()
    texts.add_itxt("parameters", info["parameters"])
    texts.add_itxt("sdlora", json.dumps(recipe))
    changed.save(picture, pnginfo=texts)
    output = run("again", picture, "--base", base, "--out", tmp_path / "again")
    assert f"Changed since: torch 1.0 -> {torch.__version__}." in output


def test_compare_draws_each_adapter_at_each_weight(base: Path, loras: dict[str, Path], tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    arguments = ("--prompt", "a fox", "--prompt", "an owl", "--weights", "0,0.5,1", "--seeds", "1,2")
    output = run("compare", *loras.values(), *arguments, "--base", base, "--out", sheet, *QUICK)
    assert "an owl · 2: 7 pictures" in output
    page = (tmp_path / "sheet.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 4 * 7 and "http" not in page
    assert "<th>ink 0.5</th>" in page and "<th>an owl · 2</th>" in page
    image = pixels(sheet)
    # Two adapters at three weights and the base; two prompts with two seeds.
    height, width = image.shape[0] - 28, image.shape[1]
    assert height == 4 * 64
    left = width - 7 * 64
    cells = [image[28:, left + 64 * n : left + 64 * (n + 1)] for n in range(7)]
    assert (cells[0] == cells[1]).all() and (cells[0] == cells[4]).all()  # weight 0
    assert not (cells[2] == cells[3]).all() and not (cells[3] == cells[6]).all()


def test_sweep_weights_is_a_comparison_of_one_adapter_at_many_weights(base: Path, loras, tmp_path: Path) -> None:
    sheet = tmp_path / "weights.png"
    output = run("sweep-weights", loras["ink"], "--prompt", "a fox", "--base", base, "--out", sheet, *QUICK)
    assert "a fox: 7 pictures" in output and sheet.is_file()
    page = (tmp_path / "weights.html").read_text(encoding="utf-8")
    for heading in ("without", "ink -0.5", "ink 1.25"):
        assert f"<th>{heading}</th>" in page


def test_compare_of_a_run_shows_what_it_saved_on_its_own_captions(base: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "data", count=6)
    config = make_config(
        model={"base": str(base), "precision": "fp32"},
        data={"path": tmp_path / "data", "trigger": "ink style"},
        output={"dir": tmp_path, "name": "ink"},
        train={"save_every": 2},
    )
    train_adapter(config)
    output = run("compare", tmp_path / "ink", "--out", tmp_path / "sheet.png", *QUICK)
    assert output.count(": 5 pictures") == 4
    for heading in ("without", "ink-step-000002", "ink-step-000004", "ink", "ink, no trigger"):
        assert f"<th>{heading}</th>" in (tmp_path / "sheet.html").read_text(encoding="utf-8")
    # The last column is what the same prompt draws without the trigger's words.
    adapter, plain = tmp_path / "ink" / "ink.safetensors", (tmp_path / "plain.png", tmp_path / "asked.png")
    for path, prompt in zip(plain, ("thing 0", "thing 0, ink style"), strict=True):
        output = run("compare", adapter, "--prompt", prompt, "--base", base, "--out", path, *QUICK)
        assert f"{prompt}: {2 if path == plain[0] else 3} pictures" in output
    without, asked = (pixels(path)[28:].astype(int) for path in plain)
    # Batches of another size round otherwise.
    assert abs(asked[:, -64:] - without[:, -64:]).max() <= 1
    assert abs(asked[:, -64:] - asked[:, -128:-64]).max() > 1
    with pytest.raises(GenerationError, match=r"no config\.toml"):
        run("compare", tmp_path / "data")
    with pytest.raises(GenerationError, match="A comparison needs prompts"):
        run("compare", tmp_path / "ink" / "ink.safetensors", "--base", base)


def test_a_page_escapes_what_prompts_and_names_say(tmp_path: Path) -> None:
    picture = Image.new("RGB", (2, 2))
    write_page({"<ink>": [picture]}, ['a "fox" & <script>'], tmp_path / "page.html", title="<ink>")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script>" not in page and "<ink>" not in page
    assert "<th>a &quot;fox&quot; &amp; &lt;script&gt;</th>" in page


def test_long_labels_are_cut_and_every_picture_has_its_place(tmp_path: Path) -> None:
    red, blue = Image.new("RGB", (40, 30), "red"), Image.new("RGB", (40, 30), "blue")
    write_sheet({"a": [red, blue], "a heading far too long": [blue, red]}, ["x", "y" * 200], tmp_path / "sheet.png")
    image = pixels(tmp_path / "sheet.png")
    left = image.shape[1] - 80
    assert left == 220 and image.shape[0] == 28 + 60
    for row, column, colour in ((0, 0, red), (1, 0, blue), (0, 1, blue), (1, 1, red)):
        cell = image[28 + 30 * row : 58 + 30 * row, left + 40 * column : left + 40 * (column + 1)]
        assert (cell == np.asarray(colour)).all()


def test_a_process_that_is_ready_before_the_adapter_is_written_says_nothing(tmp_path) -> None:
    said: list[str] = []
    _tell_how_to_draw(tmp_path / "ink.safetensors", said.append)
    assert said == []
    (tmp_path / "ink.safetensors").write_bytes(bytes(2048))
    _tell_how_to_draw(tmp_path / "ink.safetensors", said.append)
    assert "2 kB" in said[0]
