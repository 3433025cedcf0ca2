"""Which layers of a model get an adapter: presets and patterns, as module paths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from sdlora.errors import ConfigError, NothingToTrainError, Problem
from sdlora.families.base import ModelFamily

__all__ = ["PRESETS", "matches", "target_modules", "target_patterns"]

_CROSS_ATTENTION = ("*.attn2.to_q", "*.attn2.to_k", "*.attn2.to_v", "*.attn2.to_out.0")
_SELF_ATTENTION = ("*.attn1.to_q", "*.attn1.to_k", "*.attn1.to_v", "*.attn1.to_out.0")
_FEED_FORWARD = ("*.ff.net.0.proj", "*.ff.net.2")
_CONVOLUTIONS = (
    "*.resnets.*.conv1",
    "*.resnets.*.conv2",
    "*.resnets.*.conv_shortcut",
    "*.downsamplers.0.conv",
    "*.upsamplers.0.conv",
    "*.proj_in",
    "*.proj_out",
)

PRESETS = {
    "cross-attention": _CROSS_ATTENTION,
    "attention": _CROSS_ATTENTION + _SELF_ATTENTION,
    "attention+ff": _CROSS_ATTENTION + _SELF_ATTENTION + _FEED_FORWARD,
    "attention+ff+conv": _CROSS_ATTENTION + _SELF_ATTENTION + _FEED_FORWARD + _CONVOLUTIONS,
}
"""For every family. The presets of single blocks are the families' own: `ModelFamily.preset_blocks`."""


def target_patterns(targets: str | Sequence[str], family: ModelFamily) -> tuple[str, ...]:
    """The patterns that a preset's name stands for; a list of patterns is itself.

    Raises:
        ConfigError: the preset is made for another family.
    """
    if not isinstance(targets, str):
        return tuple(targets)
    if targets in PRESETS:
        return PRESETS[targets]
    if targets not in family.preset_blocks:
        here = ", ".join([*PRESETS, *family.preset_blocks])
        what = f"{family.title} has no blocks called {targets!r}."
        raise ConfigError("the settings", [Problem("lora.targets", what, f"Take one of {here}, or patterns.")])
    return tuple(block + pattern[1:] for block in family.preset_blocks[targets] for pattern in PRESETS["attention"])


def target_modules(unet: nn.Module, patterns: Sequence[str]) -> tuple[str, ...]:
    """Module paths of the linear and convolution layers that the patterns match, sorted.

    Raises:
        NothingToTrainError: names the patterns that match no layer; each must match one.
    """
    layers = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    found = {pattern: set(matches(pattern, layers)) for pattern in patterns}
    unmatched = [pattern for pattern, names in found.items() if not names]
    if unmatched or not patterns:
        raise NothingToTrainError(unmatched)
    return tuple(sorted(set().union(*found.values())))


def matches(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that the pattern fits: a shell wildcard over the whole path or over its end after a dot."""
    return [name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")]
