"""fastkd's on-policy step against TRL's two on-policy distillation trainers, on one CPU thread.

    pytest benchmarks/bench_step.py --benchmark             two cases, written to benchmarks/results/<CPU>/step.*
    python benchmarks/bench_step.py --vocab 151936 --keep 512 --rounds 5

Each provider runs in a process of its own (step_peers.py) and they take turns, round after round, so that what
else the machine does hits all of them; medians over the steps. Cases: the shipped arithmetic models (vocabulary
416, where the trunk is nearly all of the work, the same work for everyone), and random models with a wide
vocabulary, where the logits are.

Nothing is timed before this holds for the first step of every provider: the same prompts; responses of exactly the
asked length; and a loss that equals the reverse KL of plain transformers models in float32 on the very sequences
that it sampled (TRL: over the whole vocabulary; fastkd: over the K kept ids and one bucket, a lower bound of it that
K = V makes equal).

Not compared: the GPU, and TRL with vLLM.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
HERE = Path(__file__).resolve().parent
ARITHMETIC = HERE.parent / "recipes" / "arithmetic"
TRL_MISSING = "TRL is not installed; get it with: pip install -e '.[bench]'"
NEW_TOKENS = 32
# Loss against reference: float32 sums over 10⁴-10⁷ terms in different orders.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Case:
    """Two models and a batch."""

    name: str
    student: Path
    teacher: Path
    vocab: int
    prompts: int
    keeps: tuple[int, ...]
    """fastkd's K; one contestant each."""


@dataclass
class Contestant:
    """One provider's process and what it measured."""

    label: str
    provider: str
    keep: int | None
    process: subprocess.Popen[str]
    log: Any
    ready: dict[str, Any] = field(default_factory=dict)
    reference: dict[str, float] = field(default_factory=dict)
    bursts: list[dict[str, Any]] = field(default_factory=list)

    def receive(self) -> dict[str, Any]:
        """Its next message; RuntimeError with the end of its log when it died."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise RuntimeError(f"{self.label} ended early:\n{self.log.read()[-3000:]}")
        return json.loads(line)

    def run(self, steps: int) -> dict[str, Any]:
        """Some steps while all others wait."""
        assert self.process.stdin
        self.process.stdin.write(f"steps {steps}\n")
        self.process.stdin.flush()
        return self.receive()

    def seconds(self, clock: str) -> tuple[float, float, float]:
        """Medians over all steps of step, generation, and step − generation; ``clock`` is wall or cpu."""
        steps = [one[clock] for burst in self.bursts for one in burst["steps"]]
        generation = [one[clock] for burst in self.bursts for one in burst["generation"]]
        rest = [whole - part for whole, part in zip(steps, generation, strict=True)]
        return statistics.median(steps), statistics.median(generation), statistics.median(rest)


def contestants(case: Case, stack: ExitStack) -> Iterator[Contestant]:
    """Start them one after another; each has done its first step when it is yielded."""
    wanted = [("fastkd", keep, f"fastkd, K = {'V' if keep == case.vocab else keep}") for keep in case.keeps]
    wanted += [("trl-distillation", None, "TRL DistillationTrainer"), ("trl-gkd", None, "TRL GKDTrainer")]
    for provider, keep, label in wanted:
        job = {
            "provider": provider,
            "student": str(case.student),
            "teacher": str(case.teacher),
            "vocab": case.vocab,
            "prompts": case.prompts,
            "new_tokens": NEW_TOKENS,
        } | ({} if keep is None else {"keep": keep})
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - the stack closes it
        stack.callback(log.close)
        process = subprocess.Popen(
            [sys.executable, str(HERE / "step_peers.py"), json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])},
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        one = Contestant(label, provider, keep, process, log)
        one.ready = one.receive()
        yield one


# --- the check --------------------------------------------------------------------------------------------------


def reference_loss(case: Case, sequences: Sequence[tuple[list[int], list[int]]], keep: int | None) -> dict[str, float]:
    """Reverse KL per response token by plain transformers models, unpadded, one sequence at a time.

    Returns:
        full: Σ_v q_v log(q_v / p_v), over the vocabulary. bucket: over the teacher's ``keep`` largest and one cell
        for the rest (absent without ``keep``).
    """
    import torch
    from transformers import AutoModelForCausalLM

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
        for path in (case.student, case.teacher)
    )
    full = bucket = 0.0
    with torch.inference_mode():
        for prompt, response in sequences:
            ids = torch.tensor([prompt + response])
            rows = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
            # float64: the tail of a peaked distribution is what a difference of float32 numbers loses.
            log_q, log_p = (model(ids).logits[0, rows].double().log_softmax(-1) for model in (student, teacher))
            full += float((log_q.exp() * (log_q - log_p)).sum())
            if keep is None:
                continue
            kept = log_p.topk(keep, -1).indices
            cells = []
            for log in (log_q, log_p):
                rest = log.scatter(-1, kept, -torch.inf).logsumexp(-1, keepdim=True)
                cells.append(torch.cat([log.gather(-1, kept), rest], -1).clamp_min(-1e3))
            bucket += float((cells[0].exp() * (cells[0] - cells[1])).sum())
    tokens = sum(len(response) for _, response in sequences)
    return {"full": full / tokens} | ({} if keep is None else {"bucket": bucket / tokens})


def check(case: Case, one: Contestant, first: Contestant) -> None:
    """AssertionError unless its first step was the step that was asked for."""
    sequences = one.ready["sequences"]
    assert len(sequences) == case.prompts, f"{one.label}: {len(sequences)} responses instead of {case.prompts}"
    assert {len(response) for _, response in sequences} == {NEW_TOKENS}, f"{one.label}: a response has another length"
    prompts, expected = (sorted(prompt for prompt, _ in run.ready["sequences"]) for run in (one, first))
    assert prompts == expected, f"{one.label}: other prompts than {first.label}"
    one.reference = reference_loss(case, sequences, one.keep)
    loss, exact = one.ready["loss"], one.reference["full" if one.keep is None else "bucket"]
    assert abs(loss - exact) <= TOLERANCE * max(abs(exact), 1e-3), f"{one.label}: loss {loss}, reference {exact}"


# --- the measurement --------------------------------------------------------------------------------------------


def compare(case: Case, *, rounds: int, steps: int) -> list[Contestant]:
    """All contestants, checked, then ``rounds`` times ``steps`` steps each, in turn, after one round of warm-up."""
    with ExitStack() as stack:
        field_ = []
        for one in contestants(case, stack):
            field_.append(one)
            check(case, one, field_[0])
        for number in range(rounds + 1):
            for one in field_:
                burst = one.run(steps)
                wrong = set(burst["response_tokens"]) - {case.prompts * NEW_TOKENS}
                assert not wrong, f"{one.label}: steps with {wrong} response tokens"
                if number > 0:
                    one.bursts.append(burst)
    return field_


def table(case: Case, field_: Sequence[Contestant]) -> str:
    """Markdown: the figures, the ratios to each fastkd, and the losses of the check."""
    lines = [
        f"### {case.name}: vocabulary {case.vocab:,}, {case.prompts} prompts × {NEW_TOKENS} tokens",
        "",
        "| provider | steps/s | generation s | rest s | CPU s: step | generation | rest | peak MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in field_:
        wall, cpu = one.seconds("wall"), one.seconds("cpu")
        figures = [f"{1 / wall[0]:.2f}", *(f"{s:.3f}" for s in (*wall[1:], *cpu)), f"{peak(one):.0f}"]
        lines.append(f"| {one.label} | {' | '.join(figures)} |")
    lines += [
        "",
        "| fastkd is … times as fast (wall; CPU) | over all | generation | rest | its peak memory is … times smaller |",
        "|---|---|---|---|---|",
    ]
    for ours in (one for one in field_ if one.keep is not None):
        for theirs in (one for one in field_ if one.keep is None):
            pairs = [
                " ; ".join(
                    f"{theirs.seconds(clock)[part] / ours.seconds(clock)[part]:.2f}×" for clock in ("wall", "cpu")
                )
                for part in range(3)
            ]
            memory = f"{peak(theirs) / peak(ours):.2f}×"
            lines.append(f"| {ours.label} vs {theirs.label} | {' | '.join([*pairs, memory])} |")
    lines += [
        "",
        "| first step, reverse KL per token | as computed | reference, K + bucket | reference, whole vocabulary |",
        "|---|---|---|---|",
    ]
    for one in field_:
        bucket = f"{one.reference['bucket']:.5f}" if one.keep is not None else "-"
        lines.append(f"| {one.label} | {one.ready['loss']:.5f} | {bucket} | {one.reference['full']:.5f} |")
    return "\n".join(lines)


def peak(one: Contestant) -> float:
    """MiB above what was resident once everything was loaded."""
    return max(burst["peak_mib"] for burst in one.bursts)


def figures(case: Case, field_: Sequence[Contestant]) -> dict[str, Any]:
    """The same, for a program; with every step."""
    return {
        "case": case.name,
        "vocab": case.vocab,
        "prompts": case.prompts,
        "new_tokens": NEW_TOKENS,
        "providers": [
            {
                "label": one.label,
                "keep": one.keep,
                "versions": one.ready["versions"],
                "loss": one.ready["loss"],
                "reference": one.reference,
                "seconds": {
                    clock: dict(zip(("step", "generation", "rest"), one.seconds(clock), strict=True))
                    for clock in ("wall", "cpu")
                },
                "peak_mib": peak(one),
                "bursts": one.bursts,
            }
            for one in field_
        ],
    }


def processor() -> str:
    """Its name; the steps run on the CPU whatever else the machine has."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def write(results: Sequence[tuple[Case, list[Contestant]]], folder: Path) -> str:
    """step.json and step.md in ``folder``; returns the Markdown."""
    versions = ", ".join(f"{name} {v}" for name, v in results[0][1][-1].ready["versions"].items())
    bursts = len(results[0][1][0].bursts)
    head = (
        f"## One on-policy step: fastkd and TRL\n\n{processor()}, one thread; {versions}; medians of {bursts} "
        "interleaved rounds of a few steps.\n\n"
    )
    text = head + "\n\n".join(table(*result) for result in results) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "step.md").write_text(text)
    content = {"processor": processor(), "cases": [figures(*result) for result in results]}
    (folder / "step.json").write_text(json.dumps(content, indent=1) + "\n")
    return text


# --- cases ------------------------------------------------------------------------------------------------------


def arithmetic() -> Case:
    """The models that come with the repository."""
    return Case("arithmetic", ARITHMETIC / "student", ARITHMETIC / "teacher", 416, 64, (32, 416))


def wide(folder: Path, vocab: int, keeps: tuple[int, ...] = (32,), prompts: int = 16) -> Case:
    """Random two-layer Qwen3 models (hidden 128 and 256) over ``vocab`` ids, all of them real to the tokenizer:
    padded ids would be left out by fastkd alone.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    for number, (role, hidden) in enumerate((("student", 128), ("teacher", 256))):
        config = Qwen3Config(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=hidden // 4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            eos_token_id=2,
            pad_token_id=0,
        )
        torch.manual_seed(number)
        model = Qwen3ForCausalLM(config)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() == 2:  # logits with a standard deviation of 4: a trained model's peaks, not a flat line
                    weight.normal_(0, (4 if "embed" in name else 1) / weight.shape[1] ** 0.5)
        model.save_pretrained(folder / role)
        for name in ("tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(ARITHMETIC / "student" / name, folder / role)
        tokenizer = json.loads((ARITHMETIC / "student" / "tokenizer.json").read_text())
        ids = tokenizer["model"]["vocab"]
        used = 1 + max([*ids.values(), *(token["id"] for token in tokenizer["added_tokens"])])
        ids.update({f"<filler {i}>": i for i in range(used, vocab)})
        (folder / role / "tokenizer.json").write_text(json.dumps(tokenizer))
    return Case("random models", folder / "student", folder / "teacher", vocab, prompts, keeps)


def test_step_against_trl(bench: Any, tmp_path: Path) -> None:
    """Prints and writes the tables; fails only when a provider did not do the step that was asked for."""
    if find_spec("trl") is None:
        pytest.skip(TRL_MISSING)
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is read from /proc, which only Linux has")
    cases = [arithmetic(), wide(tmp_path, 32768)]
    results = [(case, compare(case, rounds=bench.rounds, steps=3)) for case in cases]
    bench.show("\n\n" + write(results, bench.folder))


def main() -> None:
    """One case by command line, printed and not written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, help="random models with so many ids; the shipped ones when absent")
    parser.add_argument("--keep", type=int, nargs="+", default=[32], help="fastkd's K, several to compare")
    parser.add_argument("--prompts", type=int, help="prompts per step (64 for the shipped models, 16 for random ones)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="steps of a provider before it is the next one's turn")
    asked = parser.parse_args()
    if find_spec("trl") is None:
        raise SystemExit(TRL_MISSING)
    with tempfile.TemporaryDirectory() as folder:
        if asked.vocab:
            case = wide(Path(folder), asked.vocab, tuple(asked.keep), asked.prompts or 16)
        else:
            shipped = arithmetic()
            case = Case(
                shipped.name, shipped.student, shipped.teacher, shipped.vocab, asked.prompts or 64, tuple(asked.keep)
            )
        print(table(case, compare(case, rounds=asked.rounds, steps=asked.steps)))


if __name__ == "__main__":
    main()
