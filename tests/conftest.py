"""One thread for all tests: the models are tiny, and threads that wait for each other cost more than they bring.

And a cache of their own: no test reads or fills the user's.
"""

from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
