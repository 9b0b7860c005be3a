"""The command line: ``python -m fastkd.run RECIPE [override …] [--check]``.

A mistake of the user is one paragraph on stderr and exit code 2, with nothing written anywhere. ``--check``
stays clear of torch and transformers, so that it answers at once.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from typing import TYPE_CHECKING

from fastkd.errors import MissingDependency, RecipeErrors, UserError

if TYPE_CHECKING:
    from fastkd.checks import CheckReport
    from fastkd.recipe import LoadedRecipe

OK, FAILED, USER_MISTAKE, INTERRUPTED = 0, 1, 2, 130

_EPILOG = """\
overrides:
  a.b=v          set a key            policy.optimizer.kwargs.lr=1e-5
  a.b=null       set it to nothing    data.validation=null
  a.list.0.b=v   an entry of a list   data.train.0.data_path=problems.jsonl
  a.list=[x,y]   a whole list         'policy.generation.stop_strings=["</answer>"]'
  ~a.b           back to the default  ~logger.log_dir
  (+a.b=v and ++a.b=v mean the same as a.b=v; docs/recipes.md lists every key)

examples:
  python -m fastkd.run recipes/arithmetic_cpu.yaml
  python -m fastkd.run recipes/arithmetic_cpu.yaml distillation.max_num_steps=20 logger.log_dir=runs/short
  python -m fastkd.run recipes/distillation_math.yaml --check

The same command again resumes an unfinished run from its newest checkpoint.

exit codes:
  0 done   1 failed while running   2 a mistake in the recipe or its files   130 interrupted
"""

_PIP_NAMES = {"yaml": "pyyaml", "math_verify": "'math-verify[antlr4_13_2]'"}


def main(argv: list[str] | None = None) -> int:
    """Run a recipe; returns the exit code. ``argv`` defaults to the process's arguments."""
    options = _parser().parse_intermixed_args(argv)
    try:
        return _main(options.recipe, options.override, options.check)
    except UserError as error:
        _complain(error)
        return USER_MISTAKE
    except KeyboardInterrupt:
        print("\ninterrupted; the same command resumes from the newest checkpoint", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        traceback.print_exc()
        print(f"\nfailed: {type(error).__name__}: {error}", file=sys.stderr)
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastkd.run",
        description="Distil a teacher into a student on the student's own samples, as a recipe says.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, for example recipes/arithmetic_cpu.yaml")
    parser.add_argument("override", nargs="*", help="keys to change, see below")
    parser.add_argument("--check", action="store_true", help="check the recipe, print what it says, and stop")
    return parser


def _main(path: str, overrides: list[str], only_check: bool) -> int:
    try:
        from fastkd.checks import check, local_run_problems
        from fastkd.recipe import load_recipe
    except ModuleNotFoundError as error:
        raise _missing(error) from None

    loaded = load_recipe(path, overrides)
    report = check(loaded)
    if report.errors:
        raise RecipeErrors(report.errors)
    apart = local_run_problems(loaded)
    if only_check:
        print(summary(loaded, report))
        if apart:
            print("\nTo run it here, in one process on one device, add")
            print("  " + " ".join(error.remedy.removeprefix("Add ") for error in apart))
        return OK
    if apart:
        raise RecipeErrors(apart)
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    try:
        from fastkd.runner import run
    except ModuleNotFoundError as error:
        raise _missing(error) from None
    run(loaded)
    return OK


def summary(loaded: LoadedRecipe, report: CheckReport) -> str:
    """What a recipe amounts to: models, loss, batch arithmetic, devices, and what has no effect or is
    doubtful."""
    recipe = loaded.recipe
    loop, policy, loss = recipe.distillation, recipe.policy, recipe.loss_fn
    temperature, top_p, top_k = policy.generation.sampling()
    mixed = f", {loss.mixed_kl_weight:g} forward" if loss.kl_type == "mixed" else ""
    updates = loop.batch_size // policy.train_global_batch_size
    budget = (
        f"{policy.train_mb_tokens} tokens" if policy.train_mb_tokens else f"{policy.train_micro_batch_size} rollouts"
    )
    sizes = recipe.role_sizes
    kind = "GPUs" if recipe.cluster.device == "cuda" else "CPU workers"
    rows = [
        ("recipe", str(loaded.path)),
        ("student", f"{policy.model_name}, {policy.precision}"),
        (
            "teacher",
            f"{recipe.teacher.model_name}, {recipe.teacher.precision}, top {loop.topk_logits_k} logits per token",
        ),
        ("loss", f"{loss.kl_type} KL{mixed}; outside the top-k: {loss.outside}; temperature {loss.temperature:g}"),
        (
            "step",
            f"{loop.num_prompts_per_step} prompts × {loop.num_generations_per_prompt} = {loop.batch_size} rollouts",
        ),
        ("", f"{updates} optimizer step(s) of {policy.train_global_batch_size}, micro-batches of {budget}"),
        (
            "length",
            f"prompt ≤ {recipe.data.max_input_seq_length}, response ≤ {policy.generation.max_new_tokens}, "
            f"together ≤ {policy.max_total_sequence_length} tokens",
        ),
        (
            "sampling",
            f"{policy.generation.backend}, temperature {temperature:g}, top_p {top_p:g}, top_k {top_k or 'all'}",
        ),
        ("stop", f"after {loop.max_num_steps} steps or {loop.max_num_epochs} epochs"),
        ("validation", _validation(loaded)),
        (
            "devices",
            f"{recipe.cluster.num_nodes} node(s): train={sizes.training}, generation={sizes.generation}, "
            f"teacher={sizes.teacher} {kind}; {_sharding(loaded)}",
        ),
        ("run folder", recipe.logger.log_dir),
        (
            "checkpoints",
            f"every {recipe.checkpointing.save_period} steps in {recipe.checkpointing.checkpoint_dir}"
            if recipe.checkpointing.enabled
            else "none",
        ),
    ]
    lines = [f"{name:<12}{text}" for name, text in rows]
    if loaded.ignored:
        lines += ["", "No effect here:", *(f"  {key}" for key in loaded.ignored)]
    if report.warnings:
        lines += ["", "Warnings:", *(f"  {text}" for text in report.warnings)]
    return "\n".join([*lines, "", "The recipe is valid."])


def _validation(loaded: LoadedRecipe) -> str:
    recipe, loop = loaded.recipe, loaded.recipe.distillation
    if not recipe.validation_enabled:
        return "none"
    when = [f"every {loop.val_period} steps"] if loop.val_period else []
    when += ["at the start"] * loop.val_at_start + ["at the end"] * loop.val_at_end
    temperature, _, _ = recipe.policy.generation.sampling(validation=True)
    how = "greedy" if temperature == 0 else f"temperature {temperature:g}"
    return f"{', '.join(when)}; {loop.max_val_samples or 'all'} samples, {how}"


def _sharding(loaded: LoadedRecipe) -> str:
    parts = []
    for name, model in (("student", loaded.recipe.policy), ("teacher", loaded.recipe.teacher)):
        sizes = loaded.recipe.role_sizes
        devices = sizes.training if name == "student" else sizes.teacher
        tensor, context = model.dtensor_cfg.tensor_parallel_size, model.dtensor_cfg.context_parallel_size
        parts.append(f"{name} TP{tensor} CP{context} DP{devices // (tensor * context)}")
    return ", ".join(parts)


def _complain(error: UserError) -> None:
    problems = error.errors if isinstance(error, RecipeErrors) else [error]
    if len(problems) > 1:
        print(f"{len(problems)} problems:", file=sys.stderr)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)


def _missing(error: ModuleNotFoundError) -> UserError:
    """A package that is not installed, with the command that installs it; a bug of ours is raised as it
    is."""
    module = (error.name or "").partition(".")[0]
    if isinstance(error, UserError):
        return error
    if module in ("", "fastkd"):
        raise error
    return MissingDependency(module, "this package is not installed", f"pip install {_PIP_NAMES.get(module, module)}")


if __name__ == "__main__":
    raise SystemExit(main())
