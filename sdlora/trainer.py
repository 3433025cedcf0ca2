"""The one training loop. It yields what happened; it does not print or draw, and it saves by itself.

A save is copied between two steps and written beside the next ones.

Everything that a run needs to go on is in `TrainerState`, the adapter, the optimizer and the gradient scaler: all
random choices follow from the seed and the step. Those are what a checkpoint holds, and from one a trainer goes on
exactly.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdlora.adapter_file import PARTS, AdapterMetadata, LoraPair, Part, read_adapter, write_adapter
from sdlora.background import Background
from sdlora.batches import Batch, ExposureOrder, micro_batches
from sdlora.checkpoint import Checkpoint, write_checkpoint
from sdlora.config import TrainConfig
from sdlora.errors import AdapterError, CheckpointError, ModelError, NonFiniteError
from sdlora.events import CheckpointSaved, Event, PreviewReady, RunFinished, StepDone, ValidationDone
from sdlora.families.base import Components, PromptEmbeds, embed_texts
from sdlora.length import LengthPlan, plan_length
from sdlora.lora import LiveAdapter, RankMask, base_models, plan_adapter
from sdlora.objective import (
    add_noise,
    diffusion_loss,
    loss_weights,
    prediction_target,
    signal_to_noise,
    to_prediction_type,
)
from sdlora.optimizers import (
    AdapterAverage,
    averaged_weights,
    build_optimizer,
    can_guard_itself,
    learning_rate_at,
    limit_norms,
)
from sdlora.passes import ForwardPass, StepNumbers, StepRead, read_steps
from sdlora.precision import DTYPES, Precision
from sdlora.prepare import TrainingSet
from sdlora.preview_requests import Previews
from sdlora.prior import base_alone
from sdlora.processes import ALONE, Processes
from sdlora.randomness import counter_seed
from sdlora.run_dir import RunDir
from sdlora.run_metadata import run_metadata
from sdlora.schedule_free import AdamWScheduleFree
from sdlora.stopping import best_save, copying, has_learnt
from sdlora.trainer_state import Trained, TrainerState, pack_state, unpack_state
from sdlora.unet_modes import enter_modes, leave_modes

__all__ = ["Trainer"]

_MAX_SKIPPED_IN_A_ROW = 20
_COUNTERS_APART = 1_000_000
_STATE_SECONDS = 300.0
"""A state is saved at least this often, so that a power cut costs minutes and not the hours between two saves."""


class Trainer:
    """Trains one LoRA; `run` once.

    The U-Net gets its LoRA here and is given back without it when `run` ends, however it ends: the base's weights are
    never changed. `previews` are asked for when the file of a save is written. With a `checkpoint` the run goes on
    after its step, as if it had never stopped; `facts` are put into every checkpoint written. With a `validation_set`
    the loss on it, always with the same noise, is measured before the first step and at every save, and the adapter of
    the save it speaks for becomes the result. The images of a `prior_set` are learnt beside the others, as many in each
    step, in an order of their own. Several `processes` share the steps of one run: each has a trainer of the
    same arguments, the first one saves, validates and has `previews`.
    """

    def __init__(
        self,
        *,
        config: TrainConfig,
        components: Components,
        training_set: TrainingSet,
        run_dir: RunDir,
        precision: Precision,
        previews: Previews | None = None,
        validation_set: TrainingSet | None = None,
        prior_set: TrainingSet | None = None,
        checkpoint: Checkpoint | None = None,
        facts: Mapping[str, Any] | None = None,
        processes: Processes = ALONE,
    ):
        """
        Raises:
            ModelError: the base predicts something that adapter files have no word for.
            ConfigError: the targets are not for this base.
            NothingToTrainError: a target matches no layer.
            CheckpointError: the checkpoint belongs to another adapter.
        """
        if components.prediction_type not in ("epsilon", "v_prediction"):
            raise ModelError(f"{components.source} predicts {components.prediction_type!r}, which is not supported.")
        self._config, self._components, self._training_set = config, components, training_set
        self._run_dir, self._precision, self._previews = run_dir, precision, previews
        self._validation_set, self._prior_set, self._processes = validation_set, prior_set, processes
        self._examples_per_step = _examples_per_step(config, checkpoint, processes)
        self._unet, self._device = components.unet, components.unet.device
        self._prediction_type = to_prediction_type(components.prediction_type)
        self._alphas_cumprod: Tensor = components.noise_scheduler.alphas_cumprod.to(self._device, torch.float32)
        self._entries = training_set.entries
        self._order = self._order_of(training_set, config.train.seed)
        self._prior_seed = counter_seed(config.train.seed, "prior")
        self._prior_order = self._order_of(prior_set, self._prior_seed) if prior_set is not None else None
        self.plan: LengthPlan = plan_length(len(self._entries), config, examples_per_step=self._examples_per_step)
        self.finished: RunFinished | None = None
        self._facts = {**(facts or {}), "num_steps": self.plan.steps}
        self._stop_requested = self._stops_together = self._in_update = False
        self._unseen: list[StepNumbers] = []
        self._bad: Tensor | None = None
        self._started = self._saved_at = time.perf_counter()
        self._saver = Background("sdlora-save")
        self._saving: CheckpointSaved | None = None
        self.adapter_plan = plan_adapter(components, config.lora)
        self._adapter = LiveAdapter(
            base_models(components), self.adapter_plan, dropout=config.lora.dropout, seed=config.train.seed
        )
        self._named = self._adapter.named
        self._rank_mask = self._build_rank_mask()
        self._parameters = list(self._named.values())
        self._optimizer = build_optimizer(self._named, config, fused=self._device.type == "cuda")
        self._average = AdapterAverage(self._named, config.optimizer.ema_decay) if config.optimizer.ema_decay else None
        self._scaler = precision.grad_scaler()
        enter_modes(self._unet, config.model)
        self._trained = Trained(self._named, self._optimizer, self._scaler, self._average)
        self.state = self._restore(checkpoint) if checkpoint is not None else TrainerState()
        self.state.examples_per_step = self._examples_per_step
        self._guards_itself = (
            can_guard_itself(self._optimizer)
            and self._scaler is None
            and self._average is None
            and not config.optimizer.max_norm
            and processes.is_alone
        )

    def request_stop(self) -> None:
        """Asks the run to end after the step it is in, saved and finished in order. Safe in a signal handler."""
        self._stop_requested = True

    def run(self) -> Generator[Event, None, None]:
        """Trains, saves, and yields each event; ends with RunFinished.

        A keyboard interrupt or `request_stop` ends it early but in order; an interrupt after such a request leaves at
        once, with what was saved last. If the caller closes it, or an error ends it, what was learnt so far is saved
        too; `finished` then holds the event that could not be yielded.

        Raises:
            NonFiniteError: the loss or a gradient is NaN or Inf; raised before it reaches the weights.
            AdapterFileError: the adapter cannot be written.
            CheckpointError: the state cannot be written.
        """
        self._started = time.perf_counter() - self.state.seconds
        self._adapter.train()
        try:
            try:
                yield from self._steps()
            except KeyboardInterrupt:
                # In the middle of an update some weights are of this step and some of the one before.
                if self._stop_requested or self._in_update:
                    raise
                self._stop_requested = True
            except BaseException as error:
                self._save_after(error)
                raise
            self.finished = self._finish()
        finally:
            self.detach()
            self._saver.close()
        yield from self._saved()
        if self._previews is not None and not self.finished.stopped_early:
            yield from _told(self._previews.finish(lambda: self._stop_requested))
        yield self.finished

    def detach(self) -> None:
        """Gives the base back as it was. `run` does it by itself; for a run that never begins."""
        leave_modes(self._unet, self._config.model)
        self._adapter.train(False)
        self._adapter.detach()

    @property
    def _is_done(self) -> bool:
        return self.state.step >= self.plan.steps or self.state.converged

    def _order_of(self, images: TrainingSet, seed: int) -> ExposureOrder:
        sizes = [images.examples[index].target_hw for index in images.entries]
        return ExposureOrder(sizes, group_size=self._examples_per_step, seed=seed)

    def _steps(self) -> Iterator[Event]:
        self._rehearse()
        if self.state.step == 0:
            yield from self._validate()
        begun = self.state.step
        last_time, last_step = time.perf_counter(), begun
        while not self._is_done and not self._stops:
            learning_rate = self._set_learning_rate()
            grad_norm = self._step()
            step, losses = self.state.step, self.state.losses
            if step == begun + 1:
                # Only now is it to be seen which memory the run leaves free.
                self._request_missing()
            if step % self._config.train.log_every == 0 or step == self.plan.steps:
                now = time.perf_counter()
                yield StepDone(
                    step=step,
                    num_steps=self.plan.steps,
                    loss=sum(losses) / len(losses),
                    learning_rate=learning_rate,
                    grad_norm=grad_norm,
                    seconds=now - self._started,
                    images_per_second=(step - last_step) * self._examples_per_step / max(now - last_time, 1e-9),
                    skipped=self.state.skipped,
                )
                self.state.losses = []
                last_step, last_time = step, time.perf_counter()
            if step in self.plan.save_steps:
                yield from self._validate_and_save(step)
                last_time = time.perf_counter()
            elif time.perf_counter() - self._saved_at > _STATE_SECONDS:
                self._begin_save()
            elif not self._saver.is_busy:
                yield from self._saved()
            if self._previews is not None:
                yield from _told(self._previews.ready())
        self._look()
        yield from self._saved()

    @property
    def _stops(self) -> bool:
        """Processes that work together only stop after a step in which all have heard of it."""
        return self._stop_requested if self._processes.is_alone else self._stops_together

    def _rehearse(self) -> None:
        """One pass at the largest size, thrown away, so that too little memory shows now and not after an hour."""
        sizes = [example.target_hw for example in self._training_set.examples]
        if len(set(sizes)) == 1:
            return
        largest = max(range(len(sizes)), key=lambda index: sizes[index][0] * sizes[index][1])
        # Negative numbers belong to no step.
        for batch in self._batches([(-1 - n, largest) for n in range(self._config.train.batch_size)]):
            torch.autograd.backward(self._losses(batch, dropout_counters=(-1, 0)).sum())
        self._optimizer.zero_grad(set_to_none=True)

    def _step(self) -> float | None:
        """One optimizer step, its mean loss kept in the state; the gradient's norm, or None if it was skipped or not
        looked at yet."""
        first, count = self.state.step * self._examples_per_step, self._examples_per_step
        exposures = [(n, self._entries[self._order.entry(n)]) for n in range(first, first + count)]
        self._optimizer.zero_grad(set_to_none=True)
        passes = [
            self._pass(number, batch) for number, batch in enumerate(self._batches(self._processes.part(exposures)))
        ]
        passes += [self._prior_pass(number, batch) for number, batch in enumerate(self._prior_batches(first))]
        shared = self._exchange(passes)
        if self._scaler is not None:
            self._scaler.unscale_(self._optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._config.train.max_grad_norm)
        self._unseen.append(StepNumbers(self.state.step + 1, tuple(passes), norm))
        if self._may_look_later:
            self._update_unseen()
            return None
        return self._update(shared)

    def _pass(self, number: int, batch: Batch) -> ForwardPass:
        """Forward and backward of one batch; its gradients are added to those of the step."""
        # The first process counts as if it were alone.
        counters = (self.state.step, number + _COUNTERS_APART * self._processes.rank)
        losses = self._losses(batch, dropout_counters=counters)
        share = losses.sum() / self._examples_per_step
        torch.autograd.backward(self._scaler.scale(share) if self._scaler else share)
        if batch.prior is not None:
            self._keep(self._drift(batch.prior, dropout_counters=self._prior_counters(number)))
        return ForwardPass(losses.detach(), share.detach(), batch.names, batch.timesteps)

    def _prior_pass(self, number: int, batch: Batch) -> ForwardPass:
        """The same for images that are learnt besides; their loss is looked at, but not told."""
        losses = self._losses(batch, dropout_counters=self._prior_counters(number))
        self._keep(losses)
        return ForwardPass(losses.detach(), torch.zeros((), device=self._device), batch.names, batch.timesteps)

    def _prior_counters(self, number: int) -> tuple[int, int]:
        """Those of dropout; other passes have none below 0."""
        return self.state.step, -1 - number - _COUNTERS_APART * self._processes.rank

    def _exchange(self, passes: Sequence[ForwardPass]) -> Tensor | None:
        """Adds up gradients over the processes; the sums of loss, stop requests and losses that are not finite."""
        if self._processes.is_alone:
            return None
        bad = sum(~one.losses.isfinite().all() for one in passes)
        numbers = [sum(one.share for one in passes), self._stop_requested, bad]
        told = torch.stack([torch.as_tensor(number, dtype=torch.float32, device=self._device) for number in numbers])
        return self._processes.sum_gradients(self._parameters, told)

    def _batches(
        self,
        exposures: list[tuple[int, int]],
        images: TrainingSet | None = None,
        *,
        seed: int | None = None,
        fixed: bool = False,
    ) -> Iterator[Batch]:
        """Of the training images by the run's seed; or, `fixed`, without dropped captions and offset noise."""
        train = self._config.train
        return micro_batches(
            self._training_set if images is None else images,
            exposures,
            family=self._components.family,
            batch_size=train.batch_size,
            seed=train.seed if seed is None else seed,
            num_train_timesteps=len(self._alphas_cumprod),
            caption_dropout=0.0 if fixed else self._config.data.caption_dropout,
            noise_offset=0.0 if fixed else train.noise_offset,
            device=self._device,
            **({} if fixed else {"objective": self._config.objective}),
        )

    def _prior_batches(self, first: int) -> Iterator[Batch]:
        """Of the images that are learnt besides, for the exposures of one step from `first` on."""
        if self._prior_set is None or self._prior_order is None:
            return
        entries, numbers = self._prior_set.entries, range(first, first + self._examples_per_step)
        exposures = [(number, entries[self._prior_order.entry(number)]) for number in numbers]
        yield from self._batches(self._processes.part(exposures), self._prior_set, seed=self._prior_seed)

    def _drift(self, prior: Batch, *, dropout_counters: tuple[int, int]) -> Tensor:
        """How far the adapter moves the answers from those of the base alone, as a weighted loss of each example."""
        target = self._predict_as_base(prior)
        with self._seeded_dropout(dropout_counters):
            model_pred = self._predict(prior)
        return self._weighted(model_pred, target, prior)

    def _keep(self, losses: Tensor) -> None:
        """Adds the gradient of what is kept of the base to that of the step."""
        share = self._config.prior.weight * losses.sum() / self._examples_per_step
        torch.autograd.backward(self._scaler.scale(share) if self._scaler else share)

    def _losses(self, batch: Batch, *, dropout_counters: tuple[int, int]) -> Tensor:
        """The weighted loss of each example, fp32 [b]."""
        with self._seeded_dropout(dropout_counters):
            model_pred = self._predict(batch)
        target = prediction_target(
            self._prediction_type, batch.latents, batch.noise, self._alphas_cumprod, batch.timesteps
        )
        return self._weighted(model_pred, target, batch)

    def _predict(self, batch: Batch) -> Tensor:
        """The answers with the adapter."""
        if self._rank_mask is not None:
            self._rank_mask.timesteps = batch.timesteps
        with self._precision.autocast():
            return self._answer(batch, *self._conditions(batch))

    def _predict_as_base(self, batch: Batch) -> Tensor:
        """The answers without it, without gradient, to the captions as the encoders read them before it."""
        with base_alone(self._unet), torch.no_grad(), self._precision.autocast():
            return self._answer(batch, batch.embeds, batch.added_cond_kwargs)

    def _answer(self, batch: Batch, embeds: PromptEmbeds, added_cond_kwargs: dict[str, Tensor] | None) -> Tensor:
        noisy_latents = add_noise(batch.latents, batch.input_noise, self._alphas_cumprod, batch.timesteps)
        predicted: Tensor = self._unet(
            noisy_latents, batch.timesteps, embeds.encoder_hidden_states, added_cond_kwargs=added_cond_kwargs
        ).sample
        return predicted

    def _weighted(self, model_pred: Tensor, target: Tensor, batch: Batch) -> Tensor:
        snr = signal_to_noise(self._alphas_cumprod, batch.timesteps)
        objective = self._config.objective
        weights = loss_weights(objective.weighting, self._prediction_type, snr, self._config.train.snr_gamma)
        return diffusion_loss(
            model_pred,
            target,
            weights * batch.weights,
            kind=objective.loss,
            delta=objective.huber_delta,
            mask=batch.loss_mask,
        )

    def _build_rank_mask(self) -> RankMask | None:
        min_rank = self._config.lora.timestep_min_rank
        if min_rank is None:
            return None
        return RankMask(self._adapter.downs("unet"), min_rank=min_rank, num_train_timesteps=len(self._alphas_cumprod))

    def _conditions(self, batch: Batch) -> tuple[PromptEmbeds, dict[str, Tensor] | None]:
        """What the captions tell the U-Net: as prepared, or by encoders that change from step to step."""
        if not self.adapter_plan.adapts_text:
            return batch.embeds, batch.added_cond_kwargs
        embeds = embed_texts(self._components, batch.texts)
        return embeds, self._components.family.added_cond_kwargs(embeds, *batch.sizes_hw)

    def _seeded_dropout(self, counters: tuple[int, int]) -> AbstractContextManager[None]:
        if not self._config.lora.dropout:
            return nullcontext()
        return _seeded_global(counter_seed(self._config.train.seed, "lora-dropout", *counters), self._device)

    @property
    def _may_look_later(self) -> bool:
        """Whether the numbers of the coming step can stay on the device: only where it keeps bad ones off the weights
        by itself, and nobody asks for them yet."""
        step = self.state.step + 1
        asked = step % self._config.train.log_every == 0 or step == self.plan.steps or step in self.plan.save_steps
        return self._guards_itself and not asked

    def _update_unseen(self) -> None:
        """Applies the gradients; the optimizer leaves the weights alone after the first number that is not finite."""
        bad = self._unseen[-1].is_bad
        self._bad = bad if self._bad is None else torch.maximum(self._bad, bad)
        self._optimizer.found_inf = self._bad  # type: ignore[attr-defined]
        self._in_update = True
        self._optimizer.step()
        self.state.step += 1
        self._in_update = False

    def _look(self) -> StepRead | None:
        """Fetches the numbers of all steps since the last look, and returns the last one's.

        Raises:
            NonFiniteError: a loss is not finite; the weights are those of the step before it.
        """
        unseen, self._unseen, self._bad = self._unseen, [], None
        last = None
        for last in read_steps(unseen):
            if self._guards_itself and (last.bad or not math.isfinite(last.grad_norm)):
                self.state.step = last.step - 1
            last.require_finite()
            if self._scaler is None and self._processes.is_alone:
                self._require_finite_gradient(last)
            self.state.losses.append(last.loss)
        return last

    def _require_finite_gradient(self, read: StepRead) -> None:
        if not math.isfinite(read.grad_norm):
            raise NonFiniteError(
                f"Step {read.step}: the gradient is NaN or Inf. The weights of the step before are kept. "
                "Lower train.learning_rate."
            )

    def _update(self, shared: Tensor | None) -> float | None:
        """Looks at the step and applies its gradients; their norm before clipping, or None if they overflowed fp16 and
        were dropped."""
        read = self._look()
        assert read is not None
        if shared is not None:
            self._take_shared(shared)
            if self._scaler is None:
                self._require_finite_gradient(read)
        applied = math.isfinite(read.grad_norm)
        self._in_update = True
        if applied:
            self._optimizer.step()
        if self._scaler is not None:
            # Lowers the scale after an overflow, which `unscale_` has noted.
            self._scaler.update()
        self.state.step += 1
        self.state.skipped += not applied
        if applied:
            self._after_update()
        self.state.skipped_in_a_row = 0 if applied else self.state.skipped_in_a_row + 1
        self._in_update = False
        if self.state.skipped_in_a_row == _MAX_SKIPPED_IN_A_ROW:
            raise NonFiniteError(
                f"Step {self.state.step}: the gradients overflowed fp16 {_MAX_SKIPPED_IN_A_ROW} times in a row. "
                "Lower train.learning_rate, or use --precision bf16 or fp32."
            )
        return read.grad_norm if applied else None

    def _take_shared(self, shared: Tensor) -> None:
        """The step's loss over all processes; they stop together, for a signal as for a loss that is not finite."""
        loss, stops, bad = shared.tolist()
        if bad:
            raise NonFiniteError(f"Step {self.state.step + 1}: the loss is NaN or Inf in another process.")
        self.state.losses[-1] = loss
        self._stops_together = stops > 0

    def _after_update(self) -> None:
        if self._config.optimizer.max_norm:
            limit_norms(self._named, self._adapter.scales, self._config.optimizer.max_norm)
        if self._average is not None:
            self._average.update(self.state.updates)

    def _set_learning_rate(self) -> float:
        learning_rate = learning_rate_at(
            self.state.updates,
            peak=self._config.train.learning_rate,
            warmup_steps=self.plan.warmup_steps,
            num_steps=self.plan.steps,
            schedule="constant" if isinstance(self._optimizer, AdamWScheduleFree) else self._config.optimizer.schedule,
            restarts=self._config.optimizer.restarts,
        )
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        return learning_rate

    def _validate_and_save(self, step: int) -> Iterator[Event]:
        yield from self._validate()
        # The last one is the result itself, unless an earlier one may become that or pictures are drawn with it.
        if step < self.plan.steps or self._validation_set is not None or self._previews is not None:
            yield from self._saved()
            self._begin_save(self._run_dir.checkpoint_adapter_path(step))

    def _validate(self) -> Iterator[Event]:
        """The loss on the held-out images and on as many of the others, with noise that never changes."""
        if self._validation_set is None:
            return
        count = self._config.validation.timesteps
        held_out = trained_on = 0.0
        if self._processes.is_main:
            self._adapter.train(False)
            with self._as_saved(), torch.no_grad():
                held_out = self._fixed_loss(self._validation_set, count)
                trained_on = self._fixed_loss(self._training_set, count)
            self._adapter.train()
        # Rounding may differ between devices, and all must agree when to stop.
        held_out, trained_on = self._processes.from_main((held_out, trained_on))
        state, settings = self.state, self._config.validation
        state.validations[str(state.step)], state.own_losses[str(state.step)] = held_out, trained_on
        state.converged = has_learnt(
            list(state.validations.values()),
            rule=settings.stop,
            after=settings.stop_after,
            tolerance=settings.tolerance,
        )
        copied = None
        if "0" in state.own_losses and state.step > 0:
            copied = copying(
                own_before=state.own_losses["0"],
                own_now=trained_on,
                held_out_before=state.validations["0"],
                held_out_now=held_out,
            )
        yield ValidationDone(step=state.step, held_out_loss=held_out, training_loss=trained_on, copying=copied)

    def _fixed_loss(self, images: TrainingSet, count: int) -> float:
        assert self._validation_set is not None
        every = max(1, len(images.examples) // len(self._validation_set.examples))
        chosen = list(range(0, len(images.examples), every))[: len(self._validation_set.examples)]
        # All timesteps of an image stand together, and neighbours are far apart on the schedule.
        exposures = [(n, chosen[n // count]) for n in range(count * len(chosen))]
        batches = self._batches(exposures, images, seed=counter_seed(self._config.train.seed, "validation"), fixed=True)
        total = sum(float(self._losses(batch, dropout_counters=(-2, 0)).sum()) for batch in batches)
        return total / len(exposures)

    def _best_step(self) -> int | None:
        """The save that the held-out loss speaks for; None without a validation set."""
        saved = {int(step): loss for step, loss in self.state.validations.items() if int(step) > 0}
        return best_save(saved, tolerance=self._config.validation.tolerance)

    def _finish(self) -> RunFinished:
        self._saver.wait()
        path, best = self._run_dir.adapter_path, self._best_step()
        keeps_best = best is not None and best < self.state.step and self._config.validation.keep_best
        if best is not None and keeps_best and self._is_done and self._processes.is_main:
            kept = read_adapter(self._run_dir.checkpoint_adapter_path(best))
            self._writer(path, {part: kept.part(part) for part in PARTS}, step=best)()
        elif self._processes.is_main:
            self._writer(path)()
        self.state.finished = self._is_done
        self._begin_save()
        self._saver.wait()
        return RunFinished(
            step=self.state.step,
            path=str(path),
            seconds=time.perf_counter() - self._started,
            stopped_early=not self._is_done,
            best_step=best,
            converged=self.state.converged,
        )

    def _save_after(self, error: BaseException) -> None:
        if self.state.step == 0 or self._in_update or not self._processes.is_main:
            return
        try:
            self._look()
            # What the disk did not take then, it is asked to take once more.
            with suppress(AdapterError, CheckpointError):
                self._saver.wait()
            self.finished = self._finish()
            error.add_note(f"The adapter after step {self.state.step} is saved: {self.finished.path}")
        except (AdapterError, CheckpointError, NonFiniteError) as second:
            error.add_note(f"What was learnt could not be saved either: {second}")

    def _begin_save(self, path: Path | None = None) -> None:
        """Copies the state, and the adapter if a `path` is given for it, and writes them while the next steps are made.

        Waits for the save before, if that is not done yet.
        """
        self._look()
        if not self._processes.is_main:
            self._saved_at = time.perf_counter()
            return
        self._saver.wait()
        self.state.seconds = time.perf_counter() - self._started
        write_state = partial(
            write_checkpoint, self._run_dir.state_dir, pack_state(self._trained, self.state, self._facts)
        )
        write_file = self._writer(path) if path is not None else None

        def write() -> None:
            # In this order: where there is a state, there are all adapters of before.
            if write_file is not None:
                write_file()
            write_state()

        self._saver.start(write)
        if path is not None:
            self._saving = CheckpointSaved(step=self.state.step, path=str(path))
        self._saved_at = time.perf_counter()

    def _saved(self) -> Iterator[Event]:
        """Waits for the save that is being written, and tells of it.

        Raises:
            AdapterFileError, CheckpointError: it cannot be written.
        """
        self._saver.wait()
        saved, self._saving = self._saving, None
        if saved is not None:
            yield saved
            if self._previews is not None and not self._stop_requested:
                self._previews.request(saved.step, Path(saved.path))

    def _request_missing(self) -> None:
        """Asks for the previews of earlier saves that the run was stopped before."""
        if self._previews is None:
            return
        for step in self._run_dir.undrawn_steps(len(self._config.preview.prompts)):
            if step < self.state.step:
                self._previews.request(step, self._run_dir.checkpoint_adapter_path(step))

    def _restore(self, checkpoint: Checkpoint) -> TrainerState:
        try:
            state = unpack_state(checkpoint, self._trained)
            state.finished, state.converged = False, state.converged and self._config.validation.stop != "never"
            return state
        except CheckpointError as error:
            self.detach()
            raise CheckpointError(f"{self._run_dir.root}: {error}. Start a new run with `sdlora train`.") from error

    def _as_saved(self) -> AbstractContextManager[None]:
        """The adapter as its file holds it: its average where one is kept."""
        if isinstance(self._optimizer, AdamWScheduleFree):
            return averaged_weights(self._optimizer, self._named)
        return self._average.in_place() if self._average is not None else nullcontext()

    def _writer(
        self, path: Path, pairs: Mapping[Part, Mapping[str, LoraPair]] | None = None, *, step: int | None = None
    ) -> Callable[[], Path]:
        """What writes the adapter as it is now, or the given one of an earlier step, whatever becomes of it."""
        if pairs is None:
            with self._as_saved():
                pairs = self._adapter.pairs()
        path.parent.mkdir(parents=True, exist_ok=True)
        return partial(
            write_adapter,
            path,
            pairs.get("unet", {}),
            text_encoder=pairs.get("text_encoder"),
            text_encoder_2=pairs.get("text_encoder_2"),
            family=self._components.family.name,
            metadata=self._metadata(path.stem, self.state.step if step is None else step),
            dtype=DTYPES[self._config.output.dtype],
        )

    def _metadata(self, title: str, step: int) -> AdapterMetadata:
        texts = self._training_set.texts
        return run_metadata(
            self._config,
            title=title,
            step=step,
            plan=self.plan,
            num_images=len(self._training_set.examples),
            resolution=self._training_set.resolution,
            prediction_type=self._prediction_type,
            precision=self._precision.name,
            base_fingerprint=self._facts.get("base"),
            training_alpha=self.adapter_plan.alpha,
            captions=[texts[example.caption_rows[0]] for example in self._training_set.examples],
        )


def _examples_per_step(config: TrainConfig, checkpoint: Checkpoint | None, processes: Processes) -> int:
    """Those that the run was begun with, however many processes share them now."""
    given = config.train.batch_size * config.train.gradient_accumulation
    begun = checkpoint.facts["trainer"].get("examples_per_step", given) if checkpoint is not None else 0
    return int(begun or given * processes.count)


def _told(pictures: Iterable[tuple[int, Path]]) -> Iterator[Event]:
    for step, path in pictures:
        yield PreviewReady(step=step, path=str(path))


@contextmanager
def _seeded_global(seed: int, device: torch.device) -> Iterator[None]:
    """Sets the global generators for a while and puts them back: dropout layers take no generator."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
