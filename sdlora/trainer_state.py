"""The state of a run between two steps, as what a checkpoint holds and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sdlora.checkpoint import Checkpoint
from sdlora.errors import CheckpointError
from sdlora.optimizers import AdapterAverage, optimizer_facts, optimizer_tensors, restore_optimizer

__all__ = ["TrainerState", "Trained", "pack_state", "unpack_state"]


@dataclass
class TrainerState:
    """Where a run is: steps made, how many of them were skipped, how many of those just now, the seconds it took.

    `losses` are those since the last progress event; `validations` the held-out loss by step, `own_losses` that on as
    many of the run's own pictures. `converged`: the held-out loss told to stop. `finished`: the result is written.
    `examples_per_step`: over all processes.
    """

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    validations: dict[str, float] = field(default_factory=dict)
    own_losses: dict[str, float] = field(default_factory=dict)
    converged: bool = False
    finished: bool = False
    examples_per_step: int = 0

    @property
    def updates(self) -> int:
        """Steps that changed the weights; the learning rate follows these."""
        return self.step - self.skipped


@dataclass(frozen=True, eq=False)
class Trained:
    """What changes in training: the adapter's weights by name, and what goes with them."""

    named: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    average: AdapterAverage | None


def pack_state(trained: Trained, state: TrainerState, facts: Mapping[str, Any]) -> Checkpoint:
    """Everything, copied to the CPU; `facts` are kept beside it."""
    tensors = {f"lora/{name}": parameter.detach().to("cpu", copy=True) for name, parameter in trained.named.items()}
    optimizer = optimizer_tensors(trained.optimizer, trained.named)
    tensors |= {f"optimizer/{place}": tensor for place, tensor in optimizer.items()}
    if trained.average is not None:
        tensors |= {f"average/{name}": shadow.to("cpu", copy=True) for name, shadow in trained.average.shadow.items()}
    all_facts = {
        **facts,
        "trainer": asdict(state),
        "optimizer": optimizer_facts(trained.optimizer, trained.named),
        "scaler": trained.scaler.state_dict() if trained.scaler is not None else None,
    }
    return Checkpoint(state.step, tensors, all_facts)


@torch.no_grad()
def unpack_state(checkpoint: Checkpoint, trained: Trained) -> TrainerState:
    """Puts everything back; returns where the run is.

    Raises:
        CheckpointError: it is of an adapter with other layers or another rank; nothing was changed.
    """
    kept: dict[str, dict[str, Tensor]] = {"lora": {}, "optimizer": {}, "average": {}}
    for place, tensor in checkpoint.tensors.items():
        kind, _, name = place.partition("/")
        kept[kind][name] = tensor
    shapes = {name: parameter.shape for name, parameter in trained.named.items()}
    if {name: tensor.shape for name, tensor in kept["lora"].items()} != shapes:
        raise CheckpointError("the saved state is of an adapter with other layers or another rank")
    for name, parameter in trained.named.items():
        parameter.copy_(kept["lora"][name])
    restore_optimizer(trained.optimizer, trained.named, kept["optimizer"], checkpoint.facts["optimizer"])
    if trained.average is not None:
        for name, shadow in trained.average.shadow.items():
            shadow.copy_(kept["average"][name])
    if trained.scaler is not None and checkpoint.facts["scaler"] is not None:
        trained.scaler.load_state_dict(checkpoint.facts["scaler"])
    return TrainerState(**checkpoint.facts["trainer"])
