"""The tests of a GPU, the Triton kernels and the report, on a simulated GPU (tests/simulated_gpu).

What a real GPU would refuse (operands of two devices, tensors on the wrong one) is refused there, so that the code for
GPUs runs on machines without one; ``tests/distributed`` and ``tests/ray`` have it for several. Speed, Triton's compiler
and NCCL itself are not simulated: ``tests/test_gpu.py`` and ``benchmarks/gpu_report.py`` on a real GPU are for that.
"""

from __future__ import annotations

import json

import pytest

PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header")


def test_the_device_itself(on_simulated_gpus):
    output = on_simulated_gpus(*PYTEST, "tests/simulated_gpu/test_device.py", "tests/simulated_gpu/test_waits.py")
    assert " passed" in output and "skipped" not in output


def test_the_tests_of_a_gpu(on_simulated_gpus):
    """All but two: the one that takes 10 GB, and the one about Triton's kernels not waiting (torch's row passes do)."""
    rest = "not int32 and not no_call_waits and not float32]"
    output = on_simulated_gpus(*PYTEST, "tests/test_gpu.py", "-k", rest)
    assert " passed" in output and "skipped" not in output


def test_packed_attention_takes_flash_attention(on_simulated_gpus):
    output = on_simulated_gpus(*PYTEST, "tests/test_attention.py", "-k", "flash_attention_equals")
    assert " passed" in output and "skipped" not in output


def test_triton_kernels_on_its_tensors(on_simulated_gpus):
    pytest.importorskip("triton")
    output = on_simulated_gpus(*PYTEST, "tests/simulated_gpu/test_triton_kernels.py", TRITON_INTERPRET="1")
    assert " passed" in output and "skipped" not in output


def test_the_report_runs(on_simulated_gpus, tmp_path):
    parts = ("memory", "step")
    on_simulated_gpus("benchmarks/gpu_report.py", "--out", tmp_path, "--small", "--rounds", "1", "--part", *parts)
    for part in parts:
        found = json.loads((tmp_path / "parts" / f"{part}.json").read_text())
        assert found["status"] == "done" and "simulated GPU" in found["hardware"], found
    longest = json.loads((tmp_path / "parts" / "step.json").read_text())["tables"]["step_longest"]["rows"]
    assert len(longest) == 3
    for row in longest:
        assert row["tried"] == 512 and row["peak GB"] == pytest.approx(row["predicted GB"], rel=0.02)
