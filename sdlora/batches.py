"""Which images a step sees, in what order and with what noise: all from the seed and the number of the exposure.

An exposure is one showing of one image; exposures are numbered through the whole run. What belongs to a number does
not depend on how steps are cut into batches, so that a run can stop and go on, or be cut otherwise, and be the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from sdlora.config import ObjectiveConfig
from sdlora.families.base import ModelFamily, PromptEmbeds
from sdlora.objective import multires_noise, offset_noise
from sdlora.prepare import EMPTY_PROMPT_ROW, PreparedExample, TrainingSet, View
from sdlora.randomness import counter_generator, counter_uniform, spread_timesteps

__all__ = ["Batch", "ExposureOrder", "micro_batches"]

_PLAIN = ObjectiveConfig()
_Choice = TypeVar("_Choice")


@dataclass(frozen=True, eq=False)
class Batch:
    """What one forward pass takes; b examples of one size, on the device."""

    latents: Tensor
    """Clean, fp32 [b, 4, h, w]."""
    noise: Tensor
    """fp32 [b, 4, h, w]; the target is made of it."""
    input_noise: Tensor
    """What the noisy latents are made of: the noise itself, unless the input is perturbed."""
    timesteps: Tensor
    """int64 [b]."""
    embeds: PromptEmbeds
    added_cond_kwargs: dict[str, Tensor] | None
    weights: Tensor
    """fp32 [b], how much each example counts."""
    loss_mask: Tensor | None
    """fp32 [b, 1, h, w] in 0..1, how much each place counts; None: all the same."""
    names: tuple[str, ...]
    """File names, for messages."""
    texts: tuple[str, ...]
    """The captions as they are shown; "" where one is dropped."""
    sizes_hw: tuple[list[tuple[int, int]], ...]
    """What `ModelFamily.added_cond_kwargs` takes: original sizes, crops' top left corners, sizes as trained."""
    prior: Batch | None = None
    """The same noisy latents with the prompts to which the base's answers are kept."""


class ExposureOrder:
    """The order of the entries: every epoch shows each once, shuffled anew.

    Entries of one size stand together in groups of `group_size` as far as they go, so that a step mostly needs one
    forward pass; what is left over stands at the epoch's end. Nothing is dropped and nothing shown twice.
    """

    def __init__(self, sizes: Sequence[Hashable], *, group_size: int, seed: int):
        self._sizes, self._group_size, self._seed = tuple(sizes), group_size, seed
        self._epoch: tuple[int, list[int]] = (-1, [])

    def entry(self, exposure: int) -> int:
        """The entry that this exposure shows."""
        epoch, position = divmod(exposure, len(self._sizes))
        if epoch != self._epoch[0]:
            self._epoch = (epoch, self.epoch(epoch))
        return self._epoch[1][position]

    def epoch(self, number: int) -> list[int]:
        """All entries in this epoch's order."""
        groups: list[list[int]] = []
        open_groups: dict[Hashable, list[int]] = defaultdict(list)
        for entry in self._shuffled(len(self._sizes), "order", number):
            group = open_groups[self._sizes[entry]]
            group.append(entry)
            if len(group) == self._group_size:
                groups.append(open_groups.pop(self._sizes[entry]))
        full = [groups[index] for index in self._shuffled(len(groups), "group-order", number)]
        return [entry for group in (*full, *open_groups.values()) for entry in group]

    def _shuffled(self, count: int, purpose: str, epoch: int) -> list[int]:
        permutation: list[int] = torch.randperm(count, generator=counter_generator(self._seed, purpose, epoch)).tolist()
        return permutation


def micro_batches(
    training_set: TrainingSet,
    exposures: Sequence[tuple[int, int]],
    *,
    family: ModelFamily,
    batch_size: int,
    seed: int,
    num_train_timesteps: int,
    caption_dropout: float,
    noise_offset: float,
    device: torch.device,
    objective: ObjectiveConfig = _PLAIN,
) -> Iterator[Batch]:
    """The batches of one step: (exposure number, example index) pairs, split by size, at most `batch_size` each."""
    by_size: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for exposure, index in exposures:
        by_size[training_set.examples[index].target_hw].append((exposure, index))
    for members in by_size.values():
        for start in range(0, len(members), batch_size):
            part = members[start : start + batch_size]
            numbers = [exposure for exposure, _ in part]
            examples = [training_set.examples[index] for _, index in part]
            views = _views(examples, numbers, seed)
            timesteps = spread_timesteps(
                torch.tensor(numbers),
                seed=seed,
                num_train_timesteps=num_train_timesteps,
                span=objective.timestep_range,
                bias=objective.timestep_bias,
            )
            noise = _noise(examples, numbers, seed, noise_offset, objective.multires_discount)
            input_noise = _perturbed(noise, numbers, seed, objective.input_perturbation)
            rows = _caption_rows(examples, numbers, seed, caption_dropout)
            embeds = training_set.captions.select(rows).to(device)
            sizes_hw = (
                [example.original_hw for example in examples],
                [view.crop_top_left_yx for view in views],
                [example.target_hw for example in examples],
            )
            batch = Batch(
                latents=_latents(views, numbers, seed).to(device),
                noise=noise.to(device),
                input_noise=input_noise.to(device),
                timesteps=timesteps.to(device),
                embeds=embeds,
                added_cond_kwargs=family.added_cond_kwargs(embeds, *sizes_hw),
                weights=torch.tensor([example.weight for example in examples]).to(device),
                loss_mask=_loss_mask(views, device),
                names=tuple(example.name for example in examples),
                texts=tuple(training_set.texts[row] for row in rows),
                sizes_hw=sizes_hw,
            )
            if examples[0].prior_rows:
                rows = [_one_of(e.prior_rows, seed, "prior", n) for e, n in zip(examples, numbers, strict=True)]
                embeds = training_set.captions.select(rows).to(device)
                added = family.added_cond_kwargs(embeds, *sizes_hw)
                texts = tuple(training_set.texts[row] for row in rows)
                prior = replace(batch, embeds=embeds, added_cond_kwargs=added, texts=texts, loss_mask=None)
                batch = replace(batch, prior=prior)
            yield batch


def _views(examples: Sequence[PreparedExample], numbers: Sequence[int], seed: int) -> list[View]:
    shown = []
    for example, number in zip(examples, numbers, strict=True):
        mirrored = example.mirrored_views and counter_uniform(seed, "flip", number) < 0.5
        shown.append(_one_of(example.mirrored_views if mirrored else example.views, seed, "view", number))
    return shown


def _one_of(choices: Sequence[_Choice], seed: int, purpose: str, number: int) -> _Choice:
    if len(choices) == 1:
        return choices[0]
    return choices[int(counter_uniform(seed, purpose, number) * len(choices))]


def _latents(views: Sequence[View], numbers: Sequence[int], seed: int) -> Tensor:
    generators = [counter_generator(seed, "latents", number) for number in numbers]
    return torch.stack([view.latents.sample(generator) for view, generator in zip(views, generators, strict=True)])


def _loss_mask(views: Sequence[View], device: torch.device) -> Tensor | None:
    masks = [view.loss_mask for view in views]
    if all(mask is None for mask in masks):
        return None
    everywhere = torch.ones(1, *views[0].latents.mean.shape[1:])
    return torch.stack([everywhere if mask is None else mask for mask in masks]).to(device)


def _noise(
    examples: Sequence[PreparedExample], numbers: Sequence[int], seed: int, offset: float, multires_discount: float
) -> Tensor:
    shape = examples[0].latent_shape
    noise = _normal(shape, numbers, seed, "noise")
    if offset:
        noise = offset_noise(noise, _normal(shape[:1], numbers, seed, "noise-offset"), offset)
    if multires_discount:
        noise = multires_noise(noise, _coarse_noise(shape, numbers, seed), multires_discount)
    return noise


def _coarse_noise(shape: torch.Size, numbers: Sequence[int], seed: int) -> list[Tensor]:
    """Normal numbers on ever coarser grids, down to one a channel."""
    channels, height, width = shape
    levels = []
    while height > 1 or width > 1:
        height, width = max(1, height // 2), max(1, width // 2)
        levels.append(_normal((channels, height, width), numbers, seed, f"coarse-noise-{height}x{width}"))
    return levels


def _perturbed(noise: Tensor, numbers: Sequence[int], seed: int, strength: float) -> Tensor:
    if not strength:
        return noise
    return noise + strength * _normal(noise.shape[1:], numbers, seed, "input-perturbation")


def _normal(shape: Sequence[int], numbers: Sequence[int], seed: int, purpose: str) -> Tensor:
    """Standard normal [len(numbers), *shape], each row from its exposure's own generator."""
    return torch.stack([torch.randn(*shape, generator=counter_generator(seed, purpose, number)) for number in numbers])


def _caption_rows(
    examples: Sequence[PreparedExample], numbers: Sequence[int], seed: int, caption_dropout: float
) -> list[int]:
    return [
        EMPTY_PROMPT_ROW
        if counter_uniform(seed, "caption-dropout", number) < caption_dropout
        else _one_of(example.caption_rows, seed, "caption", number)
        for example, number in zip(examples, numbers, strict=True)
    ]
