"""Everything that has to be measured on a GPU, in one command of at most eight minutes.

    python benchmarks/gpu_report.py --out DIR

Correctness first (tests/test_gpu.py), then the five unknowns, all tables of the kernels, memory, growth, a training
step with random weights, and the whole loop of recipes/arithmetic_cpu.yaml. Every part runs in a process of its own,
so that one that crashes leaves the others a working device, and writes DIR/parts/<part>.json when it is done. A
second call skips the parts that are done, at the same commit; a part for which the time does not suffice is reported
as not run, and the next call takes it up.

Needs torch, triton, transformers, safetensors and pytest; with matplotlib there is a plot. Writes DIR/report.json,
report.md and report.png, and prints the tables last, in at most 12,000 characters.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import Bench, reason
from benchmarks.providers import Shape
from benchmarks.records import ROOT, Row, commit, facts_line, hardware, table_lines
from fastkd._kernels.tuning import interpreting

_TAIL = 11_500  # characters printed last


class Context(NamedTuple):
    """What a part is given."""

    bench: Bench
    out: Path
    small: bool

    @property
    def seconds_left(self) -> float:
        """Until the deadline."""
        return self.bench.deadline - time.monotonic()

    @property
    def tiny(self) -> Shape:
        """Shape of ``--small``."""
        return Shape(4, 16, 200, 8) if interpreting() else Shape(100, 32, 1000, 16)

    @property
    def on_gpu(self) -> bool:
        """Whether there is a CUDA device."""
        return self.bench.device.type == "cuda"


# ---------------------------------------------------------------- the parts


def correctness(context: Context) -> None:
    """tests/test_gpu.py in a process of its own."""
    xml = context.out / "correctness.xml"
    command = [sys.executable, "-m", "pytest", "tests/test_gpu.py", "-q", "-p", "no:cacheprovider", f"--junitxml={xml}"]
    environment = _environment()
    if not context.on_gpu:
        environment["FASTKD_TEST_DEVICE"] = "cpu"
    if context.small:
        # Triton's interpreter takes about a second for a row of the top-K.
        command += ["-k", "forward-bucket-dtype0-fast" if interpreting() else "reference or top_k or kernel"]
    xml.unlink(missing_ok=True)
    done = _run(command, environment, context.seconds_left)
    rows: list[Row] = []
    if xml.exists():
        for case in ElementTree.parse(xml).iter("testcase"):
            kinds = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
            rows.append({"test": case.get("name"), "result": kinds[0] if kinds else "passed"})
    counts = {kind: sum(row["result"] == kind for row in rows) for kind in ("passed", "failure", "error", "skipped")}
    table: list[Row] = [{"test": "all", **counts}]
    table += [{"test": row["test"], "note": row["result"]} for row in rows if row["result"] != "passed"]
    context.bench.report("correctness", "tests/test_gpu.py", table)
    if done != 0 or not counts["passed"]:
        context.bench.failures.append(f"tests/test_gpu.py: exit code {done}, {counts}")


def unknowns(context: Context) -> None:
    """The five unknowns, and profiles of both kernels."""
    from benchmarks.bench_linear_kl import CUDA_SHAPES
    from benchmarks.unknowns import CHUNK, unknowns_tables

    if context.small:
        unknowns_tables(context.bench, context.tiny, chunk=context.tiny.n // 2)
    else:
        unknowns_tables(context.bench, CUDA_SHAPES["reference"], CHUNK)


def kernels(context: Context) -> None:
    """All tables of topk_kl and vocab_topk."""
    from benchmarks import bench_linear_kl, bench_linear_topk

    small = {"small": context.tiny}
    shapes = small if context.small else bench_linear_kl.CUDA_SHAPES
    for name, shape in shapes.items():
        if _late(context, f"linear_kl_{name}"):
            continue
        full = name in (*bench_linear_kl.FULL, "small")
        bench_linear_kl.linear_kl_table(context.bench, name, shape, full=full, limit=15.0 if full else 6.0)
        context.bench.clean()
    for name, shape in (small if context.small else bench_linear_topk.CUDA_SHAPES).items():
        if _late(context, f"linear_topk_{name}"):
            continue
        bench_linear_topk.linear_topk_table(context.bench, name, shape, limit=3.0)
        context.bench.clean()


def memory(context: Context) -> None:
    """Peak memory of the modes and of materialised logits."""
    from benchmarks.bench_linear_kl import MEMORY_SHAPES, memory_table

    memory_table(context.bench, context.tiny if context.small else MEMORY_SHAPES["cuda"])


def growth(context: Context) -> None:
    """Time and memory against N, K and V, and the plot."""
    from benchmarks.bench_growth import CUDA_AXES, CUDA_BASE, growth_table

    if context.small:
        base = context.tiny
        axes = {"n": (base.n // 2, base.n), "k": (base.k,), "v": (base.v,)}
    else:
        base, axes = CUDA_BASE, CUDA_AXES
    for axis, values in axes.items():
        growth_table(context.bench, axis, base, values, limit=1.5)


def step(context: Context) -> None:
    """A training step with random weights."""
    from benchmarks.train_step import QWEN3, TINY, missing, step_table

    if problem := missing():
        context.bench.report("step", "One training step", [{"loss": "all", "note": f"skipped: {problem}"}])
        return
    small = TINY._replace(tokens=(16,), sequence=16) if interpreting() else TINY
    step_table(context.bench, small if context.small else QWEN3)


def loop(context: Context) -> None:
    """recipes/arithmetic_cpu.yaml, as far as the time goes."""
    title = "The loop: recipes/arithmetic_cpu.yaml"
    needed = ("omegaconf", "pydantic", "rich", "datasets", "math_verify", "transformers", "safetensors", "numpy")
    absent = [name for name in needed if find_spec(name) is None]
    if absent:
        note = f"skipped: not installed: {', '.join(absent)}"
        context.bench.report("loop", title, [{"what": "the whole run", "note": note}])
        return
    folder = context.out / "loop"
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "fastkd.run", "recipes/arithmetic_cpu.yaml", f"logger.log_dir={folder}"]
    command += [f"cluster.gpus_per_node={int(context.on_gpu)}", "checkpointing.enabled=false"]
    if context.small:
        command += ["distillation.max_num_steps=2", "distillation.num_prompts_per_step=8"]
        command += ["policy.train_global_batch_size=8", "policy.generation.max_new_tokens=8"]
        command += ["distillation.max_val_samples=8", "distillation.val_batch_size=8"]
    environment = _environment()
    environment.pop("TRITON_INTERPRET", None)  # a run has thousands of rows, and each would take a second
    began = time.monotonic()
    code = _run(command, environment, context.seconds_left - 5)
    metrics = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    steps = [line["timing/step"] for line in lines if "timing/step" in line]
    graded = [line for line in lines if "validation/accuracy" in line]
    row: Row = {"what": "run", "seconds": time.monotonic() - began, "steps": len(steps)}
    if steps:
        row["steps/s (median)"] = 1.0 / sorted(steps)[len(steps) // 2]
        row["loss"] = lines[-1].get("train/loss")
    if graded:
        row |= {"accuracy first": graded[0]["validation/accuracy"], "accuracy last": graded[-1]["validation/accuracy"]}
        row |= {"KL first": graded[0]["validation/kl"], "KL last": graded[-1]["validation/kl"]}
        row["graded at step"] = graded[-1]["step"]
    if code is None:
        row["note"] = "stopped by the clock"
    context.bench.report("loop", title, [row])
    if code not in (0, None) or not steps:
        context.bench.failures.append(f"the loop ended with exit code {code} after {len(steps)} steps")


class Part(NamedTuple):
    """One part, and the seconds to expect of it on an H100 or H200."""

    run: Callable[[Context], None]
    seconds: float


# In the order they run.
PARTS = {
    "correctness": Part(correctness, 60),
    "unknowns": Part(unknowns, 25),
    "kernels": Part(kernels, 130),
    "memory": Part(memory, 20),
    "growth": Part(growth, 60),
    "step": Part(step, 60),
    "loop": Part(loop, 60),
}


def _late(context: Context, name: str) -> bool:
    """Report a table that is not run because the time is up."""
    if context.bench.late:
        context.bench.report(name, name, [{"provider": "all", "note": "not run: no time left"}])
    return context.bench.late


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def _run(command: Sequence[str], environment: Mapping[str, str], seconds: float) -> int | None:
    """Exit code, or None when the time was up and it was ended, with all that it had started."""
    sys.stdout.flush()
    process = subprocess.Popen(command, cwd=ROOT, env=dict(environment), start_new_session=True)
    try:
        return process.wait(max(1.0, seconds))
    except BaseException as error:
        for kind in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, kind)
                process.wait(5)
                break
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            return None
        raise


# ---------------------------------------------------------------- one part, in this process


def run_here(name: str, out: Path, *, small: bool, rounds: int, deadline: float) -> dict[str, Any]:
    """Run a part and write DIR/parts/<name>.json; returns what was written. Never raises for what the part did."""
    bench = Bench(rounds=rounds, out=out, stem="report", deadline=deadline)
    before = bench.book.read()["tables"]
    began = time.monotonic()
    status = "done"
    try:
        PARTS[name].run(Context(bench, out, small))
    except Exception as error:
        traceback.print_exc()
        bench.failures.append(f"{reason(error)}")
        status = "crashed"
    if bench.failures and status == "done":
        status = "failed"
    tables = {key: table for key, table in bench.book.read()["tables"].items() if before.get(key) != table}
    record = {
        "part": name,
        "status": status,
        "problems": bench.failures,
        "seconds": round(time.monotonic() - began, 1),
        "small": small,
        "hardware": hardware(),
        "commit": commit(),
        "tables": tables,
    }
    if status == "done" and any("no time left" in str(table) for table in tables.values()):
        record["status"] = "cut short"
    _write_part(out, record)
    return record


def _write_part(out: Path, record: Mapping[str, Any]) -> None:
    path = out / "parts" / f"{record['part']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(path)


def read_part(out: Path, name: str) -> dict[str, Any] | None:
    """What DIR/parts/<name>.json says, None when there is none."""
    path = out / "parts" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


# ---------------------------------------------------------------- all parts


def run_parts(options: argparse.Namespace) -> dict[str, str]:
    """Part → how it went. Each in a process of its own unless ``--in-process``."""
    began = time.monotonic()
    deadline = began + 60.0 * options.minutes
    went: dict[str, str] = {}
    for name in [name for name in PARTS if name in options.part]:
        known = read_part(options.out, name)
        here = {"status": "done", "small": options.small, "hardware": hardware(), "commit": commit()}
        if known and not options.force and all(known[key] == value for key, value in here.items()):
            went[name] = f"done before, in {known['seconds']} s"
            continue
        left = deadline - time.monotonic()
        expected = 5.0 if options.small else PARTS[name].seconds
        # A part is started with less time than expected as long as half of it is there: it stops in good order.
        if left < 0.5 * expected:
            went[name] = f"not run: takes about {expected:.0f} s, {max(0.0, left):.0f} s are left"
            continue
        if not options.quiet:
            print(f"\n===== {name} ({left:.0f} s left)", flush=True)
        if options.in_process:
            record = run_here(name, options.out, small=options.small, rounds=options.rounds, deadline=deadline)
        else:
            (options.out / "parts" / f"{name}.json").unlink(missing_ok=True)
            command = [sys.executable, str(Path(__file__).resolve()), "--out", str(options.out.resolve())]
            command += ["--part", name, "--in-process", "--force", "--quiet"]
            command += ["--minutes", f"{max(0.05, (left - 10) / 60):.3f}", "--rounds", str(options.rounds)]
            code = _run(command + (["--small"] if options.small else []), _environment(), left)
            record = read_part(options.out, name)
            if record is None:
                problem = "ran out of time" if code is None else f"ended with exit code {code}"
                record = {"part": name, "status": "crashed", "problems": [problem], "seconds": 0.0}
                record |= {"small": options.small, "hardware": hardware(), "commit": commit(), "tables": {}}
                _write_part(options.out, record)
        went[name] = f"{record['status']} in {record['seconds']} s"
        if record["problems"]:
            went[name] += ": " + "; ".join(record["problems"])[:400]
    return went


def summary(out: Path, went: Mapping[str, str]) -> str:
    """What is printed last: how the parts went, then the tables, the most telling ones first, cut to a length."""
    book = Bench(out=out, stem="report").book
    record = book.read()
    lines = ["", "=" * 100, facts_line(record) if "hardware" in record else hardware(), ""]
    lines += [f"{name:12} {how}" for name, how in went.items()]
    lines += ["", f"All tables: {book.path.with_suffix('.md')}"]
    text = "\n".join(lines)
    order = ["correctness", "unknown_", "linear_kl_reference", "linear_topk_reference", "memory", "step", "loop"]
    order += ["growth_n", "linear_kl", "linear_topk", "profile", "growth"]

    def rank(name: str) -> int:
        return next((i for i, start in enumerate(order) if name.startswith(start)), len(order))

    left_out = []
    for name in sorted(record["tables"], key=rank):
        table = record["tables"][name]
        # Spread and precision stay in the files: the print is for reading.
        rows = [{key: value for key, value in row.items() if key not in ("p20", "p80")} for row in table["rows"]]
        block = "\n".join(["", "", table["title"], *(_tight(line) for line in table_lines(rows))])
        if len(text) + len(block) > _TAIL - 300:
            left_out.append(name)
        else:
            text += block
    return text + (f"\n\nin the files only: {', '.join(left_out)}" if left_out else "")


def _tight(line: str) -> str:
    """A table row without its padding."""
    if line.startswith("|-"):
        return "|" + "-|" * (line.count("|") - 1)
    return "|".join(cell.strip() for cell in line.split("|"))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python benchmarks/gpu_report.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit codes:\n  0 all went well (parts that were skipped or not run do not count)\n"
        "  1 correctness failed, or a part failed or crashed\n  2 wrong arguments, or no CUDA device without --small",
    )
    made.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    made.add_argument(
        "--part", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART",
        help=f"only these, in their usual order: {', '.join(PARTS)}",
    )  # fmt: skip
    made.add_argument("--minutes", type=float, default=8.0, help="time for everything together (default 8)")
    made.add_argument("--rounds", type=int, default=5, help="interleaved rounds per table (default 5)")
    made.add_argument("--force", action="store_true", help="run parts that are done again")
    made.add_argument(
        "--small",
        action="store_true",
        help="tiny shapes, to see that everything runs: on a CPU, or with TRITON_INTERPRET=1",
    )
    made.add_argument("--in-process", action="store_true", help="run the parts in this process (for debugging)")
    made.add_argument("--quiet", action="store_true", help=argparse.SUPPRESS)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit code."""
    options = parser().parse_args(argv)
    if not options.small and Bench().device.type != "cuda":
        print("error: there is no CUDA device; --small runs tiny shapes on the CPU", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    # Whoever ends this process ends what it has started.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        went = run_parts(options)
    finally:
        signal.signal(signal.SIGTERM, before)
    if not options.quiet:
        print(summary(options.out, went), flush=True)
    return int(any(how.startswith(("failed", "crashed")) for how in went.values()))


if __name__ == "__main__":
    raise SystemExit(main())
