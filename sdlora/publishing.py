"""An adapter made ready for others: a folder that is a Hub repository too, or a zip for Civitai. Built here, offline.

FOLDER/  NAME.safetensors  NAME.json  NAME.png  README.md  images/0.png ...
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from sdlora.adapter_file import (
    AdapterMetadata,
    carried_metadata,
    family_of,
    outline_adapter,
    read_adapter,
    replace_metadata,
)
from sdlora.adapter_tools import (
    CardPicture,
    file_hashes,
    is_hub_id,
    model_card,
    sidecar_fields,
    thumbnail_jpeg,
    write_sidecars,
)
from sdlora.errors import AdapterError, GenerationError
from sdlora.picture_file import Recipe, read_recipe, save_picture

__all__ = ["Publication", "open_picture", "publish_adapter", "upload_folder"]

_FORMATS = ("PNG", "JPEG", "WEBP")
_MAX_PIXELS = 64 * 2**20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+-]{0,99}")
_REPO = re.compile(r"[A-Za-z0-9][\w.\-]*/[\w.\-]+")
# The earliest that a zip can say; the hour of its making is nobody's business.
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Publication:
    """What its owner says about an adapter; None keeps what the file's header says."""

    name: str | None = None
    """The file's name without its ending, and its title."""
    license: str | None = None
    author: str | None = None
    description: str | None = None
    trigger: str | None = None
    tags: tuple[str, ...] = ()
    recommended_weight: float | None = None
    base_model: str | None = None
    pictures: tuple[Path, ...] = ()
    """The first one becomes the preview."""


@dataclass(frozen=True, eq=False)
class _Picture:
    image: Image.Image
    recipe: Recipe | None


def publish_adapter(source: Path, target: Path, publication: Publication) -> Path:
    """Writes the folder `target`, or the zip if it is called so; returns it. The source stays as it is.

    The tensors keep their hash. Of the header only what `AdapterMetadata` knows is taken over, so that captions, paths
    and names that another trainer wrote stay here; of the pictures the pixels, and the recipe of those drawn by sdlora.

    Raises:
        AdapterError: the licence is not said, the file cannot be published as it is, or the target exists.
    """
    metadata = _metadata(source, publication)
    pictures = [_read_picture(path) for path in publication.pictures]
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise AdapterError(f"{target} is there already. Choose another name.")
    if target.suffix == ".zip" and not target.parent.is_dir():
        raise AdapterError(f"{target}: there is no folder {target.parent}. Make it first.")
    try:
        if target.suffix == ".zip":
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".publish-") as folder:
                _fill(source, Path(folder), metadata, pictures)
                _zip(Path(folder), target)
        else:
            target.mkdir(parents=True, exist_ok=True)
            _fill(source, target, metadata, pictures)
    except OSError as error:
        raise AdapterError(f"{target}: cannot be written ({error.strerror}).") from error
    return target


def upload_folder(folder: Path, repo_id: str) -> str:
    """Sends the folder to a repository of the Hub, made private if it is new; returns its address.

    Raises:
        AdapterError: the name is none, nobody is logged in, or the Hub does not take it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    if not _REPO.fullmatch(repo_id):
        raise AdapterError(f"{repo_id!r} is not the name of a repository: owner/name.")
    try:
        api = HfApi()
        url = api.create_repo(repo_id, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Add the adapter and its card")
    except LocalTokenNotFoundError as error:
        raise AdapterError("Nobody is logged in at the Hugging Face Hub. Run `hf auth login` first.") from error
    except (HfHubHTTPError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AdapterError(
            f"The Hub did not take {repo_id}: {reason}. {folder} is complete and can be sent again."
        ) from error
    return str(url)


def _metadata(source: Path, publication: Publication) -> AdapterMetadata:
    outline = outline_adapter(source)
    if outline.dialects != ("kohya",) or set(outline.methods) - {"LoRA", "DoRA"}:
        raise AdapterError(
            f"{source} would load in few tools ({' and '.join(outline.methods)} with {'/'.join(outline.dialects)} "
            "keys). Convert it first: `sdlora lora convert`."
        )
    name = publication.name or source.stem
    if not _NAME.fullmatch(name):
        raise AdapterError(f"{name!r} is no plain file name: letters, digits, space and . _ + -. Say one with --name.")
    known = carried_metadata(outline.metadata, title=name)
    said: dict[str, Any] = {
        "license": publication.license,
        "author": publication.author,
        "description": publication.description,
        "trigger_phrase": publication.trigger,
        "tags": publication.tags or None,
        "recommended_weight": publication.recommended_weight,
        "base_model": publication.base_model,
    }
    if (
        publication.base_model is not None
        and publication.base_model != "tiny"
        and not is_hub_id(publication.base_model)
    ):
        raise AdapterError(f"--base {publication.base_model}: say it as the Hub calls it, owner/name.")
    metadata = dataclasses.replace(known, **{key: value for key, value in said.items() if value is not None})
    if metadata.license is None:
        raise AdapterError(
            "Say under which licence it is published, e.g. --license cc-by-4.0 or --license creativeml-openrail-m. "
            "It is yours to choose, within what the base model and the pictures allow."
        )
    if not is_hub_id(metadata.base_model):
        # Whatever it is called on this computer says nothing to others.
        metadata = dataclasses.replace(metadata, base_model="tiny" if metadata.base_model == "tiny" else "local model")
    return metadata


def open_picture(path: Path) -> Image.Image:
    """The pixels of a picture, and nothing else of its file.

    Raises:
        AdapterError: it is none, or too large.
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise AdapterError(f"{path}: {image.width} x {image.height} pixels are too many for an example.")
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise AdapterError(f"{path} cannot be read as a picture (PNG, JPEG or WebP).") from error


def _read_picture(path: Path) -> _Picture:
    pixels = open_picture(path)
    try:
        recipe = read_recipe(path)
    except GenerationError:
        return _Picture(pixels, None)
    is_public = recipe.base == "tiny" or is_hub_id(recipe.base)
    # What a file is called on this computer says nothing to others.
    public = dataclasses.replace(recipe, base=recipe.base if is_public else "local model", init_image="")
    return _Picture(pixels, public)


def _fill(source: Path, folder: Path, metadata: AdapterMetadata, pictures: Sequence[_Picture]) -> None:
    preview = pictures[0].image if pictures else None
    if preview is not None:
        metadata = dataclasses.replace(metadata, thumbnail=thumbnail_jpeg(preview))
    adapter = replace_metadata(source, folder / f"{metadata.title}.safetensors", metadata)
    weights = read_adapter(adapter)
    family = family_of(weights)
    assert family is not None
    write_sidecars(adapter, sidecar_fields(metadata, family), preview)
    shown = []
    for index, picture in enumerate(pictures):
        url = f"images/{index}.png"
        _save(picture, folder / url)
        shown.append(CardPicture(url, picture.recipe.prompt if picture.recipe else ""))
    card = model_card(
        metadata,
        family=family,
        file_name=adapter.name,
        rank=weights.metadata["ss_network_dim"],
        hashes=file_hashes(adapter),
        pictures=shown,
    )
    (folder / "README.md").write_text(card, encoding="utf-8", newline="\n")


def _save(picture: _Picture, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    if picture.recipe is not None:
        save_picture(picture.image, path, picture.recipe)
    else:
        picture.image.save(path, format="PNG")


def _zip(folder: Path, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                entry = zipfile.ZipInfo(path.relative_to(folder).as_posix(), _ZIP_TIME)
                entry.external_attr = 0o644 << 16
                with path.open("rb") as content, archive.open(entry, "w") as place:
                    shutil.copyfileobj(content, place)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
