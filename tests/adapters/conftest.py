"""Fresh tiny pipelines; a test may change them."""

from __future__ import annotations

import pytest

from tests.tiny import tiny_sd1, tiny_sd2, tiny_sdxl


@pytest.fixture
def sd1():
    return tiny_sd1()


@pytest.fixture
def sd2():
    return tiny_sd2()


@pytest.fixture
def sdxl():
    return tiny_sdxl()
