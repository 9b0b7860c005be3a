"""Joining a Ray cluster, or starting one of one node."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import ray  # pyright: ignore[reportMissingImports]

from fastkd.config import Recipe
from fastkd.errors import UserError
from fastkd.log import logger
from fastkd.placement import SLOT
from fastkd.simulated_cluster import simulated


@contextmanager
def connected(recipe: Recipe, *, cpu_slots: int = 1) -> Iterator[None]:
    """Member of a cluster while the context lasts: that of RAY_ADDRESS, that of this machine, or a new one.

    A new one has this machine alone, with the GPUs that Ray finds or ``cpu_slots`` slots. A process that is a member
    already stays one.

    Raises:
        UserError: RAY_ADDRESS answers to nobody, or there is no cluster and the recipe needs several nodes.
    """
    if ray.is_initialized():
        yield
        return
    if recipe.cluster.simulated:
        nodes = recipe.cluster.num_nodes
        logger.info(f"simulated cluster: {nodes} Ray nodes of {cpu_slots} worker slots, all of them on this machine")
        with simulated(nodes, cpu_slots):
            yield
        return
    _connect(recipe, cpu_slots)
    try:
        yield
    finally:
        ray.shutdown()


def _connect(recipe: Recipe, cpu_slots: int) -> None:
    given, several = os.environ.get("RAY_ADDRESS"), recipe.cluster.num_nodes > 1
    if (given and given != "local") or several:
        try:
            if given:
                _knock(given)
            ray.init(address=given or "auto", logging_level=logging.WARNING)
        except (OSError, ValueError) as error:
            if given:
                key, rule = "RAY_ADDRESS", "no Ray cluster answers there"
                raise UserError(key, rule, "Run 'ray start --head' first, or unset it", value=given) from error
            raise UserError(
                "cluster.num_nodes",
                "there is no Ray cluster to join, and a new one has this machine alone",
                "Run 'ray start --head' here and 'ray start --address=…' on the other nodes, or set RAY_ADDRESS",
                value=recipe.cluster.num_nodes,
            ) from error
        return
    slots = {} if recipe.cluster.device == "cuda" else {SLOT: float(cpu_slots)}
    try:
        # Joins what "ray start" left here, or else starts anew. "auto" would join any cluster on this machine.
        ray.init(resources=slots or None, include_dashboard=False, logging_level=logging.WARNING)
    except ValueError as error:
        if "existing cluster" not in str(error):
            raise
        ray.init(logging_level=logging.WARNING)  # it has resources of its own


def _knock(address: str) -> None:
    """OSError when nobody listens; Ray itself would try for minutes."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=10.0).close()
