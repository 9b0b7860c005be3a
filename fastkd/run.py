"""The command line: ``python -m fastkd.run RECIPE [override …] [--check | --plan | --rehearse | --memory-test]``.

A mistake of the user is one paragraph on stderr and exit code 2, with nothing written anywhere. ``--check``
and ``--plan`` stay clear of torch and transformers, so that they answer at once.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import traceback
from typing import TYPE_CHECKING

from fastkd.errors import MissingDependency, RecipeErrors, UserError

if TYPE_CHECKING:
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
  python -m fastkd.run recipes/topk512_qwen3_4b.yaml --plan --device a100-40 --sweep
  python -m fastkd.run recipes/topk512_qwen3_4b.yaml --rehearse

The same command again resumes an unfinished run from its newest checkpoint.

exit codes:
  0 done   1 failed while running   2 a mistake in the recipe or its files   130 interrupted
"""

_PIP_NAMES = {"yaml": "pyyaml", "math_verify": "'math-verify[antlr4_13_2]'"}


def main(argv: list[str] | None = None) -> int:
    """Run a recipe; returns the exit code. ``argv`` defaults to the process's arguments."""
    parser = _parser()
    options = parser.parse_intermixed_args(argv)
    if not options.plan and (options.sweep or options.json or options.device or options.rates or options.chart):
        parser.error("--sweep, --json, --device, --rates and --chart go with --plan")
    if options.check + options.plan + options.rehearse + options.memory_test > 1:
        parser.error("--check, --plan, --rehearse and --memory-test do different things: give one")
    if options.keep and not options.rehearse:
        parser.error("--keep goes with --rehearse")
    try:
        if options.rehearse:
            return _rehearse(options)
        if options.memory_test:
            return _memory_test(options)
        return _plan(options) if options.plan else _main(options.recipe, options.override, options.check)
    except UserError as error:
        _complain(error)
        return USER_MISTAKE
    except KeyboardInterrupt:
        print("\ninterrupted; the same command resumes from the newest checkpoint", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if isinstance(error.__cause__, UserError):  # a worker met the mistake first
            _complain(error.__cause__)
            return USER_MISTAKE
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
    parser.add_argument("--plan", action="store_true", help="predict memory and time of every role, and stop")
    parser.add_argument(
        "--rehearse", action="store_true", help="run it small: its whole topology on this machine's CPU, and stop"
    )
    parser.add_argument(
        "--memory-test", action="store_true", help="measure one worst-case step per role beside the plan, and stop"
    )
    parser.add_argument("--keep", metavar="DIR", help="with --rehearse: leave its models, texts and run folder there")
    plan = parser.add_argument_group("with --plan")
    plan.add_argument(
        "--device",
        default="",
        help="a100-40 where no known GPU is here; a100-80, h100, h200, b200, gh200, or of --rates",
    )
    plan.add_argument(
        "--rates", metavar="FILE", help="your own rates and assumptions, over those of fastkd/plan/rates.yaml"
    )
    plan.add_argument("--sweep", action="store_true", help="propose better splits of the same devices over the roles")
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")
    plan.add_argument("--chart", metavar="PNG", help="draw the plan")
    return parser


def _without_files(options: argparse.Namespace) -> LoadedRecipe:
    """The recipe, whose models, data and nodes need not be here."""
    from fastkd.checks import load_and_check
    from fastkd.plan.command import hinders
    from fastkd.recipe import load_recipe

    try:
        loaded, _ = load_and_check(options.recipe, options.override)
    except RecipeErrors as found:
        if errors := [error for error in found.errors if hinders(error)]:
            raise RecipeErrors(errors) from None
        loaded = load_recipe(options.recipe, options.override)
    return loaded


def _rehearse(options: argparse.Namespace) -> int:
    try:
        loaded = _without_files(options)
        os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers reads it: nothing of a rehearsal is on a hub
        from fastkd.rehearse.command import rehearse
    except ModuleNotFoundError as error:
        raise _missing(error) from None
    try:
        return OK if rehearse(loaded, options.keep) else FAILED
    except KeyboardInterrupt:
        print("\ninterrupted; a rehearsal leaves nothing to resume", file=sys.stderr)
        return INTERRUPTED


def _memory_test(options: argparse.Namespace) -> int:
    try:
        loaded = _without_files(options)
        from fastkd.memory_test import memory_test
    except ModuleNotFoundError as error:
        raise _missing(error) from None
    return OK if memory_test(loaded) else FAILED


def _plan(options: argparse.Namespace) -> int:
    try:
        loaded = _without_files(options)
        from fastkd.plan.command import PlanOptions, run_plan
    except ModuleNotFoundError as error:
        raise _missing(error) from None
    run_plan(loaded, PlanOptions(options.device, options.rates, options.json, options.sweep, options.chart))
    return OK


def _main(path: str, overrides: list[str], only_check: bool) -> int:
    try:
        from fastkd.checks import load_and_check, local_run_problems, needs_cluster
        from fastkd.describe import summary
        from fastkd.fits import memory_warnings
    except ModuleNotFoundError as error:
        raise _missing(error) from None

    loaded, report = load_and_check(path, overrides)
    report.warnings.extend(memory_warnings(loaded))
    apart = local_run_problems(loaded)
    if only_check:
        print(summary(loaded, report))
        if apart:
            print("\nTo run it here, in one process on one device, add")
            print("  " + " ".join(error.remedy.removeprefix("Add ") for error in apart))
        return OK
    if needs_cluster(loaded.recipe) and importlib.util.find_spec("ray") is None:
        raise RecipeErrors(apart)
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    try:
        from fastkd.runner import run
    except ModuleNotFoundError as error:
        raise _missing(error) from None
    if loaded.recipe.data.blend.enabled:
        from fastkd import offpolicy

        offpolicy.run(loaded, loaded.recipe.data.blend)
    else:
        run(loaded)
    return OK


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
