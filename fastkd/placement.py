"""Which node serves which role: Ray placement groups that follow a recipe.

Isolated roles own whole nodes: the nodes are chosen here, by name, and every bundle is pinned to its node by id, so
that rank r of a role runs on node r // (workers of a node) and neighbours in rank are neighbours on a node. Roles that
share devices take an equal fraction of each. Every node has a placement group of its own: when one is lost, another
takes its place in the order of ranks, and the workers of the rest stay where they are.

A device is a GPU or, on CPU-only nodes, a slot: a custom resource that says how many workers the node takes
(``ray start --resources='{"fastkd_slot": 2}'``).
"""

from __future__ import annotations

import math
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import ray  # pyright: ignore[reportMissingImports]
from ray.util.placement_group import placement_group, remove_placement_group  # pyright: ignore[reportMissingImports]

from fastkd.config import Recipe
from fastkd.errors import UserError
from fastkd.log import logger

SLOT = "fastkd_slot"
"""Custom resource of a CPU-only node: worker processes that it takes."""
_NODE_ID = "ray.io/node-id"
_MARKER = {"training": "train", "generation": "inference", "teacher": "teacher"}


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the Ray cluster."""

    id: str
    name: str
    """What ``ray start --node-name`` gave it, else its address."""
    address: str
    devices: int
    """GPUs or slots, free or not."""

    def called(self, name: str) -> bool:
        """Whether a person may mean this node: its name, its address, or the first 8 or more digits of its id."""
        return name in (self.name, self.address) or (len(name) >= 8 and self.id.startswith(name))


@dataclass(frozen=True, slots=True)
class Share:
    """Devices that one role owns, or that several use in turn."""

    roles: tuple[str, ...]
    nodes: int
    per_node: int
    """Devices of each node."""
    whole_nodes: bool = True
    """Nobody else gets devices of these nodes."""

    def __str__(self) -> str:
        return f"{' and '.join(self.roles)} {self.nodes} × {self.per_node}"


@dataclass(frozen=True, slots=True)
class Slots:
    """Where the workers of one role go; what a pool starts from."""

    role: str
    device_type: str
    """"cuda" or "cpu"."""
    resource: str
    per_worker: float
    """Of the resource; a fraction where roles share devices."""
    nodes: tuple[Node, ...]
    """Node of each worker."""
    groups: tuple[Any, ...]
    """Ray's placement group of each worker, that of its node."""
    bundles: tuple[int, ...]
    """Bundle of each worker in its group."""
    renew: Callable[[float], Slots] = field(compare=False)
    """The slots as they are now, with other nodes for those that are gone; waits so many seconds for nodes to appear,
    then raises UserError."""

    def __len__(self) -> int:
        return len(self.nodes)


def shares(recipe: Recipe, cpu_slots: int = 1) -> list[Share]:
    """What each role needs.

    Args:
        recipe: its ``role_sizes``, isolation and cluster decide.
        cpu_slots: workers of a node when the recipe has no GPUs.
    """
    cluster, sizes = recipe.cluster, recipe.role_sizes
    per_node = cluster.gpus_per_node or cpu_slots
    if recipe.distillation.resource_isolation.enabled:
        roles = recipe.distillation.resource_isolation.roles
        return [
            Share(("training",), roles.training.num_nodes, per_node),
            Share(("generation",), roles.generation.num_nodes, per_node),
            Share(("teacher",), roles.teacher.num_nodes, per_node),
        ]
    if recipe.policy.generation.colocated.enabled:
        return [Share(("training", "teacher", "generation"), cluster.num_nodes, per_node)]
    learners = ("training", "teacher")
    if cluster.num_nodes == 1:
        apart = sizes.generation
        return [Share(learners, 1, per_node - apart, False), Share(("generation",), 1, apart, False)]
    apart = sizes.generation // per_node
    return [Share(learners, cluster.num_nodes - apart, per_node), Share(("generation",), apart, per_node)]


def devices_per_worker(recipe: Recipe, role: str) -> int:
    """Devices of one worker process: vLLM starts its own tensor- and pipeline-parallel processes.

    On CPU nodes a transformers engine takes the slots of the vLLM engine that it stands for, so that a recipe has as
    many engines as with vLLM.
    """
    generation = recipe.policy.generation
    if role == "generation" and (generation.backend == "vllm" or recipe.cluster.device == "cpu"):
        return generation.vllm_cfg.devices
    if role == "teacher" and recipe.teacher.backend == "vllm":
        return recipe.teacher.dtensor_cfg.tensor_parallel_size
    return 1


def assign(
    wanted: Sequence[Share], nodes: Sequence[Node], exclude: Iterable[str] = (), unit: str = "GPUs"
) -> list[list[Node]]:
    """Nodes of each share, in the order of their names; no node serves two shares that want whole nodes.

    Raises:
        UserError: the cluster is too small; says what it has and what the recipe needs.
    """
    exclude = list(exclude)
    usable = sorted((n for n in nodes if not any(map(n.called, exclude))), key=lambda node: _natural(node.name))
    free, found = list(usable), []
    for share in wanted if all(share.whole_nodes for share in wanted) else [_together(wanted)]:
        fitting = [node for node in free if node.devices >= share.per_node][: share.nodes]
        if len(fitting) < share.nodes:
            raise _too_small(wanted, nodes, exclude, unit)
        free = [node for node in free if node not in fitting]
        found.append(fitting)
    return found if len(found) == len(wanted) else found * len(wanted)


def _together(wanted: Sequence[Share]) -> Share:
    return Share(tuple(r for share in wanted for r in share.roles), 1, sum(share.per_node for share in wanted))


def _natural(name: str) -> list[Any]:
    """node-10 comes after node-9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _too_small(wanted: Sequence[Share], nodes: Sequence[Node], exclude: list[str], unit: str) -> UserError:
    has = ", ".join(f"{node.name} ({node.devices})" for node in sorted(nodes, key=lambda one: _natural(one.name)))
    out = f"; left out: {', '.join(exclude)}" if exclude else ""
    count = sum(share.nodes for share in wanted) if all(share.whole_nodes for share in wanted) else 1
    start = f"--num-gpus={wanted[0].per_node}" if unit == "GPUs" else f"--resources='{{\"{SLOT}\": N}}'"
    return UserError(
        "cluster.num_nodes",
        f"the roles need nodes × {unit} of each: {'; '.join(map(str, wanted))}. The Ray cluster has, with its "
        f"{unit}: {has or 'no node'}{out}",
        f"Join more nodes (ray start --address=HEAD {start}), or change the recipe",
        value=count,
    )


def cluster_nodes(resource: str) -> list[Node]:
    """The nodes that Ray knows and that are alive, those without devices included."""
    return [
        Node(
            node["NodeID"],
            node["NodeName"] or node["NodeManagerAddress"],
            node["NodeManagerAddress"],
            int(node["Resources"].get(resource, 0)),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


class Placement:
    """The roles of a recipe on the nodes of the Ray cluster that this process has joined.

    A context manager; ``close`` gives everything back, and ends the workers that are still there.
    """

    def __init__(self, recipe: Recipe, *, cpu_slots: int = 1, exclude: Iterable[str] = (), timeout: float = 60.0):
        """Reserve the devices of all roles.

        Args:
            cpu_slots: workers of a CPU-only node.
            exclude: names, addresses or ids of nodes that must not be used.
            timeout: seconds to wait for devices that others still hold.

        Raises:
            UserError: the cluster is too small, or its devices are taken.
        """
        self.recipe, self.exclude = recipe, tuple(exclude)
        self.shares = shares(recipe, cpu_slots)
        self.device_type = recipe.cluster.device
        self.resource, self.unit = ("GPU", "GPUs") if self.device_type == "cuda" else (SLOT, "slots")
        for share in self.shares:
            _check_workers(recipe, share)
        self.nodes = assign(self.shares, cluster_nodes(self.resource), self.exclude, self.unit)
        self.groups: list[list[Any]] = [[None] * len(nodes) for nodes in self.nodes]
        """Ray's placement group of each node of each share."""
        self._renewing = threading.Lock()  # two roles that lose nodes at once must not take the same spare one
        try:
            # In the order of the nodes' names, one by one: of two runs that start at once, one gets all.
            for index, nodes in enumerate(self.nodes):
                for place in range(len(nodes)):
                    self._reserve(index, place, timeout)
        except BaseException:
            self.close()
            raise

    def slots(self, role: str) -> Slots:
        """Where the workers of "training", "generation" or "teacher" go."""
        index = next(i for i, share in enumerate(self.shares) if role in share.roles)
        share, nodes = self.shares[index], self.nodes[index]
        devices = devices_per_worker(self.recipe, role)
        workers = share.per_node // devices
        shared = len(share.roles) > 1
        return Slots(
            role,
            self.device_type,
            self.resource,
            # Ray counts in ten-thousandths: three thirds must not be more than one.
            math.floor(1e4 / len(share.roles)) / 1e4 if shared else devices,
            tuple(node for node in nodes for _ in range(workers)),
            tuple(group for group in self.groups[index] for _ in range(workers)),
            # Shared devices have a bundle each; a role of its own has a bundle per worker.
            (tuple(range(0, share.per_node, devices)) if shared else tuple(range(workers))) * len(nodes),
            lambda timeout: self._renew(index, role, timeout),
        )

    def marker(self) -> str:
        """The line that says the pools stand: ``Isolated clusters created: train=1x4GPUs, inference=…``."""
        parts = [
            f"{'+'.join(_MARKER[role] for role in share.roles)}={share.nodes}x{share.per_node}{self.unit}"
            for share in self.shares
        ]
        isolated = self.recipe.distillation.resource_isolation.enabled
        return f"{'Isolated clusters' if isolated else 'Clusters'} created: {', '.join(parts)}"

    def close(self) -> None:
        """Give the devices back; harmless when done before."""
        for groups in self.groups:
            for place, group in enumerate(groups):
                groups[place] = None
                if group is not None and ray.is_initialized():
                    remove_placement_group(group)

    def __enter__(self) -> Placement:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _reserve(self, index: int, place: int, timeout: float) -> None:
        share, node = self.shares[index], self.nodes[index][place]
        size = 1 if len(share.roles) > 1 else max(devices_per_worker(self.recipe, role) for role in share.roles)
        count = share.per_node // size
        self.groups[index][place] = group = placement_group(
            [{self.resource: size}] * count,
            name=f"{'-'.join(share.roles)}-{uuid.uuid4().hex[:8]}",  # another run may have such a role too
            bundle_label_selector=[{_NODE_ID: node.id}] * count,
        )
        if not group.wait(timeout):
            raise UserError(
                "cluster.num_nodes",
                f"{share.per_node} {self.unit} of {node.name} were not free within {timeout:g} s: another job holds "
                "them",
                "See 'ray status', and end the other job or leave this node out",
                value=self.recipe.cluster.num_nodes,
            )

    def _renew(self, index: int, role: str, timeout: float) -> Slots:
        deadline, told = time.monotonic() + timeout, False
        while True:
            with self._renewing:
                lost = self._lost(index)
                found = self._spare(index, len(lost))
                if len(found) == len(lost):
                    for place, node in zip(lost, found, strict=True):
                        logger.info(f"{role}: {node.name} takes the place of {self.nodes[index][place].name}")
                        remove_placement_group(self.groups[index][place])
                        self.nodes[index][place] = node
                        self._reserve(index, place, max(deadline - time.monotonic(), 10.0))
                    return self.slots(role)
            names = ", ".join(self.nodes[index][place].name for place in lost)
            if not told:
                logger.warning(f"{role}: {names} is gone; waiting up to {timeout:g} s for a node to take its place")
                told = True
            if time.monotonic() > deadline:
                has = ", ".join(f"{one.name} ({one.devices})" for one in cluster_nodes(self.resource)) or "no node"
                raise UserError(
                    "cluster.num_nodes",
                    f"no node took its place within {timeout:g} s; {role} needs {self.shares[index].per_node} "
                    f"{self.unit} for each of {names}. The Ray cluster has, with its {self.unit}: {has}",
                    "Join a node, and give the same command again",
                    value=self.recipe.cluster.num_nodes,
                )
            time.sleep(0.5)

    def _lost(self, index: int) -> list[int]:
        """Places of a share whose nodes are gone."""
        alive = {node.id for node in cluster_nodes(self.resource)}
        return [place for place, node in enumerate(self.nodes[index]) if node.id not in alive]

    def _spare(self, index: int, count: int) -> list[Node]:
        """Up to so many nodes that nobody has and that this share could use, in the order of their names."""
        if self.shares[index].whole_nodes:
            taken, needed = {node.id for nodes in self.nodes for node in nodes}, self.shares[index].per_node
        else:  # all shares are on one node, and move to the same one
            taken, needed = {node.id for node in self.nodes[index]}, sum(share.per_node for share in self.shares)
        fitting = [
            node
            for node in cluster_nodes(self.resource)
            if node.id not in taken and node.devices >= needed and not any(map(node.called, self.exclude))
        ]
        return sorted(fitting, key=lambda node: _natural(node.name))[:count]


_WIDTH = {
    "generation": "policy.generation.vllm_cfg.tensor_parallel_size",
    "teacher": "teacher.dtensor_cfg.tensor_parallel_size",
}


def _check_workers(recipe: Recipe, share: Share) -> None:
    for role in share.roles:
        size = devices_per_worker(recipe, role)
        key = _WIDTH.get(role, "")
        if share.per_node % size:
            raise UserError(
                key,
                f"an engine of {size} devices (tensor × pipeline) does not fit the {share.per_node} devices of a node",
                f"Use a divisor of {share.per_node}",
                value=size,
            )
        if size > 1 and len(share.roles) > 1 and recipe.cluster.device == "cuda":
            raise UserError(
                key,
                "an engine that shares its GPUs with other roles uses one GPU",
                f"Write {key}=1, or give {role} nodes of its own (distillation.resource_isolation)",
                value=size,
            )
