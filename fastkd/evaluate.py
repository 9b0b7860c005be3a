"""``python -m fastkd.evaluate MODEL``: greedy and sampled accuracy of a checkpoint on problems with known answers.

The answers come from the model in this process (``transformers``) or from one vLLM engine. They are appended to
``samples.jsonl`` as problems are finished; the same command again goes on where it was cut off, and its samples are
the same (vLLM's within the accuracy of its kernels). ``fastkd.answers`` says what the figures are.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastkd import log, models
from fastkd.answers import GREEDY, SAMPLED, Sample, Samples, summarise, table
from fastkd.batch import Prompt, Rollout
from fastkd.checks import engines, keys
from fastkd.config import Recipe
from fastkd.data import Renderer, load_problems
from fastkd.driver import locate
from fastkd.errors import RecipeError, RecipeErrors, UserError
from fastkd.files import write_json
from fastkd.grading import Graded, grade
from fastkd.log import console, logger
from fastkd.recipe import LoadedRecipe, load_recipe, recipe_from
from fastkd.rollout import Generation, Request
from fastkd.sampling import Sampler

Answers = Callable[[Sequence[Prompt], Request], Iterator[list[Rollout]]]
"""All rollouts of some prompts at a time, as they are finished."""
_REPORTS = 20
"""Lines of progress at most, for each mode."""


def evaluate(loaded: LoadedRecipe, folder: Path, *, samples: int, greedy: bool, device: torch.device) -> dict[str, Any]:
    """Sample, grade, and write ``samples.jsonl`` and ``summary.json``; returns the summary.

    Args:
        loaded: its student is evaluated on its validation problems, sampled as ``policy.generation`` says.
        samples: answers per problem; 0 = greedy alone.
        greedy: also one greedy answer per problem.

    Raises:
        UserError: model, data, folder or engine cannot be used.
    """
    recipe = locate(loaded)
    policy = recipe.policy
    tokenizer = models.load_tokenizer("policy.tokenizer.name", policy.tokenizer.name, policy.tokenizer.chat_template)
    config = models.load_config("policy.model_name", policy.model_name)
    prompts = _prompts(recipe, tokenizer)
    sampler = Sampler(*policy.generation.sampling())
    modes = {GREEDY: (Sampler(0.0), 1)} if greedy else {}
    if samples:
        modes[SAMPLED] = (sampler, samples)
    vllm = policy.generation.backend == "vllm"
    settings = {
        "model": policy.model_name,
        "problems": len(prompts),
        "data": [one.model_dump() for one in recipe.data.validation],
        "sampler": asdict(sampler),
        "samples": samples,
        "greedy": greedy,
        "seed": recipe.distillation.seed,
        "max_new_tokens": policy.generation.max_new_tokens,
        "max_total_sequence_length": policy.max_total_sequence_length,
        "max_input_seq_length": recipe.data.max_input_seq_length,
        "stop": [policy.generation.stop_token_ids, policy.generation.stop_strings],
        "tokenizer": policy.tokenizer.model_dump(),
        "backend": policy.generation.backend,
        "precision": policy.generation.vllm_cfg.precision if vllm else policy.precision,
    }
    store = Samples(folder, settings, {mode: n for mode, (_, n) in modes.items()})
    left = {mode: [one for one in prompts if one.index not in store.done(mode)] for mode in modes}
    logger.info(f"{len(prompts)} problems, {len(store.all)} answers are there already; samples go to {store.path}")
    if any(left.values()):
        with _engine(recipe, tokenizer, models.valid_vocab(tokenizer, config), device) as answers:
            for mode, (chosen, n) in modes.items():
                told = len(store.done(mode)) * _REPORTS // len(prompts)
                request = Request(chosen, n, recipe.distillation.seed, purpose=f"evaluate-{mode}")
                for rollouts in answers(left[mode], request):
                    store.add([_sample(mode, one) for one in grade(rollouts, tokenizer)])
                    done = len(store.done(mode))
                    if done * _REPORTS // len(prompts) > told:
                        told = done * _REPORTS // len(prompts)
                        logger.info(f"{mode}: {done}/{len(prompts)} problems")
    summary = summarise(store.all, samples)
    write_json(folder / "summary.json", settings | summary)
    return summary


def _sample(mode: str, one: Graded) -> Sample:
    rollout: Rollout = one.rollout
    return Sample(
        mode,
        rollout.prompt.index,
        rollout.generation,
        one.correct,
        len(rollout.response),
        rollout.finished,
        rollout.prompt.problem,
        rollout.prompt.answer,
        one.text,
    )


def _prompts(recipe: Recipe, tokenizer: Any) -> list[Prompt]:
    _, rows = load_problems(recipe)
    render = Renderer(
        "data.validation",
        recipe.data.validation or recipe.data.train,
        tokenizer,
        recipe.policy.tokenizer.chat_template_kwargs,
        recipe.data.max_input_seq_length,
    )
    return render(range(len(rows)), rows.rows)


@contextmanager
def _engine(recipe: Recipe, tokenizer: Any, valid_vocab: int | None, device: torch.device) -> Iterator[Answers]:
    """What answers, while inside."""
    if recipe.policy.generation.backend == "vllm":
        from fastkd.vllm_generation import VllmGeneration  # imports vllm, which takes seconds and may not be there

        try:
            vllm = VllmGeneration.from_recipe(recipe, tokenizer.eos_token_id, valid_vocab)
        except UserError:
            raise
        except (ValueError, RuntimeError, OSError, ImportError) as error:
            said = textwrap.shorten(str(error).partition("[type=")[0] or type(error).__name__, 250, placeholder=" …")
            raise UserError(
                "--backend",
                f"vLLM starts no engine for {recipe.policy.model_name}: {said}",
                "Its settings are policy.generation.vllm_cfg and vllm_kwargs; VLLM_LOGGING_LEVEL=INFO tells more, and "
                "--backend transformers does without it",
                value="vllm",
            ) from error
        try:
            yield lambda prompts, request: _streamed(vllm, prompts, request)
        finally:
            vllm.close()
        return
    dtype = models.DTYPES[recipe.policy.precision]
    model = models.load_causal_lm("policy.model_name", recipe.policy.model_name, dtype=dtype, device=device)
    generation, rows = Generation.embedded(recipe, model, tokenizer, valid_vocab), recipe.policy.generation_batch_size
    yield lambda prompts, request: _in_parts(generation, prompts, request, max(rows // request.generations, 1))


def _streamed(engine: Any, prompts: Sequence[Prompt], request: Request) -> Iterator[list[Rollout]]:
    """A problem at a time. The engine has all of them at once, and schedules by itself."""
    waiting: dict[int, list[Rollout]] = {}
    for index, rollout in engine.stream(prompts, request):
        mine = waiting.setdefault(index // request.generations, [])
        mine.append(rollout)
        if len(mine) == request.generations:
            del waiting[index // request.generations]
            yield sorted(mine, key=lambda one: one.generation)


def _in_parts(engine: Generation, prompts: Sequence[Prompt], request: Request, size: int) -> Iterator[list[Rollout]]:
    return (engine.sample(prompts[start : start + size], request) for start in range(0, len(prompts), size))


# --- the command line ---------------------------------------------------------------------------------------------

_EPILOG = """\
examples:
  python -m fastkd.evaluate runs/arithmetic_cpu/export --recipe recipes/arithmetic_cpu.yaml --samples 4
  python -m fastkd.evaluate Qwen/Qwen3-1.7B --data AIME2024 --samples 16 --backend vllm \\
      policy.generation.temperature=0.6 policy.generation.top_p=0.95 policy.max_total_sequence_length=20480

Overrides are keys of a recipe (docs/recipes.md). The same command again goes on where it was cut off.
"""


def main(argv: list[str] | None = None) -> int:
    """Evaluate a checkpoint; returns the exit code (0 done, 2 a mistake in what was given)."""
    parser = argparse.ArgumentParser(
        prog="python -m fastkd.evaluate",
        description="Greedy accuracy, avg@n and pass@k of a checkpoint on problems with known answers.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="a folder in Hugging Face format, or an id")
    parser.add_argument("override", nargs="*", help="keys of the recipe to change, as KEY=VALUE")
    parser.add_argument("--recipe", help="whose validation data, prompts, lengths and (training) sampling are used")
    parser.add_argument("--data", help="a dataset known by name, a file or an id, in place of the recipe's")
    parser.add_argument("--samples", type=int, default=0, metavar="N", help="sampled answers per problem (0: none)")
    parser.add_argument("--no-greedy", action="store_true", help="leave the greedy answers out")
    parser.add_argument(
        "--backend",
        choices=("transformers", "vllm"),
        default="transformers",
        help="what samples, whatever the recipe says: the model in this process (default), or a vLLM engine, which is "
        "for throughput",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N problems")
    parser.add_argument("--out", metavar="FOLDER", help="default: runs/evaluate/NAME-OF-MODEL")
    options = parser.parse_intermixed_args(argv)
    log.configure()
    try:
        loaded, device = _recipe(options)
        name = Path(options.model.rstrip("/"))
        label = name.parent.name if name.name == "export" and name.parent.name else name.name
        folder = Path(options.out or f"runs/evaluate/{label}")
        summary = evaluate(loaded, folder, samples=options.samples, greedy=not options.no_greedy, device=device)
    except UserError as error:
        for one in getattr(error, "errors", [error]):
            print(f"error: {one}", file=sys.stderr)
        return 2
    console.print(table(summary, f"{options.model}"))
    console.print(f"{folder}: samples.jsonl, summary.json")
    return 0


def _recipe(options: argparse.Namespace) -> tuple[LoadedRecipe, torch.device]:
    """A recipe whose student is the model and whose validation data are the problems."""
    if options.samples < 0:
        raise RecipeError("--samples", "answers per problem, 0 or more", "Give --samples 16", value=options.samples)
    if options.limit is not None and options.limit < 1:
        raise RecipeError("--limit", "problems, 1 or more", "Leave it out for all", value=options.limit)
    if not options.samples and options.no_greedy:
        raise RecipeError("--no-greedy", "leaves nothing to do without --samples", "Give --samples 16")
    if not options.recipe and not options.data:
        raise RecipeError("--data", "says what to evaluate on, and neither it nor --recipe is given", "--data AIME2024")
    cuda = torch.cuda.is_available()
    settings = [
        f"policy.model_name={options.model}",
        # Not used; vocabulary and lengths must match.
        f"teacher.model_name={options.model}",
        "teacher.max_total_sequence_length=${policy.max_total_sequence_length}",
        f"policy.generation.backend={options.backend}",
        f"distillation.max_val_samples={options.limit or 'null'}",
        "distillation.num_prompts_per_step=1",
        "policy.train_global_batch_size=1",
    ]
    if options.data:
        kind = "dataset_name" if _known(options.data) else "data_path"
        settings += [f"data.validation={{{kind}: '{options.data}'}}", "data.train=${data.validation}"]
    if not options.recipe:
        settings += [f"policy.precision={'bfloat16' if cuda else 'float32'}", f"cluster.gpus_per_node={int(cuda)}"]
    overrides = [*settings, *options.override]
    loaded = load_recipe(options.recipe, overrides) if options.recipe else recipe_from({}, overrides, "evaluate")
    found = [one for rule in (engines.sampling, keys.lengths) for one in rule(loaded)]
    if errors := [one for one in found if isinstance(one, RecipeError)]:
        raise RecipeErrors(errors)
    for warning in found:
        logger.warning(str(warning))
    return loaded, torch.device("cuda" if cuda and loaded.recipe.cluster.gpus_per_node else "cpu")


def _known(name: str) -> bool:
    from fastkd.config.sources import NAMED

    return name in NAMED


if __name__ == "__main__":
    raise SystemExit(main())
