"""The single-GPU tests, the sharded workers, the report and the loop, on simulated GPUs (tests/simulated_gpu).

What a real GPU would refuse (operands of two devices, tensors on the wrong one) is refused there, so that the code for
GPUs is run on machines without one. Speed, Triton's compiler and NCCL itself are not: ``tests/test_gpu.py`` and
``benchmarks/gpu_report.py`` on a real one are for that.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "simulated_gpu"


@pytest.fixture(scope="module")
def run(root):
    """run(program, argument…, VARIABLE=value…): a Python program on simulated GPUs, to its end; what it printed."""
    sys.path.insert(0, str(HERE))
    import simulated_gpu

    sys.path.remove(str(HERE))
    if reason := simulated_gpu.why_not():
        pytest.skip(f"no simulated GPU: {reason}")
    simulated_gpu.build()

    def start(*command: str | Path, timeout: float = 900, **variables: str) -> str:
        paths = [str(HERE), str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"} | variables
        for name in ("PYTEST_ADDOPTS", "TRITON_INTERPRET", "FASTKD_TEST_DEVICE"):
            environment.pop(name, None) if name not in variables else None
        done = subprocess.run(
            [sys.executable, *map(str, command)], cwd=root, env=environment, capture_output=True, text=True,
            timeout=timeout,
        )  # fmt: skip
        output = done.stdout + done.stderr
        assert done.returncode == 0, output[-12_000:]
        return output

    return start


PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header")


def test_the_device_itself(run):
    output = run(*PYTEST, "tests/simulated_gpu/test_device.py")
    assert " passed" in output and "skipped" not in output


def test_the_tests_of_a_gpu(run):
    """All but two: the one that takes 10 GB, and the one about Triton's kernels not waiting (torch's row passes do)."""
    output = run(*PYTEST, "tests/test_gpu.py", "-k", "not int32 and not no_call_waits and not float32]")
    assert " passed" in output and "skipped" not in output


def test_triton_kernels_on_its_tensors(run):
    pytest.importorskip("triton")
    output = run(*PYTEST, "tests/simulated_gpu/test_triton_kernels.py", TRITON_INTERPRET="1")
    assert " passed" in output and "skipped" not in output


def test_two_ranks_train_on_two(run, tmp_path, tiny_qwen3):
    """Tensor, context and data parallel, offloaded, in float32 and bfloat16, against one process on the CPU."""
    for name, seed in (("student", 0), ("teacher", 1)):
        tiny_qwen3(tied=name == "student", seed=seed, num_hidden_layers=1).save_pretrained(tmp_path / name)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    output = run(*torchrun, "tests/distributed/student_worker.py", tmp_path, FASTKD_TEST_DEVICE="cuda")
    assert output.count("largest relative error") == 10 and "'cpu_offload': True" in output


def test_the_report_runs(run, tmp_path):
    parts = ("memory", "step", "loop")
    run("benchmarks/gpu_report.py", "--out", tmp_path, "--small", "--rounds", "1", "--part", *parts)
    for part in parts:
        found = json.loads((tmp_path / "parts" / f"{part}.json").read_text())
        assert found["status"] == "done" and "simulated GPU" in found["hardware"], found
