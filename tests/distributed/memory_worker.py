"""The worker program of test_memory.py: a training step's memory on real ranks against its plan.

Run as: memory_worker.py FOLDER WORLD RANK, where FOLDER holds a random model.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.memory_grid import ITEMS, measure

MESHES = {1: [(1, 1)], 2: [(2, 1), (1, 2)], 4: [(2, 2)]}  # (tp, dp)


def main(folder: Path, world: int, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous_{world}", rank=rank, world_size=world)
    torch.set_num_threads(1)
    for tp, dp in MESHES[world]:
        for recompute in (False, True):
            lines = {line["item"]: line for line in measure(folder, tp, dp, recompute, tokens=256, kept=16)}
            for item in ITEMS[:-1]:  # of the peak gloo takes a part itself, which is no rank's on a GPU
                assert lines[item]["holds"], (tp, dp, recompute, lines[item])
            for item in ITEMS[:3] if rank == 0 else ():  # which has most of an odd number of ids
                assert lines[item]["planned"] == lines[item]["measured"] > 0, (tp, dp, recompute, lines[item])
            assert lines["peak of a step"]["measured"] > 0.9 * lines["peak of a step"]["planned"], lines
    dist.barrier()  # a rank that leaves early closes connections that others still use
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
