"""Tests that need the simulated GPU; ``tests/test_simulated_gpu.py`` runs them in a process of its own."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(scope="session", autouse=True)
def simulated():
    if "simulated_gpu" not in sys.modules:
        pytest.skip("tests/test_simulated_gpu.py runs it on the simulated GPU")
    return sys.modules["simulated_gpu"]
