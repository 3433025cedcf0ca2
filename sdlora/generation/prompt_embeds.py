"""Prompts as the U-Net reads them: words of different weight, and texts longer than the 77 tokens of a text encoder.

A long text is encoded in chunks of 75 tokens, each between its own start and end, and their hidden states stand one
after the other. A weight w moves a token's hidden state z away from that of an empty prompt at the same place, e:
e + w (z - e). That is what compel does for weights above 1; it needs no rescaling afterwards and so leaves the other
tokens and the other prompts of a batch as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdlora.emphasis import WeightedText, parse_emphasis
from sdlora.errors import GenerationError
from sdlora.families import detect_family

__all__ = ["PromptEncoder"]

# A chunk that would end in the middle of a phrase ends at a comma instead, if there is one among its last 20 tokens.
_COMMA_REACH = 20


@dataclass(frozen=True)
class _Chunk:
    """What one pass of a text encoder reads: token ids with start, end and padding, and the weight of each."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]


class PromptEncoder:
    """Encodes with the pipeline's text encoders. A short prompt without weights comes out as diffusers encodes it.

    Args:
        pipeline: StableDiffusionPipeline or StableDiffusionXLPipeline.
        weighted: whether brackets are weights and long prompts are read to their end; else the text is taken as it is
            and cut at 77 tokens.
        clip_skip: which hidden state from the end is read (1 is the last); None is the model's own choice.

    Raises:
        GenerationError: the text encoder has not that many layers.
    """

    def __init__(self, pipeline: Any, *, weighted: bool = True, clip_skip: int | None = None):
        self._pipeline, self._weighted = pipeline, weighted
        self._family = detect_family(pipeline.unet.config)
        self._from_end = clip_skip or self._family.hidden_state_from_end
        pairs = [(f"tokenizer{n}", f"text_encoder{n}") for n in ("", "_2")]
        self._encoders = [
            (getattr(pipeline, tokenizer), getattr(pipeline, encoder))
            for tokenizer, encoder in pairs
            if getattr(pipeline, encoder, None) is not None
        ]
        fewest = min(encoder.config.num_hidden_layers for _, encoder in self._encoders)
        if self._from_end > fewest:
            raise GenerationError(f"Clip skip {clip_skip}: the text encoder has {fewest} layers. Use 1 or 2.")

    def num_chunks(self, text: str) -> int:
        """How many passes of the text encoder a text takes."""
        return len(self._chunks(self._encoders[0][0], text))

    @torch.inference_mode()
    def arguments(self, prompts: Sequence[str], negative_prompt: str, *, guided: bool) -> dict[str, Tensor | None]:
        """What a pipeline's call takes instead of texts: [B, n * 77, D] and, of SDXL, [B, 1280], for both branches.

        Row n of every pass of a text encoder belongs to prompt n.
        """
        texts = [*prompts, negative_prompt] if guided else list(prompts)
        num_chunks = max(self.num_chunks(text) for text in texts)
        embeds, pooled = self._encode(prompts, num_chunks)
        arguments = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
        if guided:
            if not negative_prompt and self._pipeline.config.get("force_zeros_for_empty_prompt", False):
                without, without_pooled = torch.zeros_like(embeds), None if pooled is None else torch.zeros_like(pooled)
            else:
                without, without_pooled = self._encode([negative_prompt] * len(prompts), num_chunks)
            arguments |= {"negative_prompt_embeds": without, "negative_pooled_prompt_embeds": without_pooled}
        return {name: value for name, value in arguments.items() if value is not None}

    def _encode(self, texts: Sequence[str], num_chunks: int) -> tuple[Tensor, Tensor | None]:
        states, pooled = [], None
        for tokenizer, encoder in self._encoders:
            empty = _chunk(tokenizer, [])
            rows = [self._chunks(tokenizer, text) for text in texts]
            rows = [[*row, *[empty] * (num_chunks - len(row))] for row in rows]
            passes = [self._pass(encoder, [row[index] for row in rows]) for index in range(num_chunks)]
            hidden = torch.cat([state for state, _ in passes], dim=1)
            # The pooled embedding speaks for the whole text; that of the first chunk stands for it, as in A1111.
            pooled = passes[0][1]
            weights = torch.tensor([[w for chunk in row for w in chunk.weights] for row in rows], device=hidden.device)
            if (weights != 1).any():
                without, _ = self._pass(encoder, [empty] * len(rows))
                hidden = _emphasised(hidden, without.repeat(1, num_chunks, 1), weights)
            states.append(hidden)
        return torch.cat(states, dim=-1), pooled

    def _pass(self, encoder: Any, chunks: Sequence[_Chunk]) -> tuple[Tensor, Tensor | None]:
        """Hidden states [B, 77, D] and, if the encoder has one, the pooled projection [B, D]."""
        ids = torch.tensor([chunk.ids for chunk in chunks], device=self._pipeline._execution_device)
        normed = self._family.hidden_state_normed
        if normed and self._from_end == 1:
            return encoder(ids).last_hidden_state, None
        output = encoder(ids, output_hidden_states=True)
        hidden = output.hidden_states[-self._from_end]
        if normed:
            hidden = getattr(encoder, "text_model", encoder).final_layer_norm(hidden)
        return hidden, output[0] if output[0].ndim == 2 else None

    def _chunks(self, tokenizer: Any, text: str) -> list[_Chunk]:
        parts = parse_emphasis(text) if self._weighted else (WeightedText(text),)
        tokens = [(token, part.weight) for part in parts for token in self._tokens(tokenizer, part.text)]
        size = tokenizer.model_max_length - 2
        if not self._weighted:
            return [_chunk(tokenizer, tokens[:size])]
        comma = tokenizer.convert_tokens_to_ids(",</w>")
        return [_chunk(tokenizer, part) for part in _cut(tokens, size, comma)]

    def _tokens(self, tokenizer: Any, text: str) -> list[int]:
        if hasattr(self._pipeline, "maybe_convert_prompt"):
            # A learned word of several vectors (textual inversion) stands as several tokens.
            text = self._pipeline.maybe_convert_prompt(text, tokenizer)
        ids: list[int] = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
        return ids


def _cut(tokens: list[tuple[int, float]], size: int, comma: int) -> Iterator[list[tuple[int, float]]]:
    """The tokens in chunks of at most `size`; at least one chunk."""
    while len(tokens) > size:
        commas = (n for n in range(size, size - _COMMA_REACH, -1) if tokens[n - 1][0] == comma)
        end = next(commas, size)
        yield tokens[:end]
        tokens = tokens[end:]
    yield tokens


def _chunk(tokenizer: Any, tokens: Sequence[tuple[int, float]]) -> _Chunk:
    num_pads = tokenizer.model_max_length - 2 - len(tokens)
    ids = (tokenizer.bos_token_id, *(id for id, _ in tokens), tokenizer.eos_token_id)
    weights = (1.0, *(weight for _, weight in tokens), 1.0)
    return _Chunk((*ids, *[tokenizer.pad_token_id] * num_pads), (*weights, *[1.0] * num_pads))


def _emphasised(hidden: Tensor, empty: Tensor, weights: Tensor) -> Tensor:
    """[B, T, D]; tokens of weight 1 keep every bit."""
    factors = weights[:, :, None]
    moved = empty.float() + factors * (hidden.float() - empty.float())
    return torch.where(factors == 1, hidden, moved.to(hidden.dtype))
