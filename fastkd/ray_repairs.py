"""Lost workers are replaced, ``cluster.max_restarts`` times per role.

Whose loss it is decides what comes after: an engine gets the newest weights (``fastkd.ray_sync``), a teacher scores
again, a training group goes on from a checkpoint. What they have in common is here: one replacement for all calls that
met the same death, the count, and the wait for another node.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

from fastkd.actors import NodeLost, WorkerDied
from fastkd.errors import UserError
from fastkd.log import logger
from fastkd.ray_pools import RayPool
from fastkd.turns import Turns

NODE_SECONDS = 120.0
"""How long a role waits for a node to take the place of one that is gone."""


class Repairs:
    """Replaces the workers of all roles.

    Args:
        most: restarts per role; the next loss ends the run.
        turns: of roles that share their devices; it is told whose workers are new.
    """

    def __init__(self, most: int, turns: Turns):
        self.most, self.turns = most, turns
        self.restarts: Counter[str] = Counter()
        """By role, so far."""
        self.closed = False
        """Whether the run has ended, and its workers with it."""
        self.mending = threading.RLock()
        """Whoever replaces workers, or gives weights to engines; one thread collects ahead while another trains."""

    def replace(self, pool: RayPool[Any], error: WorkerDied, rank: int | None = None) -> list[int]:
        """Build workers anew, unless that was done for another call.

        Args:
            pool: of the role that lost a worker.
            error: its death.
            rank: only this one, and those that went with its node; None: all.

        Returns:
            The ranks that were built anew.

        Raises:
            WorkerDied: ``error``, after too many restarts or the end of the run.
            NodeLost: no node took the place of one that is gone.
        """
        with self.mending:
            if pool.replaced(error):
                return []
            self._count(pool.role, error)
            self.turns.holds(pool.role)
            try:
                return pool.restart(rank, timeout=NODE_SECONDS)
            except UserError as none:
                if none.key != "cluster.num_nodes":
                    raise
                # No mistake of the user's: nothing that the recipe says has changed.
                what = f"the node is gone, and {none.rule}. {none.remedy}"
                raise NodeLost(error.role, error.rank, error.node, what) from None

    def _count(self, role: str, error: WorkerDied) -> None:
        if self.closed:  # whoever collects ahead sees its workers end with the run
            raise error
        self.restarts[role] += 1
        if self.restarts[role] > self.most:
            error.add_note(
                f"(the {role} role was restarted {self.most} times before: cluster.max_restarts={self.most})"
            )
            raise error
        logger.warning(f"{error}; restart {self.restarts[role]} of at most {self.most}")
