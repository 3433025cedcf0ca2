"""Do the style distances measure style? Area under the curve on real drawings, for docs/FIDELITY.md.

    python benchmarks/style_gate.py WORK/art       # the folder that tools/embedded_base/art.py wrote

A pair of sets of the same style and other subjects should be nearer than a pair of the same subjects in another style.
AUC is how often it is, over all such pairs: 0.5 is chance, 1 always.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from sdlora.fidelity import MEASURES, StyleFeatures, style_features
from sdlora.fidelity.distance import SCALES

TRIALS, SEED = 6, 0


def auc(same: list[float], across: list[float]) -> float:
    a, b = np.array(same)[:, None], np.array(across)[None]
    return float(((a < b) + 0.5 * (a == b)).mean())


def distance(a: StyleFeatures, b: StyleFeatures) -> dict[str, float]:
    parts = {name: float((getattr(a, name) - getattr(b, name)).abs().mean()) for name in MEASURES}
    return {**parts, "together": float(np.mean([parts[name] / SCALES[name] for name in MEASURES]))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("art", type=Path)
    parser.add_argument("--size", type=int, default=40, help="pictures in a set")
    args = parser.parse_args()
    art = {}
    for path in sorted(args.art.glob("*.npz")):
        data = np.load(path)
        art[path.stem] = {name: row for row, name in zip(data["pixels"], data["names"].tolist(), strict=True)}
    listing = Path(__file__).parents[1] / "tools" / "embedded_base" / "subjects.txt"
    known = {line.split(" = ")[0] for line in listing.read_text(encoding="utf-8").splitlines()}
    common = sorted(known.intersection(*art.values()))
    rng = np.random.default_rng(SEED)
    same: dict[str, list[float]] = {name: [] for name in (*MEASURES, "together")}
    across: dict[str, list[float]] = {name: [] for name in same}
    for _ in range(TRIALS):
        order = list(rng.permutation(common))
        halves = (order[: args.size], order[args.size : 2 * args.size])
        sets = {
            (style, half): style_features([Image.fromarray(pictures[name]) for name in names])
            for style, pictures in art.items()
            for half, names in enumerate(halves)
        }
        for style in art:
            for other in art:
                kept, other_half = (same, 1) if other == style else (across, 0)
                for name, value in distance(sets[style, 0], sets[other, other_half]).items():
                    kept[name].append(value)
    print(f"{len(art)} styles, sets of {args.size}, {len(same['palette'])} pairs same, {len(across['palette'])} across")
    for name in same:
        print(f"{name}: AUC {auc(same[name], across[name]):.3f}")


if __name__ == "__main__":
    main()
