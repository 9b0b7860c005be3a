"""The sharded training step on 1, 2 and 4 processes of this machine: time by phase, and how it scales.

    pytest benchmarks/bench_sharded.py --benchmark

Every rank has one thread; more ranks than cores share them, which the table says. Nothing is timed before the first
step's loss equals that of one process. This measures the overhead of sharding, not what a cluster gains: the ranks
share memory bandwidth, and gloo moves bytes through the same processors.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.measure import Bench
from benchmarks.records import Row

HERE = Path(__file__).resolve().parent
WORKER = HERE / "sharded_worker.py"
MODEL = dict(
    vocab_size=32_768, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=8,
    num_key_value_heads=4, head_dim=32, max_position_embeddings=4096, tie_word_embeddings=True,
)  # fmt: skip
JOB = dict(model=MODEL, k=64, sequences=16, length=256, mb_tokens=1024, sp=False, recompute=False, steps=5)
LAYOUTS = [
    {"tp": 1, "cp": 1, "ranks": 1},
    {"tp": 1, "cp": 1, "ranks": 2},
    {"tp": 2, "cp": 1, "ranks": 2, "sp": True},
    {"tp": 1, "cp": 2, "ranks": 2},
    {"tp": 1, "cp": 1, "ranks": 4},
    {"tp": 2, "cp": 1, "ranks": 4, "sp": True},
    {"tp": 4, "cp": 1, "ranks": 4, "sp": True},
]
_PHASES = ("forward", "loss", "backward", "optimizer", "communication")


def measure(job: dict[str, Any], ranks: int) -> dict[str, Any]:
    """What the worker prints, from ``ranks`` processes."""
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*command, str(WORKER), json.dumps(job)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{ranks} ranks, {job}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(job: dict[str, Any], layouts: list[dict[str, Any]]) -> list[Row]:
    """One row per layout; the first is one process."""
    cores = os.cpu_count() or 1
    rows: list[Row] = []
    alone: dict[str, Any] | None = None
    for layout in layouts:
        ranks = layout["ranks"]
        found = measure(job | {key: value for key, value in layout.items() if key != "ranks"}, ranks)
        alone = alone or found
        error = abs(found["loss"] - alone["loss"]) / abs(alone["loss"])
        assert error < 1e-5, f"{layout}: loss {found['loss']}, one process {alone['loss']}"
        seconds = found["seconds"]
        dp = ranks // (layout["tp"] * layout["cp"])
        name = f"dp {dp} × cp {layout['cp']} × tp {layout['tp']}" + (" + sequence parallel" if layout.get("sp") else "")
        rows.append(
            {
                "ranks": ranks,
                "layout": name,
                **{f"{phase} ms": 1e3 * seconds[phase] for phase in _PHASES},
                "step ms": 1e3 * seconds["step"],
                "tokens/s": found["tokens"] / seconds["step"],
                "× one process": alone["seconds"]["step"] / seconds["step"],
                "peak MB per rank": found["peak_bytes"] / 1e6,
                **({"note": f"{ranks} ranks share {cores} cores"} if ranks > cores else {}),
            }
        )
    return rows


def test_sharded_step(bench: Bench) -> None:
    rows = table(JOB, LAYOUTS)
    shape = f"{MODEL['num_hidden_layers']} layers of {MODEL['hidden_size']}, V={MODEL['vocab_size']:,}"
    tokens = JOB["sequences"] * JOB["length"]
    bench.report("sharded_step", f"One sharded training step, Qwen3 shape of {shape}, {tokens:,} tokens, gloo", rows)
