"""Rules of the machines at hand: nodes and GPUs of a Slurm job, of the Ray cluster at RAY_ADDRESS.

Ray is asked only when RAY_ADDRESS is set; importing it costs more than all other checks together.
"""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import suppress

from fastkd.checks.finding import Finding
from fastkd.config import Recipe
from fastkd.errors import RecipeError, reason
from fastkd.recipe import LoadedRecipe

_SLOT = "fastkd_slot"  # placement.SLOT, whose module imports ray


def slurm(loaded: LoadedRecipe) -> Iterator[Finding]:
    """What the job of this process was given, by its environment variables."""
    recipe, cluster = loaded.recipe, loaded.recipe.cluster
    nodes = os.environ.get("SLURM_JOB_NUM_NODES") or os.environ.get("SLURM_NNODES") or ""
    if not nodes.isdigit() or cluster.simulated:
        return
    if int(nodes) != cluster.num_nodes:
        yield _nodes(recipe, int(nodes), f"the Slurm allocation has {nodes} nodes")
    gpus = _gpus()
    if gpus is not None and cluster.gpus_per_node > gpus:
        yield RecipeError(
            "cluster.gpus_per_node",
            f"the Slurm allocation has {gpus} GPUs on each node",
            f"Submit with sbatch --gres=gpu:{cluster.gpus_per_node}, or write cluster.gpus_per_node={gpus}",
            value=cluster.gpus_per_node,
        )
    elif gpus is not None and 0 < cluster.gpus_per_node < gpus:
        used = cluster.gpus_per_node
        yield f"The Slurm allocation has {gpus} GPUs on each node, cluster.gpus_per_node={used} of them work."


def _nodes(recipe: Recipe, there: int, rule: str) -> Finding:
    wanted = recipe.cluster.num_nodes
    if wanted == 1:
        return f"{rule[0].upper()}{rule[1:]}, cluster.num_nodes=1 uses one of them."
    remedy = f"Submit with sbatch --nodes={wanted}, or write cluster.num_nodes={there}"
    return RecipeError("cluster.num_nodes", rule, remedy, value=wanted)


def _gpus() -> int | None:
    """GPUs of a node: SLURM_GPUS_ON_NODE, or the last number of SLURM_GPUS_PER_NODE ("a100:4", "4(x2)")."""
    if (here := os.environ.get("SLURM_GPUS_ON_NODE", "")).isdigit():
        return int(here)
    found = re.search(r"(\d+)(?:\(x\d+\))?$", os.environ.get("SLURM_GPUS_PER_NODE", ""))
    return int(found[1]) if found else None


def ray(loaded: LoadedRecipe) -> Iterator[Finding]:
    """Whether the cluster at RAY_ADDRESS answers, and has the nodes and devices."""
    address, recipe = os.environ.get("RAY_ADDRESS", ""), loaded.recipe
    cluster = recipe.cluster
    if address in ("", "local") or cluster.simulated:
        return
    try:
        found = [node for node in _alive(address) if not _left_out(node, cluster.exclude_nodes)]
    except ImportError:
        yield f"RAY_ADDRESS={address} is set, but ray is not installed here, so its nodes are not counted."
        return
    except Exception as error:  # sockets, wrong tokens and wrong versions raise a dozen kinds; none is our own mistake
        rule = f"no Ray cluster answers there ({reason(error)})"
        yield RecipeError("RAY_ADDRESS", rule, "Start it first, or unset it", value=address)
        return
    resource, unit = ("GPU", "GPUs") if cluster.gpus_per_node else (_SLOT, f"worker slots ({_SLOT})")
    key, need = (
        ("cluster.gpus_per_node", cluster.gpus_per_node)
        if cluster.gpus_per_node
        else ("cluster.cpu_slots_per_node", cluster.cpu_slots_per_node)
    )
    has = [int(node["Resources"].get(resource, 0)) for node in found]
    fitting = sum(devices >= need for devices in has)
    if len(found) < cluster.num_nodes:
        yield RecipeError(
            "cluster.num_nodes",
            f"the Ray cluster has {len(found)} nodes",
            f"Join more with ray start --address={address}, or change the recipe",
            value=cluster.num_nodes,
        )
    elif fitting < cluster.num_nodes:
        yield RecipeError(
            key,
            f"of the Ray cluster's {len(found)} nodes {fitting} have so many {unit}; {cluster.num_nodes} must",
            "Start Ray there with more, or change the recipe",
            value=need,
        )
    elif fitting > cluster.num_nodes:
        yield f"The Ray cluster has {fitting} nodes that fit, cluster.num_nodes={cluster.num_nodes} of them work."


def _left_out(node: dict, names: list[str]) -> bool:
    called = (node["NodeName"], node["NodeManagerAddress"])
    return any(name in called or (len(name) >= 8 and node["NodeID"].startswith(name)) for name in names)


def _alive(address: str) -> list[dict]:
    """The nodes that are alive, as ``ray.nodes()`` lists them."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    if port.isdigit():  # ray itself would try for minutes
        socket.create_connection((host, int(port)), timeout=10.0).close()
    import ray  # pyright: ignore[reportMissingImports]

    member = ray.is_initialized()
    if not member:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    try:
        return [node for node in ray.nodes() if node["Alive"]]
    finally:
        if not member:
            with suppress(Exception):
                ray.shutdown()
