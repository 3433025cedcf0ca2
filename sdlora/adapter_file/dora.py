"""DoRA (arXiv 2402.09353): a change of direction by a low-rank pair, and a length for each row or column.

    W' = m * (W + scale * up @ down) / |W + scale * up @ down|

m is learnt. LyCORIS and PEFT take lengths over a row (m is [out, 1]); kohya's first version and OneTrainer over a
column (m is [1, in]). What changes depends on the base's own W, so that a plain pair comes out only beside a model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdlora.adapter_file.types import LoraPair

__all__ = ["without_dora"]


def without_dora(pair: LoraPair, weight: Tensor) -> LoraPair:
    """The plain pair that does the same to `weight` [out, in(, k, k)]; of full rank, fp32 on the CPU."""
    assert pair.dora_scale is not None
    base = weight.detach().to("cpu", torch.float32)
    change = (pair.up.flatten(1).float() @ pair.down.flatten(1).float()) * pair.scale
    turned = base + change.view_as(base)
    is_by_row = pair.dora_scale.shape[1] == 1
    axis = 0 if is_by_row else 1
    lengths = turned.transpose(0, axis).flatten(1).norm(dim=1)
    sides = [1] * base.ndim
    sides[axis] = -1
    delta = turned * (pair.dora_scale.float().flatten() / lengths.clamp_min(1e-12)).view(sides) - base
    return _as_pair(delta)


def _as_pair(delta: Tensor) -> LoraPair:
    rows, columns = delta.shape[0], delta[0].numel()
    axes = (1, 1) if delta.ndim == 4 else ()
    if rows <= columns:
        return LoraPair(down=delta, up=torch.eye(rows).view(rows, rows, *axes), alpha=float(rows))
    down = torch.eye(columns).view(columns, *delta.shape[1:])
    return LoraPair(down=down, up=delta.reshape(rows, columns, *axes), alpha=float(columns))
