"""What keeps a recipe from running in one process on one device, and what is accepted but not acted on yet."""

from __future__ import annotations

from collections.abc import Iterator

from fastkd.checks.finding import Finding, models_of
from fastkd.config import Recipe
from fastkd.errors import RecipeError
from fastkd.recipe import LoadedRecipe


def local_run_problems(loaded: LoadedRecipe) -> list[RecipeError]:
    """What asks for more than one process on one device, each with the override that makes it run there."""
    return [
        RecipeError(
            key,
            "without ray a run is one process on one device",
            f"Add {key}={_yaml(to)}",
            value=value,
        )
        for key, value, to in _beyond_one_process(loaded.recipe)
    ]


def needs_cluster(recipe: Recipe) -> bool:
    """Whether a recipe asks for more than one process on one device, so that workers are actors of a Ray cluster."""
    keys = {key for key, _, _ in _beyond_one_process(recipe)}
    # One vLLM engine may live in the same process as the student.
    return recipe.cluster.simulated or bool(keys - {"policy.generation.backend"})


def _beyond_one_process(recipe: Recipe) -> Iterator[tuple[str, object, object]]:
    """(key, its value, the value that one process on one device takes)."""
    loop, generation = recipe.distillation, recipe.policy.generation
    rules: list[tuple[bool, str, object, object]] = [
        (generation.backend == "vllm", "policy.generation.backend", "vllm", "transformers"),
        (recipe.teacher.backend == "vllm", "teacher.backend", "vllm", "fastkd"),
        (not generation.colocated.enabled, "policy.generation.colocated.enabled", False, True),
        (loop.resource_isolation.enabled, "distillation.resource_isolation.enabled", True, False),
        (loop.max_off_policy_steps > 0, "distillation.max_off_policy_steps", loop.max_off_policy_steps, 0),
        (recipe.cluster.num_nodes > 1, "cluster.num_nodes", recipe.cluster.num_nodes, 1),
        (recipe.cluster.gpus_per_node > 1, "cluster.gpus_per_node", recipe.cluster.gpus_per_node, 1),
    ]
    for name, model in models_of(recipe):
        sharding = model.dtensor_cfg
        for key in ("tensor_parallel_size", "context_parallel_size", "expert_parallel_size"):
            size = getattr(sharding, key)
            rules.append((size > 1, f"{name}.dtensor_cfg.{key}", size, 1))
        rules.append((sharding.cpu_offload, f"{name}.dtensor_cfg.cpu_offload", True, False))
    return ((key, value, to) for wrong, key, value, to in rules if wrong)


def idle(loaded: LoadedRecipe) -> Iterator[Finding]:
    """Keys of the tree that are set but that this version does not act on."""
    recipe = loaded.recipe
    settings = {
        "logger.mlflow_enabled": recipe.logger.mlflow_enabled,
        "logger.swanlab_enabled": recipe.logger.swanlab_enabled,
        "logger.monitor_gpus": recipe.logger.monitor_gpus,
        "data.train.processor": next((one.processor for one in recipe.data.train if one.processor), None),
        "data.validation.processor": next((one.processor for one in recipe.data.validation if one.processor), None),
    }
    for key, value in settings.items():
        if value:
            yield f"{key}={_yaml(value)} has no effect in this version."


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
