"""What a prompt and a `--lora` argument say: adapter tags taken out, words beyond the text encoder's limit named."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlora.errors import GenerationError

__all__ = ["AdapterChoice", "cut_words", "find_adapter", "parse_adapter_argument", "split_adapter_tags"]

_TAG = re.compile(r"<lora:([^:<>]+)(?::([^<>]*))?>")


@dataclass(frozen=True)
class AdapterChoice:
    """An adapter as the user named it (a path, or a bare name) and its weight; 1.0 is as trained."""

    source: str
    weight: float = 1.0


def _weight(text: str, whole: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        raise GenerationError(f"{whole!r}: the weight {text!r} is not a number. Write for example :0.8.") from None
    if not math.isfinite(weight):
        raise GenerationError(f"{whole!r}: the weight must be finite. Write for example :0.8.")
    return weight


def parse_adapter_argument(text: str) -> AdapterChoice:
    """`ink.safetensors:0.8`, `ink.safetensors` or `C:\\art\\ink.safetensors:0.8`.

    Raises:
        GenerationError: the weight is not a finite number.
    """
    source, colon, tail = text.rpartition(":")
    if not colon or "/" in tail or "\\" in tail or tail.endswith(".safetensors"):
        return AdapterChoice(text)
    return AdapterChoice(source, _weight(tail, text))


def split_adapter_tags(prompt: str) -> tuple[str, tuple[AdapterChoice, ...]]:
    """The prompt without its `<lora:name:weight>` tags, and the adapters they ask for.

    Raises:
        GenerationError: a tag's weight is not a finite number.
    """
    choices = tuple(
        AdapterChoice(match[1].strip(), _weight(match[2], match[0]) if match[2] is not None else 1.0)
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
    where = ", ".join(map(str, folders))
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
