"""Captions as the U-Net reads them, each computed by itself and once."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import safetensors.torch
import torch

from sdlora.cache import DiskCache, cache_key
from sdlora.errors import NonFiniteError
from sdlora.families import Components, PromptEmbeds, weights_fingerprint
from sdlora.families.base import tokenize
from sdlora.prompts import cut_words

__all__ = ["EMPTY_PROMPT_ROW", "embed_captions"]

logger = logging.getLogger(__name__)

EMPTY_PROMPT_ROW = 0
_VERSION = 1
"""Counted up when the way from a text to its embedding changes."""


def embed_captions(
    components: Components, texts: Iterable[str], cache: DiskCache | None
) -> tuple[dict[str, int], PromptEmbeds]:
    """Row of each text, in the order of rows, and the rows, fp32 on the CPU: the empty prompt, then each other text
    once. Words that do not fit the model are told as a warning.

    Raises:
        NonFiniteError: a text encoder answers with NaN or Inf; says the caption.
    """
    unique = [text for text in dict.fromkeys(texts) if text]
    identity: tuple[object, ...] = ()
    if cache is not None:
        encoders = components.text_encoders
        identity = (_VERSION, components.family.name, encoders[0].device.type, *map(weights_fingerprint, encoders))
    parts = [_checked(components.family.encode_empty_prompt(components), "")]
    for text in unique:
        parts.append(_embed(components, text, cache, identity))
        lost = cut_words(text, components.tokenizers[0])
        if lost:
            logger.warning("A caption is too long for the model; it does not see %r of %r.", lost, text)
    return {"": EMPTY_PROMPT_ROW} | {text: row for row, text in enumerate(unique, 1)}, PromptEmbeds.concat(parts)


def _embed(components: Components, text: str, cache: DiskCache | None, identity: tuple[object, ...]) -> PromptEmbeds:
    """One row. Not several at once: in the last digits a row would depend on its companions, hence on the cache."""
    if cache is None:
        return _checked(components.family.encode_prompts(components, [text]), text)
    # What the encoders see, so that another vocabulary is another entry.
    ids = [tokenize(tokenizer, [text])[0].tolist() for tokenizer in components.tokenizers]
    key = cache_key(*identity, ids)
    found = cache.read("captions", key)
    if found is not None:
        tensors = safetensors.torch.load(found)
        return PromptEmbeds(tensors["hidden"], tensors.get("pooled"))
    embeds = _checked(components.family.encode_prompts(components, [text]), text)
    tensors = {"hidden": embeds.encoder_hidden_states.contiguous()}
    if embeds.pooled_prompt_embeds is not None:
        tensors["pooled"] = embeds.pooled_prompt_embeds.contiguous()
    cache.write("captions", key, safetensors.torch.save(tensors))
    return embeds


def _checked(embeds: PromptEmbeds, text: str) -> PromptEmbeds:
    """fp32 on the CPU, without NaN or Inf."""
    embeds = embeds.to("cpu", torch.float32)
    if not embeds.is_finite():
        raise NonFiniteError(f"The text encoder answers with NaN or Inf for the caption {text!r}.")
    return embeds
