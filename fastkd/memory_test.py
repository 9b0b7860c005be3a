"""``--memory-test``: one worst-case step per role on this machine, its memory beside the plan's; nothing is written.

A recipe for one device is tested as it runs: student, generation and teacher one after another. Of a sharded one this
process is one rank of each group: it holds a rank's real parts and computes its real sizes, and collectives do nothing.
So it needs a rank's memory and no cluster, and what it computes is no number. Engines of vLLM take a share of a device
by themselves and are left out.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.distributed.device_mesh import DeviceMesh

from fastkd import memory_test_roles as roles
from fastkd import models, parallel
from fastkd.checks import needs_cluster
from fastkd.config import Recipe
from fastkd.config import Teacher as Model
from fastkd.driver import Pair, settle
from fastkd.errors import ModelError, UserError
from fastkd.memory_test_roles import Line
from fastkd.model_files import find_folder
from fastkd.plan import load_rates
from fastkd.plan.assemble import Plan, gib
from fastkd.plan.here import here
from fastkd.plan.layout import Layout, arrange, read
from fastkd.pools import local_device
from fastkd.profiling import available_gib
from fastkd.recipe import LoadedRecipe
from fastkd.rollout import Generation
from fastkd.shared_weights import shares_student
from fastkd.student import Student
from fastkd.teacher import Teacher

GENERATED = 32
"""Tokens that generation samples per sequence: its cache is planned for as many."""
KEY = "--memory-test"


@dataclass(frozen=True, slots=True)
class Report:
    """What was planned and measured."""

    lines: list[Line]
    notes: list[str]

    @property
    def holds(self) -> bool:
        """Whether the plan was right."""
        return all(line.holds for line in self.lines)


def memory_test(loaded: LoadedRecipe) -> bool:
    """Measure and print; whether the plan was right to 10 %.

    Raises:
        UserError: a model is not here, this machine is too small, or the recipe cannot be tested.
    """
    report = measure(loaded)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    console.print(_table(report))
    for note in report.notes:
        console.print(note)
    return report.holds


def measure(loaded: LoadedRecipe) -> Report:
    """The figures of every role. Raises as ``memory_test``."""
    apart = needs_cluster(loaded.recipe)
    gpu = torch.cuda.is_available() and loaded.recipe.cluster.gpus_per_node > 0
    cpu = not gpu
    layout = read(loaded, load_rates(here() if gpu else "", cpu=cpu))
    _can_be_tested(loaded.recipe, cpu)
    _room(Plan(layout), cpu)
    _weights(layout, loaded)
    pair = settle(loaded)
    layout = arrange(pair.recipe, layout.rates, layout.student, layout.teacher)
    if apart:
        device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    else:
        device = local_device(pair.recipe.cluster)
    return Report(list(_lines(pair, layout, device, apart)), list(_notes(layout, device, apart)))


def _lines(pair: Pair, layout: Layout, device: torch.device, apart: bool) -> Iterator[Line]:
    recipe = pair.recipe
    sampled = recipe.policy.generation.backend == "transformers" and not recipe.data.blend.enabled
    with _rank(recipe.policy, recipe.role_sizes.training, device, apart) as mesh:
        student = Student(recipe, device, pair.student_vocab, mesh)
        yield from roles.training(student, layout)
        if sampled and not apart:
            cut = _cut(layout, roles.sampling_recipe(recipe, GENERATED))
            yield from _generated(cut, student, pair)
        if shares_student(recipe):
            cut = _cut(layout, roles.scoring_recipe(recipe))
            yield from roles.scoring(Teacher(cut.recipe, device, pair.teacher_vocab, mesh, student), cut)
        del student
    gc.collect()
    if sampled and apart:
        cut = _cut(layout, roles.sampling_recipe(recipe, GENERATED))
        yield from _generated(cut, None, pair, device)
        gc.collect()
    if not shares_student(recipe) and recipe.teacher.backend == "fastkd":  # else an engine, which measures itself
        cut = _cut(layout, roles.scoring_recipe(recipe))
        with _rank(recipe.teacher, recipe.role_sizes.teacher, device, apart) as mesh:
            yield from roles.scoring(Teacher(cut.recipe, device, pair.teacher_vocab, mesh), cut)


def _generated(
    layout: Layout, student: Student | None, pair: Pair, device: torch.device | None = None
) -> Iterator[Line]:
    recipe = layout.recipe
    if student is not None:
        model, autocast = student.causal_lm, student.autocast_dtype
    else:  # as a worker of its own has it
        dtype, autocast = models.DTYPES[recipe.policy.precision], None
        name = recipe.policy.model_name
        model = models.load_causal_lm("policy.model_name", name, dtype=dtype, device=device or torch.device("cpu"))
        model.requires_grad_(False)
    worker = Generation.embedded(recipe, model, pair.tokenizer, pair.student_vocab, autocast)
    yield from roles.sampling(worker, layout, own=student is None)


def _cut(layout: Layout, recipe: Recipe) -> Layout:
    return arrange(recipe, layout.rates, layout.student, layout.teacher)


@contextmanager
def _rank(model: Model, devices: int, device: torch.device, apart: bool) -> Iterator[DeviceMesh | None]:
    """The mesh of a role, of which this process is rank 0 and nobody else is there; None on one device."""
    if not apart or devices == 1:
        yield None
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    degrees = model.dtensor_cfg
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=devices)
    try:
        yield parallel.build_mesh(degrees.tensor_parallel_size, degrees.context_parallel_size, None, device.type)
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------- before anything is allocated


def _can_be_tested(recipe: Recipe, cpu: bool) -> None:
    for name, model in (("policy", recipe.policy), ("teacher", recipe.teacher)):
        if model.dtensor_cfg.cpu_offload:
            raise UserError(
                f"{name}.dtensor_cfg.cpu_offload",
                "what lies in host memory is not measured",
                f"Add {name}.dtensor_cfg.cpu_offload=false to measure the rest; --plan counts both",
                value=True,
            )
    if cpu and recipe.cluster.gpus_per_node and not needs_cluster(recipe):
        rule = "torch sees no GPU here, and one is what the recipe is for"
        raise UserError(KEY, rule, "Add cluster.gpus_per_node=0 to measure on the CPU")


def _room(plan: Plan, cpu: bool) -> None:
    """A role at a time is there, generation with the student that lends it its weights."""
    wanted = {role: roles.peak(plan.memory[role]) for role in ("training", "teacher")}
    if plan.layout.recipe.policy.generation.backend == "transformers":
        wanted["generation"] = roles.peak(plan.memory["generation"]) + plan.memory["training"].state
    role = max(wanted, key=lambda one: wanted[one])
    free = _available() if cpu else float(torch.cuda.mem_get_info()[0])
    if wanted[role] > free:
        raise UserError(
            KEY,
            f"one device of {role} needs {gib(wanted[role]):.1f} GiB at its peak, and this machine has "
            f"{gib(free):.1f} GiB free",
            "Take a larger machine or smaller models and batches; --plan needs no memory",
        )


def _available() -> float:
    free = available_gib()
    return math.inf if free is None else free * 2**30


def _weights(layout: Layout, loaded: LoadedRecipe) -> None:
    shapes = (("policy", loaded.recipe.policy, layout.student), ("teacher", loaded.recipe.teacher, layout.teacher))
    for name, model, shape in shapes:
        folder = find_folder(loaded.locate(model.model_name))
        if folder is None or not any(any(folder.glob(kind)) for kind in ("*.safetensors", "*.bin")):
            raise ModelError(
                f"{name}.model_name",
                f"its weights are not on this machine ({shape.parameters:,} parameters, "
                f"{gib(2 * shape.parameters):.1f} GiB in bfloat16)",
                "Download it first, or take --plan, which needs no weights",
                value=model.model_name,
            )


# ---------------------------------------------------------------- what is printed


def _notes(layout: Layout, device: torch.device, apart: bool) -> Iterator[str]:
    recipe = layout.recipe
    yield f"Measured on {'a GPU' if device.type == 'cuda' else 'the CPU'}, tensors alone; " + (
        f"as one rank of {layout.train.devices} in training and of {layout.score.devices} in scoring: collectives were "
        "not run."
        if apart
        else "all roles in one process."
    )
    yield "Training: two micro-batches of the longest sequences. 'kept by a forward' is not judged."
    if recipe.data.blend.enabled:
        yield "A blend is not sampled from: no generation."
    elif recipe.policy.generation.backend == "vllm":
        share = recipe.policy.generation.vllm_cfg.gpu_memory_utilization
        yield f"vLLM takes {share:g} of a device by itself and was not started."
    else:
        yield f"Generation: the whole batch, {GENERATED} new tokens at most, planned for as many."
    if device.type == "cpu" and recipe.cluster.gpus_per_node:
        yield "Planned for a CPU too: kernels take other chunks on a GPU. --plan says what a GPU needs."


def _table(report: Report) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("role", "item", "planned MiB", "measured MiB", "difference", ""):
        table.add_column(column, justify="left" if column in ("role", "item", "") else "right")
    for line in report.lines:
        table.add_row(
            line.role,
            line.item,
            f"{line.planned / 2**20:,.2f}",
            f"{line.measured / 2**20:,.2f}",
            f"{line.difference:+.1%}",
            "" if line.holds else "beyond 10 %",
        )
    return table
