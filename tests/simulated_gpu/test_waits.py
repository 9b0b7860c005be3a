"""How often the workers wait for the device: what lies between two waits, a GPU does without a gap."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from worker_inputs import VALID, recipe, rollouts

from fastkd.batch import pack
from fastkd.host_copies import to_device
from fastkd.student import Student
from fastkd.teacher import Teacher

GPU = torch.device("cuda", 0)


def test_a_batch_goes_to_the_device_without_a_wait(simulated):
    batch = pack([one for one in rollouts() if one.response])
    simulated.waits()
    there = batch.to(GPU)
    assert simulated.waits() == {}
    assert torch.equal(there.tokens_N.cpu(), batch.tokens_N) and there.active_A.is_cuda
    assert to_device(there.tokens_N, "cpu").device.type == "cpu"  # the way back has to wait
    assert simulated.waits() == {"aten::copy_": 2}


@pytest.mark.parametrize("rows_on", ["cpu", "cuda"])
def test_training_waits_at_its_optimizer_steps_alone(simulated, tmp_path, tiny_qwen3, rows_on):
    """To read the figures; and in every micro-batch transformers reads one value, to see whether it is packed."""
    for name, seed in (("student", 0), ("teacher", 1)):
        tiny_qwen3(seed=seed, num_hidden_layers=1).save_pretrained(tmp_path / name)
    config = recipe(tmp_path, {"activation_checkpointing": True}, precision="bfloat16", micro_batch_tokens=60)
    sequences = rollouts()
    student, teacher = Student(config, GPU, VALID), Teacher(config, GPU, VALID)
    rows = [one and one.map(lambda field: field.to(rows_on)) for one in teacher.score(sequences)]
    student.train(sequences, rows)
    simulated.waits()
    student.train(sequences, rows)
    micro_batches = sum(len(student._micro_batches(sequences[start : start + 7])) for start in (0, 7))
    assert simulated.waits() == {"aten::_local_scalar_dense": micro_batches, "aten::copy_": 2}
