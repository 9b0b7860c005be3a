"""Tests of Triton kernels under the interpreter: they need TRITON_INTERPRET=1 before any kernel is defined.

``tests/test_interpreted.py`` runs this folder in a process of its own; in any other run its tests are skipped.
"""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def interpreted() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("tests/test_interpreted.py runs it with TRITON_INTERPRET=1")
