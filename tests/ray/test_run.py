"""The whole loop on a cluster: three roles on three nodes give what one process gives, resume, and survive losses."""

import json
import os
import re
import signal
from collections import Counter

import pytest

from fastkd import ray_repairs, runner
from fastkd.actors import NodeLost, WorkerDied
from fastkd.placement import SLOT
from fastkd.ray_roles import RayRoles
from fastkd.ray_turns import PoolTurns
from fastkd.recipe import load_recipe

SHORT = [
    "distillation.num_prompts_per_step=8",
    "policy.train_global_batch_size=8",
    "policy.generation_batch_size=2",
    "distillation.max_num_steps=3",
    "distillation.val_period=3",
    "distillation.max_val_samples=8",
    "distillation.val_batch_size=8",
    "checkpointing.save_period=1",
    "logger.num_val_samples_to_print=0",
]
EXACT = 1e-5


def reproducible(folder):
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("timing/", "memory/", "sync/"))} for line in lines]


def assert_same(found, wanted, tolerance=EXACT):
    assert [line["step"] for line in found] == [line["step"] for line in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.keys() == theirs.keys()
        pairs = {name: (ours[name], theirs[name]) for name in ours}
        wrong = {name: pair for name, pair in pairs.items() if pair[0] != pytest.approx(pair[1], rel=tolerance)}
        assert not wrong, wrong


@pytest.fixture(scope="session")
def run(root):
    def one(recipe, folder, *overrides):
        runner.run(load_recipe(root / "recipes" / recipe, [*SHORT, f"logger.log_dir={folder}", *overrides]))
        return reproducible(folder)

    return one


@pytest.fixture(scope="session")
def alone(run, tmp_path_factory):
    """metrics.jsonl of one process."""
    return run("arithmetic_cpu.yaml", tmp_path_factory.mktemp("alone"))


@pytest.fixture
def watched(monkeypatch):
    """All pools of the runs of a test, and who is where."""
    made = []
    build = RayRoles.__init__

    def init(self, *args):
        made.append(self)
        build(self, *args)

    monkeypatch.setattr(RayRoles, "__init__", init)
    return made


def test_three_nodes_give_what_one_process_gives(cluster, run, alone, watched, tmp_path):
    run("arithmetic_ray_cpu.yaml", tmp_path, "checkpointing.checkpoint_must_save_by=00:00:00:00")
    assert [line["step"] for line in reproducible(tmp_path)] == [0, 1]
    found = run("arithmetic_ray_cpu.yaml", tmp_path)  # resumes
    assert_same(found, alone)
    for roles in watched:
        nodes = Counter(node for pool in roles.pools.values() for node in {one.id for one in pool.slots.nodes})
        assert len(nodes) == 3 and set(nodes.values()) == {1}, "two roles share a node"
    assert (tmp_path / "summary.json").exists() and (tmp_path / "export" / "model.safetensors").exists()
    steps = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()][1:]
    for line in steps:  # two engines, four batches of two prompts
        assert 0 < line["timing/queue_generation"] < 8 and 0 <= line["timing/queue_teacher"] < 8


def test_data_parallel_and_roles_that_share_nodes(cluster, run, alone, turns_taken, tmp_path):
    """Roles that share devices take turns with their memory; on a CPU the calls are made and nothing moves."""
    found = run(
        "arithmetic_ray_cpu.yaml",
        tmp_path,
        "distillation.resource_isolation.enabled=false",
        "policy.generation.colocated.enabled=true",
        "policy.dtensor_cfg.tensor_parallel_size=1",
        "teacher.dtensor_cfg.tensor_parallel_size=1",
        "cluster.num_nodes=1",
    )
    assert_same(found, alone)
    # The first sync, then two validations and three steps; syncs, checkpoints and the export are training's.
    assert turns_taken == ["training", *["generation", "teacher", "training"] * 5]


def test_a_teacher_in_vllm_takes_no_turns(root):
    """It keeps its memory; told of new workers after a loss, nobody asks them to give theirs."""
    shared = ["distillation.resource_isolation.enabled=false", "policy.generation.colocated.enabled=true"]
    loaded = load_recipe(root / "recipes" / "arithmetic_ray_cpu.yaml", [*shared, "teacher.backend=vllm"])
    turns = PoolTurns(loaded.recipe)
    assert turns.shared
    turns.holds("teacher")
    turns.take("training")
    assert turns.holding == set()


def kill(roles, role, rank):
    """SIGKILL a worker, wherever it runs."""
    import ray_workers

    process = roles.pools[role].run_all(ray_workers.process)[rank]
    os.kill(process, signal.SIGKILL)


KILLS = {
    1: ("collect", [("teacher", 0), ("training", 0)]),
    2: ("train", [("teacher", 1), ("generation", 1)]),
    3: ("train", [("training", 1)]),
    4: ("sync", [("generation", 0)]),
}
"""Step → the verb of the loop that has just begun, and who is killed. A dead teacher's rows are scored again."""


def test_killed_workers_are_replaced(cluster, run, watched, tmp_path, monkeypatch):
    """A SIGKILL in every step: the figures are those of a run that nobody disturbs."""
    wanted = run("arithmetic_cpu.yaml", tmp_path / "alone", "distillation.max_num_steps=4")
    done = set()

    def disturb(verb):
        original = getattr(RayRoles, verb)

        def disturbed(self, *args, **kwargs):
            step = current[0]
            if step in KILLS and KILLS[step][0] == verb and step not in done:
                done.add(step)
                for victim in KILLS[step][1]:
                    kill(self, *victim)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(RayRoles, verb, disturbed)

    for verb in ("collect", "train", "sync"):
        disturb(verb)
    current, take_step = [0], runner.Runner.step

    def step(self):
        current[0] = self.step_number + 1
        return take_step(self)

    monkeypatch.setattr(runner.Runner, "step", step)
    found = run("arithmetic_ray_cpu.yaml", tmp_path / "run", "distillation.max_num_steps=4")
    assert done == set(KILLS)
    assert watched[0].restarts == {"generation": 2, "teacher": 2, "training": 2}
    # Scored again in other company, a row may be rounded otherwise on its way: payload values have 16 bits.
    assert_same(found, wanted, 1e-3)


@pytest.fixture
def join(cluster):
    """join(name): one more node of two slots, that of the last test gone."""
    added = []

    def add(name):
        node = cluster.add_node(num_cpus=1, resources={SLOT: 2}, object_store_memory=80 << 20, node_name=name)
        added.append(node)
        return node

    yield add
    for node in added:
        cluster.remove_node(node, allow_graceful=False)


def end(node):
    """SIGKILL of the raylet alone; the node's workers find out by themselves."""
    (raylet,) = node.all_processes["raylet"]
    raylet.process.kill()
    raylet.process.wait()


LOSSES = {1: ("train", "teacher"), 2: ("collect", "generation"), 3: ("train", "training")}
"""Step → the verb of the loop that has just begun, and whose node goes."""


def disturb(monkeypatch, losses, nodes):
    """Kill the node of a role at the beginning of a verb; nodes: by name. The steps in which that was done."""
    done, current, take_step = [], [0], runner.Runner.step

    def step(self):
        current[0] = self.step_number + 1
        return take_step(self)

    def disturbed(verb, original):
        def call(self, *args):
            if losses.get(current[0], ("", ""))[0] == verb and current[0] not in done:
                done.append(current[0])
                end(nodes[self.pools[losses[current[0]][1]].slots.nodes[0].name])
            return original(self, *args)

        return call

    monkeypatch.setattr(runner.Runner, "step", step)
    for verb in ("collect", "train"):
        monkeypatch.setattr(RayRoles, verb, disturbed(verb, getattr(RayRoles, verb)))
    return done


def test_lost_nodes_are_replaced(cluster, run, watched, join, tmp_path, monkeypatch):
    """Every role loses its node once; the figures are those of a run that nobody disturbs."""
    wanted = run("arithmetic_cpu.yaml", tmp_path / "alone")
    # Their names come first: the three other nodes are the spare ones.
    nodes = {name: join(name) for name in ("lost-1", "lost-2", "lost-3")}
    done = disturb(monkeypatch, LOSSES, nodes)
    found = run("arithmetic_ray_cpu.yaml", tmp_path / "run")
    assert done == [1, 2, 3]
    (roles,) = watched
    assert roles.restarts == {"generation": 1, "teacher": 1, "training": 1}  # both of its engines went with the node
    assert {node.name for pool in roles.pools.values() for node in pool.slots.nodes} == {"node-1", "node-2", "node-3"}
    # Scored again in other company, a row may be rounded otherwise on its way: payload values have 16 bits.
    assert_same(found, wanted, 1e-3)


def test_without_another_node_the_run_ends_and_resumes(cluster, run, alone, join, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_repairs, "NODE_SECONDS", 1.0)
    with monkeypatch.context() as patch:
        done = disturb(patch, {3: ("collect", "teacher")}, {"other-1": join("other-1")})
        with pytest.raises(NodeLost) as caught:
            run(
                "arithmetic_ray_cpu.yaml",
                tmp_path,
                "checkpointing.save_period=9",
                'cluster.exclude_nodes=["node-3"]',
            )
    assert done == [3]
    text = str(caught.value)
    # Whichever of its two ranks was heard of first.
    assert re.search(r"teacher rank [01] on other-1: the node is gone, and no node took its place within 1 s", text)
    assert "teacher needs 2 slots for each of other-1" in text and "node-1 (2)" in text
    assert caught.value.__cause__ is None  # exit code 1: it is no mistake of the user's
    assert [line["step"] for line in reproducible(tmp_path)] == [0, 1, 2]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_2"]  # saved as it ended
    assert_same(run("arithmetic_ray_cpu.yaml", tmp_path, "checkpointing.save_period=9"), alone)


def test_too_many_losses_end_the_run(cluster, run, watched, tmp_path, monkeypatch):
    """With one traceback that names role, rank and node."""
    original = RayRoles.collect

    def disturbed(self, *args):
        kill(self, "generation", 0)
        return original(self, *args)

    monkeypatch.setattr(RayRoles, "collect", disturbed)
    with pytest.raises(WorkerDied, match=r"generation rank 0 on node-\d: its process ended") as caught:
        run("arithmetic_ray_cpu.yaml", tmp_path, "cluster.max_restarts=1", "distillation.val_at_start=false")
    assert "cluster.max_restarts=1" in caught.value.__notes__[0]


def test_off_policy_by_one_step(cluster, run, tmp_path):
    """The next step's rollouts are sampled while this one trains: one step staler, from the second step on."""
    unvalidated = ["distillation.val_at_start=false", "distillation.val_at_end=false", "distillation.val_period=0"]
    found = run("arithmetic_ray_cpu.yaml", tmp_path, "distillation.max_off_policy_steps=1", *unvalidated)
    assert [line["rollout/staleness_max"] for line in found] == [0.0, 1.0, 1.0]
    assert all(line["rollout/dropped_stale"] == 0 for line in found)
