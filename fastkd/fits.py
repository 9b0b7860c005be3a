"""Does a recipe fit the GPUs? A warning for the roles that are too much for theirs, with the keys to turn first."""

from __future__ import annotations

from fastkd.errors import UserError
from fastkd.plan import load_rates, plan_of
from fastkd.plan.assemble import gib
from fastkd.plan.here import here
from fastkd.plan.knobs import knobs
from fastkd.plan.layout import RoleName
from fastkd.recipe import LoadedRecipe


def memory_warnings(loaded: LoadedRecipe) -> list[str]:
    """Roles whose planned memory is above a GPU's: this machine's where it has one that is known, else the default of
    the table of rates. Empty for a recipe without GPUs, and for models whose sizes are not known."""
    if not loaded.recipe.cluster.gpus_per_node:
        return []
    device = here()
    try:
        plan = plan_of(loaded, load_rates(device))
    except UserError:
        return []
    suffix = "" if device else ", the default of --plan"
    found = []
    for pool in plan.layout.pools:
        short: list[RoleName] = [role for role in pool if plan.short(role)]
        if plan.used(pool) <= plan.capacity and not short:
            continue
        role = short[0] if short else "generation" if "generation" in pool else pool[0]
        needs = f"{gib(plan.used(pool)):.0f} of {gib(plan.capacity):.0f} GiB"
        if plan.used(pool) <= plan.capacity:
            facts = plan.memory[role].facts
            needs = (
                f"{gib(facts['memory it needs']):.0f} of the {gib(facts['memory it may take']):.0f} GiB of an engine"
            )
        turn = ", ".join(one.override for one in knobs(plan, role) if one.value is not None)
        found.append(
            f"{' + '.join(pool)}: by the plan {needs} on {plan.layout.rates.device.name}{suffix}. Turn first: "
            f"{turn or 'the nodes of the role'}. For other GPUs see --plan --device."
        )
    return found
