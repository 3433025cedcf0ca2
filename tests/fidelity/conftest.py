from __future__ import annotations

import pytest

from sdlora.fidelity import StyleFeatures, style_features
from tests.fidelity.art import FOLDERS, load


@pytest.fixture(scope="session")
def each() -> dict[str, list[StyleFeatures]]:
    """Of each style's 80 drawings, the same subjects in the same order, the features of every single one."""
    pictures = {style: [*load(folder), *load(f"{folder}/heldout")] for style, folder in FOLDERS.items()}
    return {style: [style_features([image]) for image in images] for style, images in pictures.items()}
