"""What a kill -9 costs a run, and that it changes nothing: every victim at every moment of a step.

    pytest benchmarks/bench_losses.py --benchmark

Real runs of recipes/arithmetic_ray_cpu.yaml on a simulated cluster with one spare node, a run per victim. A worker, or
the raylet of a node (which ends all workers there), gets SIGKILL at one moment after another, a step each. A killed
node is back before the next step under another name, and so is the spare one of the next loss.

The metrics of every step have to be those of a run in one process. What is lost is done again, so the figures differ by
rounding alone: rows that are scored again in other company keep other 16 bits on their way, and a step later the
weights differ by as much.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.measure import Bench
from benchmarks.records import Row

ROOT = Path(__file__).resolve().parents[1]
MOMENTS: list[tuple[str, str, float]] = [
    ("before sampling", "collect", 0.0),
    ("while sampling", "collect", 0.15),
    ("rows wait for training", "train", 0.0),
    ("while training", "train", 0.1),
    ("before the sync", "sync", 0.0),
    ("while the state is saved", "save", 0.05),
]
"""What happens, the call that has just begun, and how many seconds ago."""
VICTIMS = [(role, what) for what in ("process", "node") for role in ("generation", "teacher", "training")]
SETTINGS = [
    "distillation.num_prompts_per_step=16",
    "policy.train_global_batch_size=16",
    "policy.generation_batch_size=2",
    f"distillation.max_num_steps={len(MOMENTS)}",
    "distillation.val_at_start=false",
    "distillation.val_at_end=false",
    "distillation.val_period=0",
    "cluster.max_restarts=30",
    "checkpointing.save_period=1",
    "logger.num_val_samples_to_print=0",
]
TOLERANCE = 1e-3


def lines(recipe: str, folder: Path) -> list[dict[str, Any]]:
    from fastkd import runner
    from fastkd.recipe import load_recipe

    runner.run(load_recipe(ROOT / "recipes" / recipe, [*SETTINGS, f"logger.log_dir={folder}"]))
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]


def difference(found: dict[str, Any], wanted: dict[str, Any]) -> float:
    """Largest relative difference of a metric that a run of one process has too, but for times and memory."""
    names = [name for name in wanted if not name.startswith(("timing/", "memory/", "sync/"))]
    return max(abs(found[name] - wanted[name]) / max(abs(wanted[name]), 1e-9) for name in names)


class Killer:
    """Kills a victim at a moment of each step, and keeps the cluster at one spare node."""

    def __init__(self, cluster: Any, role: str, what: str):
        self.cluster, self.role, self.what = cluster, role, what
        self.done: dict[int, float] = {}
        """Step → when."""
        self.through: list[float] = []
        """When a step was through."""
        self.lost: list[str] = []
        """Names of killed nodes that nothing has replaced yet."""
        self.step = 0

    def at(self, roles: Any, verb: str) -> None:
        """A call has begun."""
        place = self.step - 1
        if self.step in self.done or not 0 <= place < len(MOMENTS) or MOMENTS[place][1] != verb:
            return
        self.done[self.step] = time.time()
        pool, wait = roles.pools[self.role], MOMENTS[place][2]
        victim = place % len(pool)
        # Asked for before, since a busy worker answers nobody.
        strike = self._node(pool.slots.nodes[victim]) if self.what == "node" else self._process(pool, victim)
        threading.Timer(wait, strike).start() if wait else strike()

    def _process(self, pool: Any, rank: int) -> Callable[[], None]:
        pid = pool.run_all(process)[rank]
        return lambda: os.kill(pid, signal.SIGKILL)

    def _node(self, node: Any) -> Callable[[], None]:
        (lost,) = [one for one in self.cluster.worker_nodes if one.node_id == node.id]

        def strike() -> None:
            (raylet,) = lost.all_processes["raylet"]
            raylet.process.kill()
            raylet.process.wait()
            self.lost.append(node.name)

        return strike

    def refill(self) -> None:
        """A node for every one that was lost. In the main thread: Ray sets a signal handler."""
        from fastkd.placement import SLOT

        while self.lost:
            name = f"{self.lost.pop()}-again"
            self.cluster.add_node(num_cpus=1, resources={SLOT: 2}, object_store_memory=80 << 20, node_name=name)


def process(worker: Any) -> int:
    """Whose process id to kill; called inside it."""
    return os.getpid()


@contextmanager
def watched(killer: Killer) -> Iterator[None]:
    """Tell the killer what begins."""
    from fastkd import runner
    from fastkd.checkpoint import Checkpoints
    from fastkd.ray_roles import RayRoles

    made: list[Any] = []

    with pytest.MonkeyPatch.context() as patch:

        def tell(kind: type, name: str, verb: str) -> None:
            original = getattr(kind, name)

            def call(self: Any, *args: Any, **kwargs: Any) -> Any:
                if kind is RayRoles:
                    made[:] = [self]
                killer.at(made[0], verb)
                return original(self, *args, **kwargs)

            patch.setattr(kind, name, call)

        for verb in ("collect", "train", "sync"):
            tell(RayRoles, verb, verb)
        tell(Checkpoints, "save", "save")
        take_step = runner.Runner.step

        def step(self: Any) -> Any:
            killer.refill()
            killer.step = self.step_number + 1
            found = take_step(self)
            killer.through.append(time.time())
            return found

        patch.setattr(runner.Runner, "step", step)
        yield


def test_losses(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    from fastkd.simulated_cluster import simulated

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    wanted = lines("arithmetic_cpu.yaml", tmp_path / "alone")
    rows: list[Row] = []
    with simulated(4, 2, store_bytes=80 << 20) as cluster:
        calm = lines("arithmetic_ray_cpu.yaml", tmp_path / "calm")
        for role, what in VICTIMS:
            killer = Killer(cluster, role, what)
            with watched(killer):
                found = lines("arithmetic_ray_cpu.yaml", tmp_path / f"{role}-{what}")
            killer.through.append(time.time())
            killer.refill()
            assert [line["step"] for line in found] == [line["step"] for line in wanted]
            for number, (moment, _, _) in enumerate(MOMENTS):
                off, when = difference(found[number], wanted[number]), killer.done[number + 1]
                rows.append(
                    {
                        "kill -9 of": f"{role} {what}",
                        "moment": moment,
                        "s until a step is through": min(one for one in killer.through if one > when) - when,
                        "step s": calm[number]["timing/step"],
                        "largest difference": off,
                    }
                )
                bench.show(" | ".join(f"{name}: {value}" for name, value in rows[-1].items()))
                assert off < TOLERANCE, rows[-1]
    bench.report("losses", "kill -9 in every step, simulated cluster of 4 nodes, one of them spare", rows)
