"""Captions, the small BPE vocabulary and the CLIP text encoder of the embedded base."""

from __future__ import annotations

import json
from pathlib import Path

from art import BASE_SETS, HERE, read_subjects
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

VOCABULARY = 1500
WIDTH = 128
START, END = "<|startoftext|>", "<|endoftext|>"


def caption(subject: str, style: str | None) -> str:
    """ "fox, flat style", or the bare subject."""
    return f"{subject}, {style} style" if style else subject


def corpus() -> list[str]:
    words = (HERE / "words.txt").read_text(encoding="utf-8").split()
    subjects = list(read_subjects().values())
    captions = [caption(subject, art_set.style) for subject in subjects for art_set in BASE_SETS]
    return captions + words * 6


def write_tokenizer(folder: Path) -> None:
    """Train the BPE merges and save `folder` as a CLIP tokenizer with 77 positions, lower-casing as CLIP does."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix="", unk_token=END))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern_of_clip(), "removed", invert=True), pre_tokenizers.ByteLevel(False)]
    )
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        show_progress=False,
        special_tokens=[],
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
    tokens = letters + [letter + "</w>" for letter in letters]
    tokens += [token for token in ("".join(merge) for merge in merges) if token not in set(tokens)]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys([*tokens, START, END]))}
    CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,
        model_max_length=77,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        unk_token=END,
    ).save_pretrained(folder)


def pattern_of_clip():
    from tokenizers import Regex

    return Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)
