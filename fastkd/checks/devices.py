"""Rules of who gets which devices: role partition, sharding, engines on nodes, data-parallel divisibility."""

from __future__ import annotations

from collections.abc import Iterator

from fastkd.checks.finding import Finding
from fastkd.config import Recipe, Teacher
from fastkd.errors import RecipeError
from fastkd.recipe import LoadedRecipe


def roles(loaded: LoadedRecipe) -> Iterator[Finding]:
    recipe = loaded.recipe
    problems = [*(_isolation(recipe) if recipe.distillation.resource_isolation.enabled else _shared(recipe))]
    yield from problems
    if problems:
        return  # the sizes below would only repeat the mistake
    sizes = recipe.role_sizes
    yield from _sharding("policy", recipe.policy, "training", sizes.training, recipe)
    yield from _sharding("teacher", recipe.teacher, "teacher", sizes.teacher, recipe)
    if recipe.policy.generation.backend == "vllm":
        yield from _engines(recipe, sizes.generation)
    shard = recipe.policy.dtensor_cfg.tensor_parallel_size * recipe.policy.dtensor_cfg.context_parallel_size
    if sizes.training % shard == 0:
        yield from _data_parallel(recipe, sizes.training // shard)


def _engines(recipe: Recipe, devices: int) -> Iterator[RecipeError]:
    """An engine is one process that starts its workers on one node, beside nobody when it is wider than a GPU."""
    engine, cluster = recipe.policy.generation.vllm_cfg, recipe.cluster
    gpus = engine.devices
    key = "policy.generation.vllm_cfg.tensor_parallel_size"
    per_node = min(cluster.gpus_per_node, devices)
    if devices % gpus:
        yield RecipeError(
            key,
            f"{devices} generation devices do not divide into engines of tensor × pipeline = {gpus}",
            "Change it, or the nodes given to generation",
            value=engine.tensor_parallel_size,
        )
    elif per_node and per_node % gpus:
        yield RecipeError(
            key,
            f"an engine of tensor × pipeline = {gpus} does not fit the {per_node} GPUs of a node",
            f"Write a divisor of {per_node}",
            value=engine.tensor_parallel_size,
        )
    elif gpus > 1 and cluster.gpus_per_node and recipe.policy.generation.colocated.enabled:
        yield RecipeError(
            key,
            "an engine that shares its GPUs with training and teacher uses one GPU",
            f"Write {key}=1, or give generation nodes of its own (distillation.resource_isolation)",
            value=engine.tensor_parallel_size,
        )
    if engine.gpu_memory_utilization == 0:
        key = "policy.generation.vllm_cfg.gpu_memory_utilization"
        yield RecipeError(key, "an engine without memory cannot hold its weights", "Write 0.6", value=0)


def _sharding(name: str, model: Teacher, role: str, devices: int, recipe: Recipe) -> Iterator[Finding]:
    tensor, context = model.dtensor_cfg.tensor_parallel_size, model.dtensor_cfg.context_parallel_size
    if devices % (tensor * context):
        formula = f"{role} devices / (tensor × context parallel size) = {devices} / ({tensor} × {context})"
        yield RecipeError(
            f"{name}.dtensor_cfg.tensor_parallel_size",
            f"data parallel size = {formula} must be a whole number",
            f"Change {name}.dtensor_cfg.tensor_parallel_size or context_parallel_size, or the nodes of the role",
            value=tensor,
        )
    elif recipe.cluster.gpus_per_node and tensor > recipe.cluster.gpus_per_node:
        yield (
            f"{name}.dtensor_cfg.tensor_parallel_size={tensor} spans nodes of {recipe.cluster.gpus_per_node} GPUs: "
            "every layer then waits for the network."
        )
    experts = model.dtensor_cfg.expert_parallel_size
    if devices % experts:
        yield RecipeError(
            f"{name}.dtensor_cfg.expert_parallel_size",
            f"{devices} {role} devices do not divide into groups of {experts} that share the experts",
            f"Use a divisor of {devices}, whatever the tensor parallel size is",
            value=experts,
        )


def _data_parallel(recipe: Recipe, ranks: int) -> Iterator[Finding]:
    loop = recipe.distillation
    formula = "student DP = training devices / (tensor × context parallel size)"
    if recipe.policy.train_global_batch_size % ranks:
        yield RecipeError(
            "policy.train_global_batch_size",
            f"must be a multiple of the student's data parallel size {ranks} ({formula})",
            f"Write a multiple of {ranks}",
            value=recipe.policy.train_global_batch_size,
        )
    if loop.batch_size % ranks:
        yield RecipeError(
            "distillation.num_prompts_per_step",
            f"prompts × generations = {loop.batch_size} must be a multiple of the student's data parallel size {ranks} "
            f"({formula})",
            f"Write a multiple of {ranks}",
            value=loop.num_prompts_per_step,
        )
    if recipe.validation_enabled and loop.val_batch_size % ranks:
        yield (
            f"distillation.val_batch_size={loop.val_batch_size} is not a multiple of the student's data parallel "
            f"size {ranks}: some ranks idle during validation."
        )


def _isolation(recipe: Recipe) -> Iterator[RecipeError]:
    cluster, roles = recipe.cluster, recipe.distillation.resource_isolation.roles
    where = "distillation.resource_isolation"
    if recipe.policy.generation.colocated.enabled:
        yield RecipeError(
            "policy.generation.colocated.enabled",
            f"{where} requires policy.generation.colocated.enabled=false",
            "Write policy.generation.colocated.enabled=false",
            value=True,
        )
    named = [("training", roles.training), ("generation", roles.generation), ("teacher", roles.teacher)]
    for name, role in named:
        if role.num_nodes < 1:
            yield RecipeError(
                f"{where}.roles.{name}.num_nodes",
                "every role needs at least one node of its own",
                f"Write {where}.roles.{name}.num_nodes=1",
                value=role.num_nodes,
            )
        if role.gpus_per_node != cluster.gpus_per_node:
            yield RecipeError(
                f"{where}.roles.{name}.gpus_per_node",
                f"resource_isolation enforces node-level role isolation: it must equal "
                f"cluster.gpus_per_node={cluster.gpus_per_node}",
                f"Write {cluster.gpus_per_node}, or leave the key out",
                value=role.gpus_per_node,
            )
    nodes = sum(role.num_nodes for _, role in named)
    if nodes != cluster.num_nodes:
        parts = " + ".join(f"{name} {role.num_nodes}" for name, role in named)
        yield RecipeError(
            "cluster.num_nodes",
            f"the roles must exactly partition cluster nodes, but {parts} = {nodes}",
            f"Write cluster.num_nodes={nodes}, or change {where}.roles.*.num_nodes",
            value=cluster.num_nodes,
        )


def _shared(recipe: Recipe) -> Iterator[RecipeError]:
    colocated, cluster = recipe.policy.generation.colocated, recipe.cluster
    if colocated.enabled:
        return
    where = "policy.generation.colocated.resources"
    if cluster.num_nodes == 1:
        key, given, most, unit = (
            f"{where}.gpus_per_node",
            colocated.resources.gpus_per_node,
            cluster.gpus_per_node,
            "GPUs",
        )
    else:
        key, given, most, unit = f"{where}.num_nodes", colocated.resources.num_nodes, cluster.num_nodes, "nodes"
    if given is None or given >= most:
        yield RecipeError(
            key,
            f"with colocated.enabled=false generation takes some of the {most} {unit} and leaves some for training",
            f"Write a number from 1 to {most - 1}" if most > 1 else "Write policy.generation.colocated.enabled=true",
            value=given,
        )
