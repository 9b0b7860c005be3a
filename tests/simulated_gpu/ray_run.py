"""recipes/arithmetic_ray_cpu.yaml on a simulated cluster of three nodes with two simulated GPUs each.

Run as: ray_run.py FOLDER override…, on simulated GPUs. Ray schedules what the nodes say they have.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fastkd import runner
from fastkd.recipe import load_recipe
from fastkd.simulated_cluster import simulated

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "arithmetic_ray_cpu.yaml"

if __name__ == "__main__":
    folder, *overrides = sys.argv[1:]
    on_gpus = [f"logger.log_dir={folder}", "cluster.simulated=false", "cluster.gpus_per_node=2"]
    with simulated(3, 0, gpus=2, patient=True):  # its processes are more than the cores of a laptop
        runner.run(load_recipe(RECIPE, [*on_gpus, *overrides]))
