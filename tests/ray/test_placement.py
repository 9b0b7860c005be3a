"""Roles on nodes: what a recipe needs, which nodes it gets, and what is said when they do not suffice."""

import pytest
import ray
from ray.util import placement_group_table

from fastkd.errors import UserError
from fastkd.placement import Node, Placement, Share, assign, shares
from fastkd.recipe import recipe_from


def nodes(*devices):
    return [Node(f"{i:056x}", f"node-{i}", f"10.0.0.{i}", count) for i, count in enumerate(devices, 1)]


def names(found):
    return [[node.name for node in part] for part in found]


def test_eleven_nodes_in_the_order_of_their_numbers(isolated):
    wanted = shares(isolated(nodes=(8, 2, 1), gpus=4))
    found = assign(wanted, list(reversed(nodes(*[4] * 11))))
    assert names(found) == [[f"node-{i}" for i in range(1, 9)], ["node-9", "node-10"], ["node-11"]]


def test_a_node_that_is_left_out_or_too_small_is_passed_over():
    wanted = [Share(("training",), 1, 4), Share(("teacher",), 1, 4)]
    for exclude in ("node-1", "10.0.0.1", f"{1:056x}"):
        assert names(assign(wanted, nodes(4, 2, 4, 8), [exclude])) == [["node-3"], ["node-4"]]


def test_too_few_nodes():
    wanted = [Share(("training",), 2, 4), Share(("teacher",), 1, 4)]
    with pytest.raises(UserError) as caught:
        assign(wanted, nodes(4, 2, 4), ["node-9"])
    text = str(caught.value)
    assert "training 2 × 4; teacher 1 × 4" in text and "node-1 (4), node-2 (2), node-3 (4)" in text
    assert "left out: node-9" in text and "ray start --address" in text


def other(nodes, gpus, **generation):
    return recipe_from(
        {
            "policy": {"model_name": "student", "generation": generation},
            "teacher": {"model_name": "teacher"},
            "data": {"train": {"data_path": "unused.jsonl"}},
            "cluster": {"num_nodes": nodes, "gpus_per_node": gpus},
        }
    ).recipe


def test_shares_that_are_not_isolated():
    everybody = ("training", "teacher", "generation")
    assert shares(other(2, 4)) == [Share(everybody, 2, 4)]
    apart = {"enabled": False, "resources": {"num_nodes": 1, "gpus_per_node": 3}}
    learners = ("training", "teacher")
    assert shares(other(3, 4, colocated=apart)) == [Share(learners, 2, 4), Share(("generation",), 1, 4)]
    wanted = shares(other(1, 8, colocated=apart))
    assert wanted == [Share(learners, 1, 5, False), Share(("generation",), 1, 3, False)]
    assert names(assign(wanted, nodes(4, 8))) == [["node-2"], ["node-2"]]  # five and three of its eight
    with pytest.raises(UserError, match="node-1 \\(4\\)"):
        assign(wanted, nodes(4, 7))


def test_isolated_roles_share_no_node(cluster, placement):
    table = placement_group_table()
    where = {}
    for role in ("training", "generation", "teacher"):
        slots = placement.slots(role)
        real = [
            table[group.id.hex()]["bundles_to_node_id"][bundle]
            for group, bundle in zip(slots.groups, slots.bundles, strict=True)
        ]
        assert real == [node.id for node in slots.nodes]
        assert len(slots) == 2
        where[role] = set(real)
    assert not where["training"] & where["teacher"] and not where["teacher"] & where["generation"]
    assert len(set.union(*where.values())) == 3
    assert placement.marker() == "Isolated clusters created: train=1x2slots, inference=1x2slots, teacher=1x2slots"


def test_engines_and_the_marker_line(cluster, isolated):
    recipe = isolated(nodes=(1, 1, 1))
    generation = recipe.policy.generation.model_copy(
        update={
            "backend": "vllm",
            "vllm_cfg": recipe.policy.generation.vllm_cfg.model_copy(update={"tensor_parallel_size": 2}),
        }
    )
    recipe = recipe.model_copy(update={"policy": recipe.policy.model_copy(update={"generation": generation})})
    with Placement(recipe, cpu_slots=2) as made:
        engines = made.slots("generation")
        assert (len(engines), engines.per_worker, engines.bundles) == (1, 2, (0,))
        assert engines.groups[0].bundle_specs == [{"fastkd_slot": 2}]
    with pytest.raises(UserError, match=r"tensor_parallel_size=2.*does not fit the 1 devices"):
        Placement(recipe, cpu_slots=1)


def test_devices_in_turn(cluster):
    with Placement(other(1, 0), cpu_slots=2) as made:
        parts = [made.slots(role) for role in ("training", "teacher", "generation")]
        assert {group.id for slots in parts for group in slots.groups} == {made.groups[0][0].id}
        assert [slots.bundles for slots in parts] == [(0, 1)] * 3
        assert 0.99 < sum(slots.per_worker for slots in parts) <= 1
        assert made.marker() == "Clusters created: train+teacher+inference=1x2slots"


def test_a_cluster_that_does_not_suffice(cluster, isolated):
    with pytest.raises(UserError, match=r"training 2 × 2.*node-1 \(2\), node-2 \(2\), node-3 \(2\)"):
        Placement(isolated(nodes=(2, 1, 1)), cpu_slots=2)
    with pytest.raises(UserError, match="left out: node-2"):
        Placement(isolated(), cpu_slots=2, exclude=["node-2"])
    with (
        Placement(isolated(), cpu_slots=2),
        pytest.raises(UserError, match="were not free within 1 s: another job holds them"),
    ):
        Placement(isolated(), cpu_slots=2, timeout=1.0)
    assert all(one["state"] == "REMOVED" for one in placement_group_table().values())
    assert ray.cluster_resources()["fastkd_slot"] == 6
