"""Quantised students on (tp, dp) of (1, 1), (2, 1), (1, 2), (2, 2) and (4, 1) equal one process.

Loss, gradient norm and weights within 1e-5 in float32 and within 0.05 in bfloat16, whose rounding moves values over
the edge between two codes; weights' scales and exported files bit for bit.
"""

from __future__ import annotations

from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("quantization_worker.py")


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_quantised_student_equals_one_process(ranks, tmp_path, launch, tiny_qwen3):
    for name, seed in (("student", 0), ("teacher", 1)):
        tiny_qwen3(tied=name == "student", seed=seed).save_pretrained(tmp_path / name)
        narrow = tiny_qwen3(intermediate_size=48, num_hidden_layers=1)
        narrow.save_pretrained(tmp_path / "narrow" / name)
    print(launch(WORKER, ranks, tmp_path))
