"""``python -m fastkd.evaluate MODEL``: greedy and sampled accuracy of a checkpoint on problems with known answers.

avg@n is the mean accuracy of n samples per problem. pass@k is the chance that one of k samples is right, estimated
without bias from n: 1 − C(n − c, k) / C(n, k) with c right ones (Chen et al., "Evaluating Large Language Models Trained
on Code", 2021). The error of a mean over problems is its standard error, σ / √problems.

Samples are appended to ``samples.jsonl`` as they come; the same command again goes on where it was cut off, and its
samples are the same (vLLM's within the accuracy of its kernels).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import comb, sqrt
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from fastkd import log, models
from fastkd.batch import Prompt, Rollout
from fastkd.config import Recipe
from fastkd.data import Renderer, load_problems
from fastkd.driver import locate
from fastkd.errors import RecipeError, UserError
from fastkd.files import write_json, write_text
from fastkd.grading import Graded, grade
from fastkd.log import console, logger
from fastkd.recipe import LoadedRecipe, load_recipe, recipe_from
from fastkd.rollout import Generation, Request
from fastkd.sampling import Sampler

GREEDY, SAMPLED = "greedy", "sampled"


@dataclass(frozen=True, slots=True)
class Sample:
    """One graded answer, a line of ``samples.jsonl``."""

    mode: str
    """"greedy" or "sampled"."""
    index: int
    """Of the problem."""
    generation: int
    correct: bool
    tokens: int
    """Of the response."""
    finished: bool
    """False: it was cut off at ``max_new_tokens``."""
    problem: str
    reference: str | None
    response: str


def pass_at(k: int, right: Sequence[int], n: int) -> float:
    """Mean pass@k over problems.

    Args:
        k: samples that one may look at, at most n.
        right: right answers of each problem, of n samples.
    """
    return sum(1 - comb(n - c, k) / comb(n, k) for c in right) / max(len(right), 1)


def summarise(samples: Sequence[Sample], n: int) -> dict[str, Any]:
    """Figures of both modes, of what there is: accuracy, its standard error, pass@k for k = 1, 2, 4, … n, lengths."""
    found: dict[str, Any] = {}
    for mode, each in ((GREEDY, 1), (SAMPLED, n)):
        mine = [sample for sample in samples if sample.mode == mode]
        if not mine:
            continue
        right: dict[int, int] = {}
        for sample in mine:
            right[sample.index] = right.get(sample.index, 0) + sample.correct
        shares = [count / each for count in right.values()]
        mean = sum(shares) / len(shares)
        spread = sum((share - mean) ** 2 for share in shares) / max(len(shares) - 1, 1)
        found[mode] = {
            "problems": len(right),
            "samples_per_problem": each,
            "accuracy": mean,
            "standard_error": sqrt(spread / len(shares)),
            "mean_tokens": sum(sample.tokens for sample in mine) / len(mine),
            "truncated": sum(not sample.finished for sample in mine) / len(mine),
        }
        if mode == SAMPLED:
            ks = [k for k in (2**power for power in range(n.bit_length())) if k < n]
            found[mode]["pass_at"] = {str(k): pass_at(k, list(right.values()), n) for k in [*ks, n]}
    return found


def table(summary: dict[str, Any], title: str) -> Table:
    """Both modes, a row for every figure."""
    shown = Table(title=title, title_justify="left")
    for column in ("", "accuracy", "±", "problems", "mean tokens", "cut off"):
        shown.add_column(column, justify="right" if column else "left")
    for mode, figures in summary.items():
        n = figures["samples_per_problem"]
        name = GREEDY if mode == GREEDY else f"avg@{n}"
        lengths = (str(figures["problems"]), f"{figures['mean_tokens']:.0f}", f"{figures['truncated']:.1%}")
        shown.add_row(name, f"{figures['accuracy']:.3f}", f"{figures['standard_error']:.3f}", *lengths)
        for k, value in figures.get("pass_at", {}).items():
            shown.add_row(f"pass@{k}", f"{value:.3f}", "", "", "", "")
    return shown


# --- samples on disk ----------------------------------------------------------------------------------------------


class Samples:
    """``samples.jsonl`` of a folder, and the settings they were drawn with.

    Raises:
        UserError: the folder has samples of other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], each: dict[str, int]):
        self.path, self.each = folder / "samples.jsonl", each
        folder.mkdir(parents=True, exist_ok=True)
        saved = folder / "settings.json"
        if saved.exists() and (before := json.loads(saved.read_text())) != settings:
            changed = sorted(key for key in before.keys() | settings.keys() if before.get(key) != settings.get(key))
            raise UserError(
                "--out",
                f"holds samples of other settings ({', '.join(changed)})",
                "Give another folder, or remove this one",
                value=str(folder),
            )
        write_json(saved, settings)
        self.all = self._read()

    def _read(self) -> list[Sample]:
        """Samples of the problems that are complete; the rest, and a line that was cut short, are dropped."""
        found: list[Sample] = []
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ():
            try:
                found.append(Sample(**json.loads(line)))
            except (ValueError, TypeError):
                continue
        counts: dict[tuple[str, int], int] = {}
        for sample in found:
            key = (sample.mode, sample.index)
            counts[key] = counts.get(key, 0) + 1
        kept = [sample for sample in found if counts[sample.mode, sample.index] == self.each.get(sample.mode)]
        write_text(self.path, "".join(map(_line, kept)))
        return kept

    def done(self, mode: str) -> set[int]:
        """Problems that need no more samples."""
        return {sample.index for sample in self.all if sample.mode == mode}

    def add(self, samples: Sequence[Sample]) -> None:
        """Append; whole problems only."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(map(_line, samples)))
        self.all += samples


def _line(sample: Sample) -> str:
    return json.dumps(asdict(sample), ensure_ascii=False) + "\n"


# --- the run ------------------------------------------------------------------------------------------------------


def evaluate(loaded: LoadedRecipe, folder: Path, *, samples: int, greedy: bool, device: torch.device) -> dict[str, Any]:
    """Sample, grade, and write ``samples.jsonl`` and ``summary.json``; returns the summary.

    Args:
        loaded: its student is evaluated on its validation problems, sampled as ``policy.generation`` says.
        samples: answers per problem; 0 = greedy alone.
        greedy: also one greedy answer per problem.

    Raises:
        UserError: model, data or folder cannot be used.
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
        "chat_template_kwargs": policy.tokenizer.chat_template_kwargs,
        "backend": policy.generation.backend,
        "precision": policy.precision,
    }
    store = Samples(folder, settings, {mode: n for mode, (_, n) in modes.items()})
    left = {mode: [one for one in prompts if one.index not in store.done(mode)] for mode in modes}
    logger.info(f"{len(prompts)} problems, {len(store.all)} answers are there already; samples go to {store.path}")
    if any(left.values()):
        engine = _engine(recipe, tokenizer, models.valid_vocab(tokenizer, config), device)
        for mode, (chosen, n) in modes.items():
            request = Request(chosen, n, recipe.distillation.seed, purpose=f"evaluate-{mode}")
            for part in _parts(left[mode], max(policy.generation_batch_size // n, 1)):
                answers = grade(engine.sample(part, request), tokenizer)
                store.add([_sample(mode, one) for one in answers])
                logger.info(f"{mode}: {len(store.done(mode))}/{len(prompts)} problems")
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


def _parts(prompts: Sequence[Prompt], size: int) -> Iterator[Sequence[Prompt]]:
    return (prompts[start : start + size] for start in range(0, len(prompts), size))


def _engine(recipe: Recipe, tokenizer: Any, valid_vocab: int | None, device: torch.device) -> Any:
    if recipe.policy.generation.backend == "vllm":
        from fastkd.vllm_generation import VllmGeneration  # imports vllm, which takes seconds and may not be there

        return VllmGeneration.from_recipe(recipe, tokenizer.eos_token_id, valid_vocab)
    dtype = models.DTYPES[recipe.policy.precision]
    model = models.load_causal_lm("policy.model_name", recipe.policy.model_name, dtype=dtype, device=device)
    return Generation.embedded(recipe, model, tokenizer, valid_vocab)


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
    parser.add_argument("override", nargs="*", help="keys of the recipe to change")
    parser.add_argument("--recipe", help="whose validation data, prompts and sampling are used")
    parser.add_argument("--data", help="a dataset known by name, a file or an id, in place of the recipe's")
    parser.add_argument("--samples", type=int, default=0, metavar="N", help="sampled answers per problem (0: none)")
    parser.add_argument("--no-greedy", action="store_true", help="leave the greedy answers out")
    parser.add_argument("--backend", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N problems")
    parser.add_argument("--out", metavar="FOLDER", help="default: runs/evaluate/NAME-OF-MODEL")
    options = parser.parse_intermixed_args(argv)
    log.configure()
    try:
        loaded, device = _recipe(options)
        name = Path(options.model.rstrip("/"))
        label = name.parent.name if name.name == "export" and name.parent.name else name.name
        folder = Path(options.out or f"runs/evaluate/{label}")
        summary = evaluate(loaded, folder, samples=max(options.samples, 0), greedy=not options.no_greedy, device=device)
    except UserError as error:
        for one in getattr(error, "errors", [error]):
            print(f"error: {one}", file=sys.stderr)
        return 2
    console.print(table(summary, f"{options.model}"))
    console.print(f"{folder}: samples.jsonl, summary.json")
    return 0


def _recipe(options: argparse.Namespace) -> tuple[LoadedRecipe, torch.device]:
    """A recipe whose student is the model and whose validation data are the problems."""
    if not options.samples and options.no_greedy:
        raise RecipeError("--no-greedy", "leaves nothing to do without --samples", "Give --samples 16")
    if not options.recipe and not options.data:
        raise RecipeError("--data", "says what to evaluate on, and neither it nor --recipe is given", "--data AIME2024")
    cuda = torch.cuda.is_available()
    settings = [
        f"policy.model_name={options.model}",
        f"teacher.model_name={options.model}",  # not used; a vocabulary must match
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
    return loaded, torch.device("cuda" if cuda and loaded.recipe.cluster.gpus_per_node else "cpu")


def _known(name: str) -> bool:
    from fastkd.config.sources import NAMED

    return name in NAMED


if __name__ == "__main__":
    raise SystemExit(main())
