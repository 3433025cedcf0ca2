"""Loss curves that a refactor may not move: small models of each family, the numbers of the day they were noted.

The tolerance is for other versions of PyTorch and other processors; a change of the training moves them by far more.
Rewritten, if a change is meant, by: python -m tests.training.test_golden
"""

from __future__ import annotations

import json
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest

from sdlora.events import StepDone
from tests.training.helpers import TINY, make_trainer

GOLDEN = Path(__file__).parent / "golden_curves.json"
TOLERANCE = 2e-4


def curve(family: str, folder: Path) -> list[float]:
    """Six steps with a bit of everything that moves by counters."""
    train = {"exposures": 3, "batch_size": 2, "learning_rate": 5e-3, "noise_offset": 0.02, "seed": 5}
    settings = {"lora": {"rank": 4, "targets": "attention"}, "data": {"path": "pictures", "caption_dropout": 0.3}}
    events = make_trainer(folder, family=family, train=train, **settings).run()
    return [event.loss for event in events if isinstance(event, StepDone)]


@pytest.mark.parametrize("family", TINY)
def test_the_curve_is_the_golden_one(family: str, tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))[family]
    found = curve(family, tmp_path)
    assert found == pytest.approx(golden, rel=TOLERANCE)
    # The tolerance is far below what moves from step to step, so that a mix-up cannot hide in it.
    assert min(abs(a - b) for a, b in pairwise(golden)) > 10 * TOLERANCE * max(golden)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        curves = {family: curve(family, Path(place) / family) for family in TINY}
    GOLDEN.write_text(json.dumps(curves, indent=1) + "\n", encoding="utf-8")
