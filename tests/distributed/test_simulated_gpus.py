"""The sharded workers on simulated GPUs, one for each rank, against one process on the CPU."""

from __future__ import annotations

from pathlib import Path

WORKER = Path(__file__).with_name("student_worker.py")


def test_two_ranks_train_on_two(on_simulated_gpus, tmp_path, tiny_qwen3):
    """Tensor, context and data parallel, in float32 and bfloat16, and with parameters and gradients on the host."""
    for name, seed in (("student", 0), ("teacher", 1)):
        tiny_qwen3(tied=name == "student", seed=seed, num_hidden_layers=1).save_pretrained(tmp_path / name)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    output = on_simulated_gpus(*torchrun, WORKER, tmp_path, FASTKD_TEST_DEVICE="cuda")
    assert output.count("largest relative error") == 10 and "'cpu_offload': True" in output
