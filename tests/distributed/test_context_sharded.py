"""Context distillation under torchrun: the teacher's scores, and students of teachers that move, on real meshes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

WORKER = Path(__file__).with_name("context_worker.py")


@pytest.mark.parametrize("ranks", [2, 4])
def test_under_torchrun(ranks, tmp_path, tiny_qwen3, arithmetic):
    tiny_qwen3(vocab_size=416, num_hidden_layers=1).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(arithmetic / "tokenizer").save_pretrained(tmp_path)
    paths = [str(WORKER.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", WORKER, tmp_path],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert done.stdout.count("largest error") == {2: 15, 4: 10}[ranks]
