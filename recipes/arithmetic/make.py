"""Makes everything in this folder: the problems, the tokenizer, and three tiny Qwen3 models trained on them.

    python recipes/arithmetic/make.py all            # everything, a few minutes on one CPU core
    python recipes/arithmetic/make.py student --seed 7 --out /some/folder

``teacher`` is trained until it has learnt the task; ``student``, a smaller model, is stopped as soon as it solves
35 % of the dev problems: weak, but not random, which is where on-policy distillation starts. ``reader`` is as weak
alone, but has learnt to follow a worked solution in its prompt: where context self-distillation starts. Half of its
prompts show one, and of those most show another problem's, which its answer must repeat: so it reads what it is
shown and cannot ignore it. All are trained on train.jsonl alone. dev.jsonl decides when a model stops, so that
validation.jsonl is read only after training, to report accuracy. Parts need the ones before them: data, tokenizer,
then any model.

Plain supervised fine-tuning: AdamW, float32, one thread, cross-entropy on the response tokens only. The same seed
gives the same weights on the same CPU and torch version.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is on a hub; never ask

import torch
import transformers
from math_verify import LatexExtractionConfig, parse, verify
from problems import SPLITS, TRACE_PREFIX, Problem, make_problems, read_problems, write_problems
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, GenerationConfig, Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

HERE = Path(__file__).resolve().parent
SIZES = {"train": 5000, "dev": 256, "validation": 256}
VOCABULARY = 512  # at most; 416 have made every word of the problems a single token
CONTEXT, MAX_NEW_TOKENS = 512, 48
LOG_EVERY = 10
IGNORED = -100  # the label that cross-entropy skips
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# ChatML as Qwen writes it. `enable_thinking` is accepted and has no effect: these models never think.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
console = Console()


@dataclass(frozen=True)
class Training:
    """One model's shape and its fine-tuning.

    ``stop_at`` is the dev accuracy (no trace shown) that ends it early; ``traces`` the share of prompts that show a
    worked solution, ``wrong`` the share of those that show one of another problem.
    """

    hidden: int
    layers: int
    tied: bool
    steps: int
    lr: float
    check_every: int
    stop_at: float | None = None
    batch: int = 64
    warmup: int = 30
    traces: float = 0.0
    wrong: float = 0.0


TRAININGS = {
    "teacher": Training(hidden=96, layers=3, tied=False, steps=400, lr=4e-3, check_every=50),
    "student": Training(hidden=64, layers=2, tied=True, steps=400, lr=4e-3, check_every=10, stop_at=0.35),
    "reader": Training(
        hidden=96, layers=3, tied=True, steps=400, lr=3e-3, check_every=10, stop_at=0.2, traces=0.5, wrong=0.7
    ),
}


def make_data(out: Path, seed: int) -> None:
    """Writes train.jsonl, dev.jsonl and validation.jsonl, which share no operand pair."""
    for split in SPLITS:
        write_problems(out / f"{split}.jsonl", make_problems(split, SIZES[split], seed))
        console.print(f"{split}.jsonl: {SIZES[split]} problems")


def make_tokenizer(out: Path) -> None:
    """Writes tokenizer/: byte-level BPE learnt from train.jsonl, in Qwen's own form (digits split singly).

    The form matters: for a model of type qwen3, `AutoTokenizer` may rebuild Qwen's pre-tokenizer instead of
    reading ours, and would then silently encode otherwise. So the vocabulary is learnt under exactly that one.
    """
    learner = Qwen2Tokenizer().backend_tokenizer  # Qwen's pipeline, its vocabulary still empty
    problems = read_problems(out / "train.jsonl")
    texts = [text for p in problems for text in (f"user\n{p.text}", f"assistant\n{p.solution}")]
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START, END],
        initial_alphabet=ByteLevel.alphabet(),  # all 256 bytes, so that any text can be encoded
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    learnt = json.loads(learner.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learnt["vocab"],
        merges=[tuple(pair) for pair in learnt["merges"]],
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        model_max_length=CONTEXT,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(out / "tokenizer")
    console.print(f"tokenizer/: {len(tokenizer)} tokens")


def new_model(spec: Training, tokenizer: Qwen2Tokenizer) -> Qwen3ForCausalLM:
    """A Qwen3 with random weights whose vocabulary is exactly the tokenizer's."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=spec.hidden,
        intermediate_size=3 * spec.hidden,
        num_hidden_layers=spec.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        initializer_range=0.04,  # 0.02 suits models far wider than these
        tie_word_embeddings=spec.tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_new_tokens=MAX_NEW_TOKENS
    )
    return model


def prompt_ids(tokenizer: Qwen2Tokenizer, problem: Problem, trace: str | None = None) -> list[int]:
    text = problem.text if trace is None else TRACE_PREFIX.format(problem=problem.text, trace=trace)
    chat = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


def batches(problems: list[Problem], size: int, seed: int) -> Iterator[list[Problem]]:
    """The fine-tuning order: the problems reshuffled each epoch, for ever, in full batches."""
    rng = random.Random(seed)
    while True:
        order = rng.sample(problems, len(problems))
        for start in range(0, len(order) - size + 1, size):
            yield order[start : start + size]


def shown_traces(batch: list[Problem], problems: list[Problem], spec: Training, rng: random.Random) -> list[str | None]:
    """The worked solution that each problem's prompt shows: None, its own, or another problem's."""
    return [
        (rng.choice(problems) if rng.random() < spec.wrong else problem).solution
        if rng.random() < spec.traces
        else None
        for problem in batch
    ]


def loss_of(
    model: Qwen3ForCausalLM, tokenizer: Qwen2Tokenizer, batch: list[Problem], traces: list[str | None]
) -> torch.Tensor:
    """Mean cross-entropy in nats per response token, the closing <|im_end|> included.

    A prompt with a trace is answered with that trace, right or wrong.
    """
    ids, labels = [], []
    for problem, trace in zip(batch, traces, strict=True):
        prompt = prompt_ids(tokenizer, problem, trace)
        response = [*tokenizer.encode(problem.solution if trace is None else trace), tokenizer.eos_token_id]
        ids.append(torch.tensor(prompt + response))
        labels.append(torch.tensor([IGNORED] * len(prompt) + response))
    # Padding on the right, after everything that counts: under causal attention it needs no mask.
    pad = torch.nn.utils.rnn.pad_sequence
    input_ids = pad(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
    return model(input_ids, labels=pad(labels, batch_first=True, padding_value=IGNORED), use_cache=False).loss


@torch.no_grad()
def accuracy(
    model: Qwen3ForCausalLM, tokenizer: Qwen2Tokenizer, problems: list[Problem], *, shown: bool = False
) -> float:
    """Share of problems whose boxed answer, decoded greedily, math_verify finds right; ``shown``: reading the trace."""
    prompts = {"input_ids": [prompt_ids(tokenizer, p, p.solution if shown else None) for p in problems]}
    inputs = tokenizer.pad(prompts, padding_side="left", return_tensors="pt")
    output = model.generate(**inputs, do_sample=False)
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(is_right(text, problem.answer) for text, problem in zip(texts, problems, strict=True)) / len(texts)


def is_right(response: str, answer: str) -> bool:
    """Whether the response's box holds the answer; a number outside a box does not count."""
    boxed = parse(response, extraction_config=[LatexExtractionConfig(boxed_match_priority=0)])
    return verify(parse(answer), boxed)


def fine_tune(
    name: str, spec: Training, model: Qwen3ForCausalLM, tokenizer: Qwen2Tokenizer, out: Path, seed: int
) -> Iterator[dict]:
    """Trains the model in place; yields a log entry every ``LOG_EVERY`` steps, the loss averaged over them."""
    train, dev = read_problems(out / "train.jsonl"), read_problems(out / "dev.jsonl")
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: min((done + 1) / spec.warmup, 1 - 0.9 * done / spec.steps)
    )
    rng = random.Random(f"{seed} traces")
    started, losses = time.perf_counter(), []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=spec.steps)
        for step, batch in zip(range(1, spec.steps + 1), batches(train, spec.batch, seed), strict=False):
            loss = loss_of(model, tokenizer, batch, shown_traces(batch, train, spec, rng))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            lr = schedule.get_last_lr()[0]
            schedule.step()
            losses.append(loss.item())
            progress.update(task, advance=1, description=f"{name} loss {losses[-1]:.3f}")
            if step % LOG_EVERY and step != spec.steps:
                continue
            entry = {"step": step, "loss": round(sum(losses) / len(losses), 4), "lr": float(f"{lr:.4g}")}
            losses = []
            if step % spec.check_every == 0 or step == spec.steps:
                entry["dev_accuracy"] = round(accuracy(model, tokenizer, dev), 4)
                progress.console.print(f"{name} step {step}: dev accuracy {entry['dev_accuracy']:.3f}")
            yield {**entry, "seconds": round(time.perf_counter() - started, 1)}
            if spec.stop_at is not None and entry.get("dev_accuracy", 0.0) >= spec.stop_at:
                return


def make_model(name: str, out: Path, seed: int, steps: int | None) -> None:
    """Writes the folder of one fine-tuned model, and its part of training_log.jsonl."""
    spec = TRAININGS[name]
    spec = replace(spec, steps=steps or spec.steps)
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    torch.manual_seed(seed)
    model = new_model(spec, tokenizer)
    log: list[dict] = [
        {
            **asdict(spec),
            "parameters": model.num_parameters(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
        }
    ]
    log.extend(fine_tune(name, spec, model, tokenizer, out, seed))

    model.save_pretrained(out / name)
    weights = out / name / "model.safetensors"
    weights.chmod(0o644)  # transformers writes it for its owner only
    shutil.copytree(out / "tokenizer", out / name, dirs_exist_ok=True)
    held_out = read_problems(out / "validation.jsonl")
    reached = round(accuracy(model, tokenizer, held_out), 4)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    log.append({"step": log[-1]["step"], "validation_accuracy": reached, "sha256": digest})
    if spec.traces:
        log[-1]["validation_accuracy_with_trace"] = round(accuracy(model, tokenizer, held_out, shown=True), 4)
    write_log(out / "training_log.jsonl", name, [{"model": name, "seed": seed, **entry} for entry in log])
    console.print(f"{name}/: {log[-1]['step']} steps, validation accuracy {reached:.3f}")


def write_log(path: Path, name: str, entries: list[dict]) -> None:
    """Replaces one model's entries in the log and keeps the other's."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if json.loads(line)["model"] != name]
    path.write_text("".join(line + "\n" for line in [*kept, *map(json.dumps, entries)]))


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the arithmetic problems, tokenizer and models.")
    parser.add_argument("what", choices=["data", "tokenizer", *TRAININGS, "all"])
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to (default: beside this file)")
    parser.add_argument("--steps", type=int, help="fine-tuning steps (default: as shipped)")
    parser.add_argument("--seed", type=int, default=0, help="of the problems, the weights and the order (default: 0)")
    args = parser.parse_args()
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps {args.steps}: give at least 1")
    if args.what not in ("data", "all") and not (args.out / "train.jsonl").exists():
        parser.error(f"{args.out} holds no train.jsonl: run 'make.py data' with the same --out first")
    if args.what in TRAININGS and not (args.out / "tokenizer").exists():
        parser.error(f"{args.out} holds no tokenizer: run 'make.py tokenizer' with the same --out first")

    # These matrices are too small to share out: a second thread costs more than it brings.
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    torch.use_deterministic_algorithms(True)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.what in ("data", "all"):
        make_data(args.out, args.seed)
    if args.what in ("tokenizer", "all"):
        make_tokenizer(args.out)
    for name in TRAININGS:
        if args.what in (name, "all"):
            make_model(name, args.out, args.seed, args.steps)


if __name__ == "__main__":
    main()
