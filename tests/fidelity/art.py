"""The two styles of the repository, and the eight of tools/embedded_base where `SDLORA_ART` points to them."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

ROOT = Path(__file__).parents[2]
BASE_STYLES = ("noto", "fluent-emoji-flat", "fluent-emoji", "twemoji", "emojione", "emojione-monotone")
FOLDERS = {"blob": "blob-emoji", "contrast": "high-contrast"}
"""Of the two styles in the repository."""
STYLES = (*BASE_STYLES, "noto-v1", "fluent-emoji-high-contrast")

Drawings = list[Image.Image]


def load(folder: str) -> Drawings:
    """In the order of the file names; both datasets show the same subjects in the same order."""
    pictures = []
    for path in sorted((ROOT / "datasets" / folder).glob("*.png")):
        with Image.open(path) as image:
            pictures.append(image.convert("RGB"))
    return pictures


def real_art() -> dict[str, Drawings] | None:
    """Every style's drawings of the subjects that all eight have, in the same order; None where there are none here."""
    folder = os.environ.get("SDLORA_ART")
    if folder is None:
        return None
    art = {}
    for style in STYLES:
        with np.load(Path(folder) / f"{style}.npz") as data:
            art[style] = dict(zip(data["names"].tolist(), data["pixels"], strict=True))
    listing = ROOT / "tools" / "embedded_base" / "subjects.txt"
    known = {line.split(" = ")[0] for line in listing.read_text(encoding="utf-8").splitlines()}
    subjects = sorted(known.intersection(*art.values()))
    return {style: [Image.fromarray(drawings[name]) for name in subjects] for style, drawings in art.items()}


def softened(images: Drawings, sigma: float) -> Drawings:
    """At 128 pixels, blurred as a decoder blurs."""
    return [i.resize((128, 128), Image.Resampling.BOX).filter(ImageFilter.GaussianBlur(sigma)) for i in images]


def recompressed(images: Drawings, quality: int = 90) -> Drawings:
    pictures = []
    for image in images:
        buffer = io.BytesIO()
        image.resize((128, 128), Image.Resampling.BOX).save(buffer, "JPEG", quality=quality)
        pictures.append(Image.open(buffer).convert("RGB"))
    return pictures


def area_under_curve(same: list[float], across: list[float]) -> float:
    """How often a value of `same` is below one of `across`; 0.5 is chance."""
    a, b = np.array(same)[:, None], np.array(across)[None]
    return float(((a < b) + 0.5 * (a == b)).mean())
