"""One thread for all tests: the models are tiny, and threads that wait for each other cost more than they bring.

And a cache of their own: no test reads or fills the user's.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_sd1

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small random Stable Diffusion 1.x."""
    folder = tmp_path_factory.mktemp("models") / "sd1"
    tiny_sd1().save_pretrained(folder)
    return folder
