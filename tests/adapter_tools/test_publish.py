"""Sharing: the folder, the zip, the card, other tools' folders, the library; and nothing private in any of them."""

from __future__ import annotations

import getpass
import hashlib
import json
import socket
import zipfile
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import safe_open
from typer.testing import CliRunner

from sdlora.adapter_file import AdapterMetadata, read_adapter, write_adapter
from sdlora.cli_lora import app
from sdlora.config import load_config
from sdlora.errors import AdapterError
from sdlora.generation import Generator
from sdlora.picture_file import Recipe, read_recipe, save_picture
from sdlora.request import GenerationRequest
from sdlora.training import train_adapter
from tests.adapters.builders import kohya_tensors, peft_tensors, save, simple_pairs
from tests.tiny import tiny_sd1

METADATA = AdapterMetadata(
    title="ink",
    base_model="some/base",
    trigger_phrase='ink "style"',
    resolution=(512, 768),
    training={"ss_steps": "400", "ss_num_train_images": "40"},
)
RECIPE = Recipe(
    prompt="ink style, a [fox]",
    negative_prompt="",
    seed=1,
    num_inference_steps=2,
    guidance_scale=3.0,
    height=64,
    width=64,
    scheduler="ddim",
    base="my secret model",
    precision="fp32",
)


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def ink(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "ink.safetensors", simple_pairs(width=768), family="sd1", metadata=METADATA)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    return save_picture(Image.new("RGB", (600, 300), "red"), tmp_path / "fox.png", RECIPE)


def header_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_the_folder_holds_file_card_sidecars_and_pictures(ink: Path, picture: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    said = (*("--license", "cc-by-4.0", "--author", "Ann", "--weight", 0.8, "--tag", "ink"), "--name", "Ink v1")
    run("publish", ink, folder, *said, "--picture", picture)
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {"Ink v1.safetensors", "Ink v1.json", "Ink v1.png", "README.md", "images/0.png"}
    header = header_of(folder / "Ink v1.safetensors")
    expected = {
        "ss_output_name": "Ink v1",
        "modelspec.license": "cc-by-4.0",
        "modelspec.author": "Ann",
        "modelspec.lora_default_weight": "0.8",
        "modelspec.trigger_phrase": 'ink "style"',
        "sshs_model_hash": read_adapter(ink).tensor_sha256,
        "ss_steps": "400",
    }
    assert expected.items() <= header.items()
    assert header["modelspec.thumbnail"].startswith("data:image/jpeg;base64,")
    beside = json.loads((folder / "Ink v1.json").read_text(encoding="utf-8"))
    assert (beside["activation text"], beside["preferred weight"], beside["sd version"]) == ('ink "style"', 0.8, "SD1")
    recipe = read_recipe(folder / "images/0.png")
    assert (recipe.prompt, recipe.base) == ("ink style, a [fox]", "local model")


def test_the_card_is_read_by_the_hubs_own_library(ink: Path, picture: Path, tmp_path: Path) -> None:
    run("publish", ink, tmp_path / "shared", "--license", "My own: licence", "--picture", picture)
    card = ModelCard.load(tmp_path / "shared" / "README.md")
    data = card.data.to_dict()
    assert (data["license"], data["license_name"]) == ("other", "My own: licence")
    assert (data["base_model"], data["instance_prompt"]) == ("some/base", 'ink "style"')
    assert {"text-to-image", "stable-diffusion", "lora", "diffusers", "template:sd-lora"} <= set(data["tags"])
    assert data["widget"] == [{"text": "ink style, a [fox]", "output": {"url": "images/0.png"}}]
    assert "| Steps | 400 |" in card.text and "| Resolution | 768 x 512 |" in card.text
    assert "<lora:ink:1>" in card.text


def test_a_licence_the_hub_knows_is_called_as_the_hub_calls_it(ink: Path, tmp_path: Path) -> None:
    run("publish", ink, tmp_path / "shared", "--license", "CC-BY-NC-SA-4.0", "--base", "other/base")
    data = ModelCard.load(tmp_path / "shared" / "README.md").data.to_dict()
    assert (data["license"], data["base_model"]) == ("cc-by-nc-sa-4.0", "other/base")
    assert "widget" not in data


def test_a_zip_holds_the_same_files_and_two_zips_are_equal(ink: Path, picture: Path, tmp_path: Path) -> None:
    for name in ("a.zip", "b.zip"):
        run("publish", ink, tmp_path / name, "--license", "mit", "--picture", picture)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert archive.testzip() is None
        names = {"ink.safetensors", "ink.json", "ink.png", "README.md", "images/0.png"}
        assert set(archive.namelist()) == names
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_licence_is_asked_for_and_never_assumed(ink: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="Say under which licence"):
        run("publish", ink, tmp_path / "shared")
    assert not (tmp_path / "shared").exists()


def test_what_few_tools_would_load_is_not_published(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", peft_tensors(simple_pairs(width=768)))
    with pytest.raises(AdapterError, match=r"Convert it first: `sdlora lora convert`"):
        run("publish", path, tmp_path / "shared", "--license", "mit")


def test_a_name_that_is_a_path_and_a_folder_with_something_in_it_are_refused(ink: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no plain file name"):
        run("publish", ink, tmp_path / "shared", "--license", "mit", "--name", "../ink")
    with pytest.raises(AdapterError, match="is there already"):
        run("publish", ink, tmp_path, "--license", "mit")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG nothing")
    with pytest.raises(AdapterError, match="cannot be read as a picture"):
        run("publish", ink, tmp_path / "shared", "--license", "mit", "--picture", broken)


def test_nothing_is_sent_without_the_word_and_the_folder_as_it_is_with_it(ink, tmp_path, monkeypatch) -> None:
    sent: list[tuple[str, object]] = []

    class Hub:
        def create_repo(self, repo_id: str, **options: object) -> str:
            sent.append((repo_id, options["private"]))
            return f"https://hub/{repo_id}"

        def upload_folder(self, *, repo_id: str, folder_path: Path, **options: object) -> None:
            sent.append((repo_id, sorted(path.name for path in folder_path.iterdir())))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    run("publish", ink, tmp_path / "one", "--license", "mit")
    assert sent == []
    assert "https://hub/me/ink" in run("publish", ink, tmp_path / "two", "--license", "mit", "--upload", "me/ink")
    assert sent == [("me/ink", True), ("me/ink", ["README.md", "ink.json", "ink.safetensors"])]
    with pytest.raises(AdapterError, match="not the name of a repository"):
        run("publish", ink, tmp_path / "three", "--license", "mit", "--upload", "ink")
    with pytest.raises(AdapterError, match="not a zip"):
        run("publish", ink, tmp_path / "four.zip", "--license", "mit", "--upload", "me/ink")


def test_a_hub_that_says_no_is_one_sentence(ink: Path, tmp_path: Path, monkeypatch) -> None:
    class Hub:
        def create_repo(self, repo_id: str, **options: object) -> str:
            raise OSError("No network.\nA long trace")

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    with pytest.raises(AdapterError, match=r"The Hub did not take me/ink: No network\.\. .* is complete") as caught:
        run("publish", ink, tmp_path / "one", "--license", "mit", "--upload", "me/ink")
    assert "\n" not in str(caught.value)


# --- other tools ----------------------------------------------------------------------------------------------------


def test_install_copies_into_the_folders_of_the_tools_with_what_they_read(ink, picture, tmp_path) -> None:
    for name in ("comfy/models", "portable/ComfyUI/models", "webui/models", "invoke"):
        (tmp_path / name).mkdir(parents=True)
    places = (f"comfyui={tmp_path / 'comfy'}", f"a1111={tmp_path / 'webui'}", f"invokeai={tmp_path / 'invoke'}")
    run("install", ink, *places, f"ComfyUI={tmp_path / 'portable'}", "--picture", picture)
    assert [path.name for path in (tmp_path / "comfy/models/loras").iterdir()] == ["ink.safetensors"]
    assert (tmp_path / "portable/ComfyUI/models/loras/ink.safetensors").read_bytes() == ink.read_bytes()
    for folder in ("webui/models/Lora", "invoke"):
        assert {path.name for path in (tmp_path / folder).iterdir()} == {"ink.safetensors", "ink.json", "ink.png"}
    run("install", ink, *places, "--picture", picture)


def test_install_overwrites_nothing(ink: Path, tmp_path: Path) -> None:
    (tmp_path / "comfy/models/loras").mkdir(parents=True)
    other = tmp_path / "comfy/models/loras/ink.safetensors"
    other.write_bytes(b"another")
    with pytest.raises(AdapterError, match="is there already and is another file"):
        run("install", ink, f"comfyui={tmp_path / 'comfy'}")
    assert other.read_bytes() == b"another"


@pytest.mark.parametrize(
    ("place", "match"),
    [
        ("comfyui", "Say where each tool lies"),
        ("photoshop=.", "No tool is called 'photoshop'"),
        ("a1111={tmp}/none", "there is no such folder"),
        ("a1111={tmp}", "is not the folder of a1111: it has no folder `models`"),
    ],
)
def test_a_tool_that_is_not_there_is_named(ink: Path, tmp_path: Path, place: str, match: str) -> None:
    with pytest.raises(AdapterError, match=match):
        run("install", ink, place.format(tmp=tmp_path))


# --- library --------------------------------------------------------------------------------------------------------


def test_the_library_lists_what_lies_there_and_finds_by_any_hash(ink: Path, tmp_path: Path) -> None:
    folder = tmp_path / "loras" / "deep"
    folder.mkdir(parents=True)
    renamed = folder / "renamed.safetensors"
    renamed.write_bytes(ink.read_bytes())
    bare = save(folder / "bare.safetensors", kohya_tensors(simple_pairs(rank=2, width=2048)))
    (folder / "bare.json").write_text(json.dumps({"activation text": "from beside"}))
    (folder / "bare.png").touch()
    (folder / "page.safetensors").write_text("<html>")
    lines = [json.loads(line) for line in run("library", tmp_path / "loras", "--json").splitlines()]
    assert [Path(line["path"]).name for line in lines] == [
        "bare.safetensors",
        "page.safetensors",
        "renamed.safetensors",
    ]
    first, second, third = lines
    assert (first["family"], first["trigger"], first["picture"]) == ("sdxl", "from beside", str(folder / "bare.png"))
    assert "web page" in second["error"]
    assert (third["family"], third["trigger"], third["size_bytes"]) == ("sd1", 'ink "style"', ink.stat().st_size)
    text = run("library", tmp_path / "loras")
    assert read_adapter(ink).tensor_sha256[:12] in text and "trigger: from beside" in text
    for digits in (read_adapter(ink).tensor_sha256[:12].upper(), third["hashes"]["sha256"][:10]):
        assert run("library", tmp_path / "loras", "--find", digits).startswith(str(renamed))
    assert run("library", tmp_path / "loras", "--find", "0" * 12, code=1) == ""
    with pytest.raises(AdapterError, match="6 to 64 digits"):
        run("library", tmp_path, "--find", "ink")
    assert bare.exists()


def test_the_library_finds_by_every_kind_of_hash(tmp_path: Path) -> None:
    """Worked out from the bytes here; AutoV1 and the old hash of small files are those of nothing, and find none."""
    small = save(tmp_path / "small.safetensors", kohya_tensors(simple_pairs(width=768)))
    pairs = simple_pairs(rank=400, width=768)
    large = write_adapter(tmp_path / "large.safetensors", pairs, family="sd1", metadata=METADATA, dtype=torch.float32)
    content = large.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    hashes = {
        "AutoV1": hashlib.sha256(content[2**20 : 2**20 + 2**16]).hexdigest()[:8],
        "AutoV2": hashlib.sha256(content).hexdigest()[:10],
        "AutoV3": hashlib.sha256(content[start:]).hexdigest()[:12],
        "SHA-256": hashlib.sha256(content).hexdigest(),
        "sshs_model_hash": hashlib.sha256(content[start:]).hexdigest(),
        "sshs_legacy_hash": header_of(large)["sshs_legacy_hash"],
    }
    assert len(content) > 2**20 + 2**16 and len(set(hashes.values())) == len(hashes)
    for digits in hashes.values():
        (line,) = run("library", tmp_path, "--find", digits.upper()).splitlines()
        assert line.startswith(str(large))
    nothing = hashlib.sha256(b"").hexdigest()[:8]
    assert hashlib.sha256(small.read_bytes()[2**20 :]).hexdigest().startswith(nothing)
    run("library", tmp_path, "--find", nothing, code=1)


# --- privacy --------------------------------------------------------------------------------------------------------


def test_no_caption_path_folder_user_or_host_is_in_anything_that_is_shared(tmp_path: Path, monkeypatch) -> None:
    """Canaries in all places a run knows of, then every file that leaves this computer is searched for them."""
    home = tmp_path / "home-canary"
    data, base = home / "dataset-canary", home / "models-canary" / "base"
    data.mkdir(parents=True)
    for number in range(2):
        info = PngInfo()
        info.add_text("parameters", "exif-canary")
        Image.new("RGB", (64, 64), (80 * number, 9, 9)).save(data / f"picture-canary-{number}.png", pnginfo=info)
        (data / f"picture-canary-{number}.txt").write_text(f"caption-canary, thing {number}")
    tiny_sd1().save_pretrained(base)
    monkeypatch.setenv("HF_TOKEN", "token-canary")
    monkeypatch.setenv("HOME", str(home))
    (home / "config.toml").write_text(
        f'[model]\nbase = "{base}"\nprecision = "fp32"\n[data]\npath = "{data}"\ntrigger = "ink style"\n'
        f'[train]\nexposures = 2\nbatch_size = 1\nsave_every = 2\n[preview]\nprompts = ["a fox"]\n'
        f'num_inference_steps = 1\n[output]\ndir = "{home / "runs-canary"}"\nname = "ink"\n'
    )
    adapter = train_adapter(load_config(home / "config.toml"))
    generator = Generator.from_base(str(base), precision="fp32")
    generator.stack.load(adapter)
    drawn = next(iter(generator.draw(GenerationRequest(prompt="a fox", num_inference_steps=1, height=64, width=64))))
    example = save_picture(drawn.image, tmp_path / "example.png", drawn.recipe)
    foreign = tmp_path / "photo.png"
    info = PngInfo()
    info.add_text("comment", "exif-canary")
    Image.new("RGB", (32, 32)).save(foreign, pnginfo=info)
    shared, zipped, webui = tmp_path / "shared", tmp_path / "shared.zip", tmp_path / "webui"
    (webui / "models").mkdir(parents=True)
    for target in (shared, zipped):
        run("publish", adapter, target, "--license", "mit", "--picture", example, "--picture", foreign)
    run("install", adapter, f"a1111={webui}", "--picture", foreign)
    published = [adapter, example, zipped]
    published += [path for folder in (shared, webui) for path in folder.rglob("*") if path.is_file()]
    run_folder = adapter.parent
    for folder in ("checkpoints", "state", "previews"):
        inside = [path for path in (run_folder / folder).rglob("*") if path.is_file()]
        assert inside, folder
        published += inside
    assert len(published) > 15
    private = [b"canary", str(tmp_path).encode(), socket.gethostname().encode(), getpass.getuser().encode()]
    # Names so short that they occur by chance say nothing.
    private = [word for word in private if len(word) > 4]
    for path in published:
        content = path.read_bytes()
        found = [word for word in private if word in content or word.decode().encode("utf-16-le") in content]
        assert not found, f"{path.name} tells {found}"
    assert torch.equal(
        read_adapter(adapter).unet[next(iter(read_adapter(adapter).unet))].down,
        read_adapter(shared / "ink.safetensors").unet[next(iter(read_adapter(adapter).unet))].down,
    )


def test_what_another_trainer_wrote_of_its_user_stays_here(tmp_path: Path) -> None:
    """kohya's captions, folders, comments and model paths, through every tool that makes a file to share of one."""
    folder = tmp_path / "folder-canary"
    folder.mkdir()
    private = {
        "ss_tag_frequency": json.dumps({"10_canary": {"caption canary": 3}}),
        "ss_dataset_dirs": json.dumps({"10_canary": {"n_repeats": 10, "img_count": 4}}),
        "ss_datasets": json.dumps([{"subsets": [{"image_dir": "/home/canary/pictures"}]}]),
        "ss_output_name": "name canary",
        "ss_training_comment": "canary",
        "ss_sd_model_name": "/home/canary/models/base.safetensors",
        "ss_vae_name": "canary.pt",
        "ss_session_id": "canary",
        "ss_learning_rate": "1e-4 /home/canary",
        "sdlora.secret": "canary",
        "ssmd_cover_images": '["Y2FuYXJ5 canary"]',
    }
    pairs = simple_pairs(width=768)
    source = save(folder / "ink.safetensors", kohya_tensors(pairs), {**private, "ss_steps": "400"})
    shared = tmp_path / "shared"
    shared.mkdir()
    run("convert", source, shared / "converted.safetensors")
    run("convert", source, shared / "peft.safetensors", "--format", "peft")
    run("resize", source, shared / "resized.safetensors", "--rank", 2)
    run("merge", shared / "merged.safetensors", source, source)
    run("publish", source, shared / "folder", "--license", "mit")
    run("publish", source, shared / "a.zip", "--license", "mit")
    published = [path for path in shared.rglob("*") if path.is_file()]
    assert len(published) == 8
    for path in published:
        assert b"canary" not in path.read_bytes(), path.name
    assert header_of(shared / "converted.safetensors")["ss_steps"] == "400"
    run("metadata", "strip", source)
    assert b"canary" not in source.read_bytes()
