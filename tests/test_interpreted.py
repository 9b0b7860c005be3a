"""Runs tests/interpreted with Triton's interpreter, in a process of its own.

Triton reads TRITON_INTERPRET when a kernel is defined, so one process cannot both interpret and compile.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy
import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")


def version(module) -> tuple[int, ...]:
    return tuple(int(part) for part in module.__version__.split(".")[:2])


@pytest.mark.skipif(
    version(triton) < (3, 7) and version(numpy) >= (2, 4), reason="the interpreter of triton 3.6 needs numpy < 2.4"
)
def test_kernels_under_the_interpreter(root):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    # Options of the outer run (coverage, selections, a debugger) are not meant for the inner one.
    environment.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", "tests/interpreted"]
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    output = run.stdout + run.stderr
    assert run.returncode == 0, output
    assert " passed" in output and "skipped" not in output, output
