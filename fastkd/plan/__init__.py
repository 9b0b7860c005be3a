"""Plans: what a recipe needs of every device and how long it takes, from shapes and a table of rates alone.

Memory follows what ``fastkd.parallel``, ``fastkd.losses`` and ``fastkd.optim`` allocate; time is arithmetic over an
editable table (``rates.yaml``). docs/plan.md explains both and compares them with measurements. Imports neither torch
nor transformers.
"""

from __future__ import annotations

from fastkd.plan.assemble import Plan, plan_of
from fastkd.plan.rates import Rates, load_rates
from fastkd.plan.shapes import Shape, published

__all__ = ["Plan", "Rates", "Shape", "load_rates", "plan_of", "published"]
