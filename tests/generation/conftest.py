"""One tiny pipeline for the whole folder; tests leave it as it was."""

from __future__ import annotations

import pytest

from tests.tiny import tiny_sd1


@pytest.fixture(scope="package")
def tiny_pipeline():
    return tiny_sd1()
