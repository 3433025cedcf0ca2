"""LyCORIS' other decompositions (arXiv 2309.14859, section 3) as plain pairs, exactly.

    LoCon, CP   up x mid x down     the middle convolution goes into down
    LoHa        (a1 b1) * (a2 b2)   a product by entries: a pair of rank r^2, whose factors are the row-wise (a) and
                                    column-wise (b) Kronecker products
    LoKr        w1 (x) w2           Kronecker: kron(a1 b1, a2 b2) = kron(a1, a2) kron(b1, b2)
    full        diff                as it is

A change that has no lower rank becomes a pair of which one factor is the identity. Shapes are checked, and the size of
what will come out is known, before a tensor is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sdlora.adapter_file.types import LoraPair

__all__ = ["Plan", "factor_roles", "plan_layer"]

Kind = Literal["LoRA", "LoHa", "LoKr", "full difference"]
Shape = tuple[int, ...]

_MAX_NUMBERS = 2**26
_THREE_BY_THREE = ("conv1", "conv2", "conv_in", "conv_out", ".conv")


def factor_roles(roles: frozenset[str]) -> Kind | None:
    """Which decomposition the tensors called so are; None if one is missing or they belong to several."""
    if {"down", "up"} <= roles <= {"down", "up", "mid"}:
        return "LoRA"
    if {"w1_a", "w1_b", "w2_a", "w2_b"} <= {role.removeprefix("hada_") for role in roles if role.startswith("hada_")}:
        return "LoHa" if len(roles) == 4 or ({"hada_t1", "hada_t2"} <= roles and len(roles) == 6) else None
    if roles and all(role.startswith("lokr_") for role in roles):
        halves = {role.removeprefix("lokr_") for role in roles} - {"t2"}
        first = {role for role in halves if role.startswith("w1")}
        second = halves - first
        is_whole = first in ({"w1"}, {"w1_a", "w1_b"}) and second in ({"w2"}, {"w2_a", "w2_b"})
        return "LoKr" if is_whole and ("lokr_t2" not in roles or second == {"w2_a", "w2_b"}) else None
    return "full difference" if roles == {"diff"} else None


@dataclass(frozen=True)
class Plan:
    """How a layer's tensors become a pair: known from their shapes alone."""

    kind: Kind
    out: int
    inner: int
    """Inputs; of a convolution its input channels."""
    kernel: int
    """1 of a Linear."""
    stored_rank: int | None
    """What alpha is divided by; None where nothing is."""
    rank: int
    """Of the pair that will come out."""

    @property
    def numbers(self) -> int:
        """Of both factors together."""
        return self.rank * (self.out + self.inner * self.kernel**2)

    def build(self, tensors: Mapping[str, Tensor], alpha: float | None) -> LoraPair:
        """The pair; alpha None means a scale of 1. Plain pairs keep their number format, others become fp32."""
        scale = 1.0 if alpha is None or self.stored_rank is None else alpha / self.stored_rank
        if self.kind == "LoRA" and "mid" not in tensors:
            return LoraPair(tensors["down"], tensors["up"], float(self.rank) if alpha is None else alpha)
        down, up = self._factors({role: tensor.float() for role, tensor in tensors.items()})
        shape = (self.inner, self.kernel, self.kernel) if self.kernel > 1 else (self.inner,)
        axes = (1, 1) if self.kernel > 1 else ()
        return LoraPair(
            down=down.reshape(len(down), *shape).contiguous(),
            up=up.reshape(*up.shape, *axes).contiguous(),
            alpha=scale * len(down),
        )

    def _factors(self, t: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """down [rank, inner * k * k] and up [out, rank]."""
        if self.kind == "LoRA":
            down = torch.einsum("mnkl,nj->mjkl", t["mid"], t["down"].flatten(1))
            return down.flatten(1), t["up"].flatten(1)
        if self.kind == "LoHa":
            return self._hadamard(t)
        if self.kind == "LoKr":
            return self._kronecker(t)
        return _whole(t["diff"].flatten(1))

    def _hadamard(self, t: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        if "hada_t1" in t:
            halves = (
                torch.einsum("ijkl,ip,jr->prkl", t[f"hada_t{n}"], t[f"hada_w{n}_a"], t[f"hada_w{n}_b"]) for n in "12"
            )
            return _whole(math.prod(halves, start=torch.ones(())).flatten(1))
        (a1, b1), (a2, b2) = ((t[f"hada_w{n}_a"], t[f"hada_w{n}_b"].flatten(1)) for n in "12")
        if len(b1) * len(b2) >= min(len(a1), b1.shape[1]):
            return _whole((a1 @ b1) * (a2 @ b2))
        up = (a1[:, :, None] * a2[:, None, :]).flatten(1)
        return (b1[:, None, :] * b2[None, :, :]).flatten(0, 1), up

    def _kronecker(self, t: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        if "lokr_w1" in t:
            down1, up1 = _whole(t["lokr_w1"])
        else:
            down1, up1 = t["lokr_w1_b"], t["lokr_w1_a"]
        if "lokr_w2" in t:
            down2, up2 = _whole(t["lokr_w2"].flatten(1))
        elif "lokr_t2" in t:
            down2 = torch.einsum("ijkl,jr->irkl", t["lokr_t2"], t["lokr_w2_b"]).flatten(1)
            up2 = t["lokr_w2_a"].T.contiguous()
        else:
            down2, up2 = t["lokr_w2_b"].flatten(1), t["lokr_w2_a"]
        # A convolution's kernel is the innermost axis of down2, so that the product of the flat matrices is right.
        if len(down1) * len(down2) >= min(self.out, self.inner * self.kernel**2):
            return _whole(torch.kron(up1 @ down1, up2 @ down2))
        return torch.kron(down1, down2), torch.kron(up1, up2)


def plan_layer(kind: Kind, path: str, shapes: Mapping[str, Shape]) -> Plan | None:
    """The plan for tensors of these shapes, by role; None if they do not fit each other or become absurdly large."""
    plan = {"LoRA": _plain, "LoHa": _loha, "LoKr": _lokr, "full difference": _full}[kind](shapes, _kernel(path))
    if plan is None or plan.numbers > _MAX_NUMBERS or plan.out * plan.inner * plan.kernel**2 > _MAX_NUMBERS:
        return None
    return plan


def _plain(s: Mapping[str, Shape], kernel: int) -> Plan | None:
    down, up, mid = s["down"], s["up"], s.get("mid")
    if len(down) == len(up) == 2 and mid is None and down[0] == up[1]:
        return Plan("LoRA", up[0], down[1], 1, down[0], down[0])
    if len(down) != 4 or len(up) != 4 or up[2:] != (1, 1) or down[2] != down[3] or down[2] not in (1, 3):
        return None
    if mid is None:
        return Plan("LoRA", up[0], down[1], down[2], down[0], down[0]) if down[0] == up[1] else None
    fits = len(mid) == 4 and mid[:2] == (up[1], down[0]) and down[2] == 1 and mid[2] == mid[3] and mid[2] in (1, 3)
    return Plan("LoRA", up[0], down[1], mid[2], down[0], up[1]) if fits else None


def _loha(s: Mapping[str, Shape], kernel: int) -> Plan | None:
    a1, b1, a2, b2 = (s[f"hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
    if not all(len(shape) == 2 for shape in (a1, b1, a2, b2)) or b1[1] != b2[1]:
        return None
    if "hada_t1" in s:
        rank, ranks = b1[0], ((b1[0],) * 2, (b2[0],) * 2)
        cores = s["hada_t1"], s["hada_t2"]
        if any(len(t) != 4 or t[:2] != r or t[2:] not in ((1, 1), (3, 3)) for t, r in zip(cores, ranks, strict=True)):
            return None
        if a1[1] != a2[1] or (a1[0], a2[0]) != (b1[0], b2[0]) or cores[0][2:] != cores[1][2:]:
            return None
        return _dense("LoHa", a1[1], b1[1], cores[0][2], rank)
    if a1[0] != a2[0] or (a1[1], a2[1]) != (b1[0], b2[0]) or b1[1] % kernel**2:
        return None
    plan = _dense("LoHa", a1[0], b1[1] // kernel**2, kernel, b1[0])
    return Plan("LoHa", plan.out, plan.inner, kernel, b1[0], min(plan.rank, b1[0] * b2[0]))


def _lokr(s: Mapping[str, Shape], kernel: int) -> Plan | None:
    first = _matrix(s.get("lokr_w1"), s.get("lokr_w1_a"), s.get("lokr_w1_b"), 1)
    core = s.get("lokr_t2")
    second = (
        _matrix(s.get("lokr_w2"), s.get("lokr_w2_a"), s.get("lokr_w2_b"), kernel)
        if core is None
        else _tucker(core, s["lokr_w2_a"], s["lokr_w2_b"])
    )
    if first is None or second is None:
        return None
    stored = s["lokr_w2_b"][0] if "lokr_w2_b" in s else s["lokr_w1_b"][0] if "lokr_w1_b" in s else None
    plan = _dense("LoKr", first[0] * second[0], first[1] * second[1], second[2], stored)
    return Plan("LoKr", plan.out, plan.inner, plan.kernel, stored, min(plan.rank, first[3] * second[3]))


def _full(s: Mapping[str, Shape], kernel: int) -> Plan | None:
    diff = s["diff"]
    if len(diff) == 2:
        return _dense("full difference", diff[0], diff[1], 1, None)
    if len(diff) == 4 and diff[2:] in ((1, 1), (3, 3)):
        return _dense("full difference", diff[0], diff[1], diff[2], None)
    return None


def _matrix(
    whole: Shape | None, left: Shape | None, right: Shape | None, kernel: int
) -> tuple[int, int, int, int] | None:
    """(rows, columns, kernel, rank) of a matrix given whole or as left @ right; kernels may be flat or have axes."""
    if whole is None:
        if left is None or right is None or len(left) != 2 or left[1] != right[0]:
            return None
        found = _matrix((left[0], *right[1:]), None, None, kernel)
        return None if found is None else (*found[:3], left[1])
    if len(whole) == 4 and whole[2:] in ((1, 1), (3, 3)):
        rows, columns, side = whole[0], whole[1], whole[2]
    elif len(whole) == 2 and whole[1] % kernel**2 == 0:
        rows, columns, side = whole[0], whole[1] // kernel**2, kernel
    else:
        return None
    return rows, columns, side, min(rows, columns * side**2)


def _tucker(core: Shape, left: Shape, right: Shape) -> tuple[int, int, int, int] | None:
    if not (len(core) == 4 and len(left) == len(right) == 2 and core[2:] in ((1, 1), (3, 3))):
        return None
    return (left[1], right[1], core[2], core[0]) if core[:2] == (left[0], right[0]) else None


def _dense(kind: Kind, out: int, inner: int, kernel: int, stored_rank: int | None) -> Plan:
    return Plan(kind, out, inner, kernel, stored_rank, min(out, inner * kernel**2))


def _kernel(path: str) -> int:
    """Stable Diffusion's convolutions are 3x3 but for shortcuts and projections; files may store them flat."""
    return 3 if path.endswith(_THREE_BY_THREE) else 1


def _whole(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """down and up of a matrix [rows, columns] as it is, with the smaller identity."""
    rows, columns = matrix.shape
    if rows <= columns:
        return matrix, torch.eye(rows)
    return torch.eye(columns), matrix
