"""Prompts with choices in them: `{ink|chalk} drawing of a __animal__`.

`{a|b}` takes one of its parts, which may nest; `__name__` takes a line of NAME.txt. The choice follows from the seed
and the prompt's number, so that the same command draws the same pictures. Loads no model library.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

from sdlora.errors import GenerationError

__all__ = ["expand_prompt", "read_prompts"]

_INNERMOST = re.compile(r"\{([^{}]*)\}")
_FILE = re.compile(r"__([A-Za-z0-9][A-Za-z0-9_/-]*?)__")
_MAX_CHOICES = 1000


def expand_prompt(prompt: str, *, seed: int, number: int, folder: Path) -> str:
    """The prompt with every choice taken; `folder` is where the files of `__name__` are.

    Raises:
        GenerationError: a file is not there or has no lines, a brace is open, or the choices never end.
    """
    # Not for secrets: the same choice every time is the purpose.
    chooser = random.Random(f"{seed} {number}")  # noqa: S311
    text = prompt
    for _ in range(_MAX_CHOICES):
        braces, file = _INNERMOST.search(text), _FILE.search(text)
        if braces is not None:
            text = f"{text[: braces.start()]}{chooser.choice(braces[1].split('|')).strip()}{text[braces.end() :]}"
        elif file is not None:
            line = chooser.choice(_lines(folder, file[1]))
            text = f"{text[: file.start()]}{line}{text[file.end() :]}"
        elif "{" in text or "}" in text:
            raise GenerationError(f"{prompt!r}: a brace is open. Write {{this|that}}.")
        else:
            return text
    raise GenerationError(f"{prompt!r}: its choices never end; does a wildcard file name itself?")


def read_prompts(text: str) -> list[str]:
    """One prompt a line; empty lines and lines that begin with # are left out.

    Raises:
        GenerationError: there is none.
    """
    lines = (line.strip() for line in text.removeprefix("\ufeff").splitlines())
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise GenerationError("There is no prompt: every line is empty or a comment.")
    return prompts


def _lines(folder: Path, name: str) -> list[str]:
    path = folder / f"{name}.txt"
    if ".." in Path(name).parts or not path.is_file():
        raise GenerationError(f"__{name}__: there is no {path}. Put one choice a line into it.")
    try:
        return read_prompts(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise GenerationError(f"{path} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    except GenerationError:
        raise GenerationError(f"{path} has no lines. Put one choice a line into it.") from None
