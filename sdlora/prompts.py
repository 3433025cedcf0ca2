"""What a prompt and a `--lora` argument say: adapter tags taken out, words beyond the text encoder's limit named."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlora.adapter_weight import Weight, parse_weight, simplest
from sdlora.errors import AdapterError, GenerationError

__all__ = ["AdapterChoice", "cut_words", "find_adapter", "parse_adapter_argument", "split_adapter_tags"]

_TAG = re.compile(r"<lora:([^:<>]+)(?::([^<>]*))?>")
_ARGUMENT = re.compile(r"(.*?\.safetensors|[^:]*)(?::(.*))?")


@dataclass(frozen=True)
class AdapterChoice:
    """An adapter as the user named it (a path, or a bare name) and its weight; 1.0 is as trained."""

    source: str
    weight: Weight | None = None
    """None: what the file recommends, else 1.0."""


def _weight(text: str, whole: str) -> Weight:
    try:
        return simplest(parse_weight(text))
    except AdapterError as error:
        raise GenerationError(f"{whole!r}: the weight {text!r} cannot be used: {error}") from None


def parse_adapter_argument(text: str) -> AdapterChoice:
    """`ink.safetensors:0.8`, `ink.safetensors`, `C:\\art\\ink.safetensors:0@0,0.8@0.4` or `ink:0.8:lbw=OUTALL`.

    Raises:
        GenerationError: the weight means nothing; `adapter_weight.syntax` tells what it may be.
    """
    folder = max(text.rfind("/"), text.rfind("\\")) + 1
    match = _ARGUMENT.fullmatch(text[folder:])
    if match is None or match[2] is None:
        return AdapterChoice(text)
    return AdapterChoice(text[:folder] + match[1], _weight(match[2], text))


def split_adapter_tags(prompt: str) -> tuple[str, tuple[AdapterChoice, ...]]:
    """The prompt without its `<lora:name:weight>` tags, and the adapters they ask for.

    Raises:
        GenerationError: a tag's weight means nothing.
    """
    choices = tuple(
        AdapterChoice(match[1].strip(), _weight(match[2], match[0]) if match[2] is not None else None)
        for match in _TAG.finditer(prompt)
    )
    rest = re.sub(r"\s{2,}", " ", _TAG.sub("", prompt)).strip()
    return re.sub(r"\s+,", ",", rest).strip(" ,"), choices


def find_adapter(source: str, folders: Sequence[Path]) -> Path:
    """The file of an adapter: a path as it is, otherwise NAME or NAME.safetensors anywhere below `folders`.

    Raises:
        GenerationError: nothing or more than one file of that name.
    """
    direct = Path(source)
    if direct.is_file():
        return direct
    if direct.parent != Path() or direct.is_absolute():
        raise GenerationError(f"{source}: no such file.")
    names = {source, f"{source}.safetensors"}
    places = [folder for folder in folders if folder.is_dir()]
    found = sorted(
        {path.resolve() for folder in places for path in folder.rglob("*.safetensors") if path.name in names}
    )
    if len(found) == 1:
        return found[0]
    where = ", ".join("the current folder" if folder == Path() else str(folder) for folder in folders)
    if not found:
        raise GenerationError(f"No adapter file is called {source!r} in {where}. Give its path.")
    listing = ", ".join(map(str, found))
    raise GenerationError(f"{len(found)} files are called {source!r}: {listing}. Give the path of one.")


def cut_words(prompt: str, tokenizer: Any) -> str:
    """The end of `prompt` that does not fit the text encoder (77 tokens with start and end), or ""."""
    ids = tokenizer(prompt, truncation=False, verbose=False).input_ids
    limit = tokenizer.model_max_length
    # Tokenizers saved without a decoder leave the mark of a word's end in the text.
    return str(tokenizer.decode(ids[limit - 1 : -1])).replace("</w>", " ").strip() if len(ids) > limit else ""
