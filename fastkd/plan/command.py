"""``--plan`` on the command line: tables, ``--json``, ``--sweep`` and ``--chart``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fastkd.errors import RecipeError, UserError
from fastkd.plan.assemble import Plan, plan_of
from fastkd.plan.here import here
from fastkd.plan.rates import load_rates
from fastkd.plan.splits import Proposal, better_splits
from fastkd.recipe import LoadedRecipe

WIDTH = 120
"""Columns of the tables where there is no terminal."""


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What the command line asks of a plan."""

    device: str = ""
    """A name of the table of rates; empty: this machine's GPU, or the table's default."""
    rates: str | None = None
    """A file over that table."""
    json: bool = False
    sweep: bool = False
    chart: str | None = None
    """A PNG to write."""


def hinders(error: RecipeError) -> bool:
    """Whether a failed check hinders a plan: one about files, folders and nodes that are not here does not."""
    absent = ("no such", "HF_HUB_OFFLINE is set", "is a file", "no permission", "allocation has", "Ray cluster")
    about = (
        "model_name",
        "tokenizer.name",
        "data_path",
        "prompt_file",
        "log_dir",
        "checkpoint_dir",
        "_node",
        "_nodes",
        "RAY_ADDRESS",
    )
    return not (error.key.endswith(about) and any(words in error.rule for words in absent))


def run_plan(loaded: LoadedRecipe, options: PlanOptions) -> None:
    """Print the plan of a recipe.

    Raises:
        ModelError: the sizes of a model are not known.
        UserError: an option is wrong.
    """
    cpu = not loaded.recipe.cluster.gpus_per_node
    device = options.device or ("" if cpu else here())
    plan = plan_of(loaded, load_rates(device, options.rates, cpu=cpu))
    proposals = better_splits(plan) if options.sweep else []
    if options.json:
        tree = {"recipe": str(loaded.path), **plan.to_json()}
        if not plan.fits:
            tree["knobs"] = _knobs(plan)
        if options.sweep:
            tree["splits"] = [
                {
                    "overrides": one.overrides,
                    "step_seconds": one.plan.step_seconds,
                    "device_hours": one.plan.device_hours,
                }
                for one in proposals
            ]
        print(json.dumps(tree, indent=2))
    else:
        _show(loaded, plan, proposals if options.sweep else None)
        if not options.device and not cpu:
            name = plan.layout.rates.device.name
            print(f"device       {name}: " + ("this machine's" if device else "the default, no known GPU is here"))
    if options.chart:
        _draw(plan, options.chart, loaded.path.stem, say=not options.json)


def _show(loaded: LoadedRecipe, plan: Plan, proposals: list[Proposal] | None) -> None:
    from rich.console import Console

    from fastkd.plan.tables import render, render_splits

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    console.print(render(plan, str(loaded.path)))
    if proposals is not None:
        console.print(render_splits(plan, proposals))


def _knobs(plan: Plan) -> dict[str, list[dict]]:
    from fastkd.plan.knobs import knobs

    return {
        role: [
            {"key": one.key, "value": one.value, "note": one.note, "bytes": one.total, "fits": one.fits}
            for one in knobs(plan, role)
        ]
        for role in plan.tight
    }


def _draw(plan: Plan, name: str, title: str, *, say: bool) -> None:
    path = Path(name)
    if path.suffix.lower() != ".png" or not path.parent.is_dir():
        rule = "must name a .png file in a folder that exists"
        raise UserError("--chart", rule, "Write --chart plan.png", value=name)
    from fastkd.plan.chart import draw

    draw(plan, path, title)
    if say:
        print(f"chart        {path}")
