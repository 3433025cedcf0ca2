"""CLIP's tokenizer, which every Stable Diffusion uses and single-file checkpoints do not carry.

merges.txt.gz: the 48894 byte-pair merges of OpenAI's CLIP (MIT), the most frequent first.
"""

from __future__ import annotations

import gzip
from functools import cache
from pathlib import Path

from transformers import CLIPTokenizer

__all__ = ["clip_tokenizer"]

_START, _END = "<|startoftext|>", "<|endoftext|>"


@cache
def _merges() -> tuple[tuple[str, str], ...]:
    text = gzip.decompress((Path(__file__).parent / "merges.txt.gz").read_bytes()).decode("utf-8")
    pairs = (line.split(" ") for line in text.splitlines())
    return tuple((left, right) for left, right in pairs)


def clip_tokenizer(*, for_open_clip: bool = False) -> CLIPTokenizer:
    """49408 tokens, 77 positions; OpenAI's encoder is padded with the end token, OpenCLIP's with "!", the number 0."""
    letters = _byte_letters()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in _merges()), _START, _END]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=list(_merges()),
        model_max_length=77,
        bos_token=_START,
        eos_token=_END,
        pad_token="!" if for_open_clip else _END,
        unk_token=_END,
    )


def _byte_letters() -> list[str]:
    """The printable stand-ins of the 256 bytes: those that are printable by themselves first, then the others."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [*map(chr, plain), *(chr(256 + n) for n in range(256 - len(plain)))]
