"""What adapters of one stack do to each other, against dense changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sdlora.adapter_file import AdapterWeights, LoraPair
from sdlora.adapter_weight import AdapterWeight, parse_weight
from sdlora.errors import AdapterError
from sdlora.interference import report_stack

DOWN = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
UP = "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"


def pair(seed: int, rank: int = 3) -> LoraPair:
    generator = torch.Generator().manual_seed(seed)
    return LoraPair(torch.randn(rank, 8, generator=generator), torch.randn(6, rank, generator=generator), 2.0)


def adapter(name: str, **pairs: LoraPair) -> AdapterWeights:
    return AdapterWeights({{"down": DOWN, "up": UP}[place]: pair for place, pair in pairs.items()}, path=Path(name))


def dense(pair: LoraPair) -> torch.Tensor:
    return (pair.scale * pair.up @ pair.down).double()


INK = adapter("ink", down=pair(1), up=pair(2, rank=5))
BLOB = adapter("blob", down=pair(3), up=pair(4))
AGAINST = adapter("against", down=LoraPair(pair(1).down, -2 * pair(1).up, 2.0))


def test_norms_cosines_and_shares_are_those_of_the_dense_changes() -> None:
    report = report_stack({"ink": (INK, AdapterWeight(0.5)), "blob": (BLOB, AdapterWeight(-1.5))})
    changes = {place: (0.5 * dense(INK.unet[place]), -1.5 * dense(BLOB.unet[place])) for place in (DOWN, UP)}
    energy = {place: (float((a * a).sum()), float((b * b).sum())) for place, (a, b) in changes.items()}
    inner = {place: float((a * b).sum()) for place, (a, b) in changes.items()}
    total = [sum(e[i] for e in energy.values()) for i in (0, 1)]
    assert report.norms == pytest.approx({"ink": total[0] ** 0.5, "blob": total[1] ** 0.5})
    assert report.shares["IN01"]["ink"] == pytest.approx(energy[DOWN][0] / sum(energy[DOWN]))
    assert report.shares["OUT03"]["blob"] == pytest.approx(energy[UP][1] / sum(energy[UP]))
    (meeting,) = report.meetings
    assert meeting.cosine == pytest.approx(sum(inner.values()) / (total[0] * total[1]) ** 0.5)
    assert meeting.weight == pytest.approx(2 * sum(inner.values()) / sum(total))
    assert {m.place: m.cosine for m in report.layers} == pytest.approx(
        {f"unet.{place}": inner[place] / (energy[place][0] * energy[place][1]) ** 0.5 for place in (DOWN, UP)}
    )


def test_two_that_fight_are_named_with_the_layer() -> None:
    report = report_stack({name: (a, AdapterWeight()) for name, a in (("ink", INK), ("x", BLOB), ("no", AGAINST))})
    worst = report.layers[0]
    assert (worst.place, worst.first, worst.second) == (f"unet.{DOWN}", "ink", "no")
    assert worst.cosine == pytest.approx(-1.0) and worst.weight < 0


def test_balanced_weights_make_the_norms_equal_and_keep_the_energy() -> None:
    weights = {"ink": AdapterWeight(0.5), "blob": AdapterWeight(-1.5)}
    before = report_stack({"ink": (INK, weights["ink"]), "blob": (BLOB, weights["blob"])})
    after = report_stack({n: (a, AdapterWeight(before.balanced[n])) for n, a in (("ink", INK), ("blob", BLOB))})
    assert after.norms["ink"] == pytest.approx(after.norms["blob"])
    assert sum(n**2 for n in after.norms.values()) == pytest.approx(sum(n**2 for n in before.norms.values()))
    assert before.balanced["blob"] < 0 < before.balanced["ink"]


def test_strength_is_that_of_the_summed_change_beside_the_base() -> None:
    report = report_stack(
        {"ink": (INK, AdapterWeight()), "no": (AGAINST, AdapterWeight(0.5))},
        lambda part, path: {DOWN: 2.0, UP: 3.0}[path],
    )
    assert report.strengths == pytest.approx({"IN01": 0.0, "OUT03": float(dense(INK.unet[UP]).norm()) / 3}, abs=1e-6)
    with pytest.raises(AdapterError, match="The base has no layer unet"):
        report_stack({"ink": (INK, AdapterWeight())}, lambda part, path: None)


def test_block_weights_count_and_nothing_to_compare_is_told() -> None:
    report = report_stack({"ink": (INK, parse_weight("1:lbw=OUTALL")), "blob": (BLOB, AdapterWeight())})
    assert report.shares["IN01"] == {"ink": 0.0, "blob": 1.0}
    with pytest.raises(AdapterError, match="nothing to compare"):
        report_stack({"ink": (INK, AdapterWeight(0.0))})


def test_adapters_of_other_shapes_are_refused() -> None:
    wide = adapter("wide", down=LoraPair(torch.randn(2, 16), torch.randn(6, 2), 2.0))
    with pytest.raises(AdapterError, match="made for other models"):
        report_stack({"ink": (INK, AdapterWeight()), "wide": (wide, AdapterWeight())})
