"""Turns with the memory of shared devices (``fastkd.turns``), taken by pools of actors.

Where roles have devices of their own nobody takes turns, and neither does a teacher in vLLM engines: its weights and
its room for keys and values stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastkd import engine_actors
from fastkd.actors import WorkerDied
from fastkd.config import Recipe
from fastkd.ray_pools import RayPool
from fastkd.turns import Turns, give_memory, take_memory


class PoolTurns(Turns):
    """``Turns`` of a recipe's pools, which come by ``add``. For a role that takes no turns nothing is done.

    Args:
        recipe: whether roles share devices, and what the workers of a role are.
    """

    def __init__(self, recipe: Recipe):
        self._of_pools: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {}
        super().__init__(self._of_pools)
        loop, generation = recipe.distillation, recipe.policy.generation
        self.shared = (
            generation.colocated.enabled
            and not loop.resource_isolation.enabled
            and loop.max_off_policy_steps == 0  # who samples ahead of training cannot wait for a turn
        )
        """Whether roles take turns at all."""
        self._in_vllm = {"generation": generation.backend == "vllm", "teacher": recipe.teacher.backend == "vllm"}

    def add(self, pool: RayPool[Any], lost: Callable[[WorkerDied], None] | None = None) -> None:
        """A pool, whose workers hold their memory.

        Args:
            pool: of one role.
            lost: replaces a worker that is found dead; its successor holds the memory then. None: the death is raised.
        """

        def call(method: Callable[[Any], None]) -> None:
            try:
                pool.run(method)
            except WorkerDied as error:
                if lost is None:
                    raise
                lost(error)

        in_vllm = self._in_vllm.get(pool.role, False)
        if not self.shared or (in_vllm and pool.role == "teacher"):
            return
        give, take = (engine_actors.sleep, engine_actors.wake) if in_vllm else (give_memory, take_memory)
        self._of_pools[pool.role] = (lambda: call(give), lambda: call(take))
        self.holds(pool.role)

    def take(self, role: str) -> None:
        """``Turns.take``, if the role takes turns."""
        if role in self.calls:
            super().take(role)

    def holds(self, role: str) -> None:
        """``Turns.holds``, if the role takes turns."""
        if role in self.calls:
            super().holds(role)
