"""The plan of a training step beside what real ranks hold: TP × DP × recompute, on gloo.

Run as: python -m benchmarks.memory_grid [--hidden 768 --layers 6 --vocab 50000 --tokens 512 --kept 64] > table.md

Every layout is a group of processes on this machine that takes one optimizer step of two micro-batches, as
``fastkd.run --memory-test`` does, but with its collectives; the figures are the first rank's. Prints Markdown; the exit
code is 1 where a figure but the peak is beyond 10 %: gloo reduces copies of its own, which are in the peak.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

LAYOUTS = ((1, 1), (2, 1), (1, 2), (2, 2))
"""(TP, DP)."""
ITEMS = ("parameters", "gradients", "optimizer", "loss kernel", "peak of a step")


def write_model(folder: Path, *, vocab: int, hidden: int, layers: int) -> None:
    """A random Qwen3 with a head of its own."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        head_dim=64,
        tie_word_embeddings=False,
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def measure(folder: Path, tp: int, dp: int, recompute: bool, *, tokens: int, kept: int) -> list[dict[str, Any]]:
    """The lines of one layout: this rank's. Every rank of the group calls it."""
    from fastkd import memory_test_roles, parallel
    from fastkd.plan import load_rates
    from fastkd.plan.layout import arrange
    from fastkd.plan.shapes import find
    from fastkd.recipe import recipe_from
    from fastkd.student import Student

    recipe = recipe_from(
        {
            "distillation": {"num_prompts_per_step": 2 * dp, "topk_logits_k": kept, "val_period": 0},
            "policy": {
                "model_name": str(folder),
                "train_global_batch_size": 2 * dp,
                "max_total_sequence_length": tokens,
                "sequence_packing": {"enabled": True},
                "dtensor_cfg": {"tensor_parallel_size": tp, "activation_checkpointing": recompute},
            },
            "teacher": {"model_name": str(folder), "dtensor_cfg": {"tensor_parallel_size": 1}},
            "data": {"train": {"data_path": "org/data"}},
            "cluster": {"gpus_per_node": 0, "num_nodes": tp * dp},
        }
    ).recipe
    shape = find("policy.model_name", str(folder))
    mesh = parallel.build_mesh(tp, 1, dp, "cpu") if tp * dp > 1 else None
    student = Student(recipe, torch.device("cpu"), None, mesh)
    lines = memory_test_roles.training(student, arrange(recipe, load_rates(cpu=True), shape, shape))
    return [asdict(line) | {"difference": line.difference, "holds": line.holds} for line in lines]


def _rank(given: dict[str, Any]) -> None:
    from fastkd.process_group import joined

    folder = Path(given["folder"])
    with joined("cpu") if given["tp"] * given["dp"] > 1 else nullcontext():
        lines = measure(
            folder, given["tp"], given["dp"], given["recompute"], tokens=given["tokens"], kept=given["kept"]
        )
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(lines))


def _layouts(options: argparse.Namespace, folder: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for tp, dp in LAYOUTS:
        for recompute in (False, True):
            given = {"folder": folder, "tp": tp, "dp": dp, "recompute": recompute} | {
                "tokens": options.tokens,
                "kept": options.kept,
            }
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={tp * dp}"]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
            done = subprocess.run(
                [*command, __file__, "--rank", json.dumps(given)], env=environment, stdout=subprocess.PIPE, text=True
            )
            if done.returncode:
                raise SystemExit(f"TP{tp} DP{dp} failed")
            yield f"TP{tp} DP{dp}{', recompute' if recompute else ''}", json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    """The table; 1 where the plan was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    for name, value in (("hidden", 768), ("layers", 6), ("vocab", 50000), ("tokens", 512), ("kept", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    if options.rank:
        _rank(json.loads(options.rank))
        return 0
    print(f"| rank of | {' | '.join(ITEMS)} |\n|---|{'---:|' * len(ITEMS)}", flush=True)
    holds = True
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), vocab=options.vocab, hidden=options.hidden, layers=options.layers)
        for name, lines in _layouts(options, folder):
            by_item = {line["item"]: line for line in lines}
            cells = [
                f"{one['planned'] / 2**20:.1f} / {one['measured'] / 2**20:.1f} ({one['difference']:+.1%})"
                for one in (by_item[item] for item in ITEMS)
            ]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
            holds = holds and all(by_item[item]["holds"] for item in ITEMS[:-1])
    return 0 if holds else 1


if __name__ == "__main__":
    raise SystemExit(main())
