"""The benchmarks run end to end at tiny shapes: the report with its parts, the tables, the files, the plot.

What they measure is nobody's claim here; that they check before they time, name what they leave out, go on after a
failure and resume, is.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture
def bench(tmp_path):
    from benchmarks.measure import Bench

    return Bench(rounds=2, out=tmp_path, stem="result", show=lambda line: None)


def table(bench, name):
    return bench.book.read()["tables"][name]


def by(rows, key="provider"):
    return {row[key]: row for row in rows}


def test_every_provider_has_figures_or_a_reason(bench, monkeypatch):
    from benchmarks import bench_linear_kl
    from benchmarks.providers import Shape

    monkeypatch.setattr(bench_linear_kl, "compiled", lambda: [])  # compiling takes half a minute
    bench_linear_kl.linear_kl_table(bench, "tiny", Shape(40, 16, 300, 8))
    rows = by(table(bench, "linear_kl_tiny")["rows"])
    assert {"bare GEMMs, whole", "topk_kl forward/bucket, memory=low"} < set(rows)
    for word in ("materialised, as NeMo RL", "as verl", "as TRL", "Liger fused", "Liger chunked", "cut-cross-entropy"):
        assert any(word in name for name in rows), word
    for name, row in rows.items():
        assert "ms" in row or row["note"].startswith("skipped: "), name
    assert rows["topk_kl reverse/zero"]["gradient error"] < 1e-2
    assert rows["topk_kl reverse/zero"]["p20"] <= rows["topk_kl reverse/zero"]["ms"]
    assert not bench.failures


def test_a_wrong_kernel_stops_the_table_and_a_wrong_competitor_is_named(bench):
    from dataclasses import replace

    from benchmarks.measure import Skipped
    from benchmarks.providers import fused, gate, materialised

    ours, theirs = fused("forward", "drop"), materialised()[0]
    with pytest.raises(AssertionError, match="forward/drop"):
        gate(bench, [replace(ours, loss=fused("forward", "zero").loss)])
    found = gate(bench, [replace(theirs, loss=ours.loss)])[theirs.name]
    assert isinstance(found, Skipped) and found.reason.startswith("wrong: ")


def test_one_failure_leaves_the_others_running(bench):
    from benchmarks.measure import Skipped, Timing

    def fails() -> None:
        raise RuntimeError("no such unit\nsecond line")

    found = bench.race({"good": lambda: torch.ones(10).sum(), "bad": fails})
    assert found["bad"] == Skipped("error: RuntimeError: no such unit")
    assert isinstance(found["good"], Timing) and len(found["good"].seconds) == 2
    bench.deadline = 0.0
    assert found.keys() == bench.race({"good": print, "bad": print}).keys()
    assert bench.race({"late": print})["late"] == Skipped("error: TimeoutError: no time left")


def test_tables_of_a_day_share_a_file(bench):
    bench.report("a", "first", [{"x": 1.5}])
    bench.report("b", "second", [{"x": 2.5, "note": "skipped: y"}])
    bench.report("a", "first again", [{"x": 3.5}])
    record = json.loads(bench.book.path.read_text())
    assert {name: t["title"] for name, t in record["tables"].items()} == {"a": "first again", "b": "second"}
    assert record["torch"] == torch.__version__ and record["threads"] == torch.get_num_threads()
    text = bench.book.path.with_suffix(".md").read_text()
    assert "first again" in text and "skipped: y" in text and "1.5" not in text


@pytest.fixture
def report(tmp_path, monkeypatch, capsys):
    """Runs gpu_report.py in this process: (exit code, what it printed)."""
    from benchmarks import gpu_report

    def run(*parts, more=()):
        arguments = ["--out", str(tmp_path), "--small", "--rounds", "1", "--in-process", "--part", *parts, *more]
        code = gpu_report.main(arguments)
        return code, capsys.readouterr().out

    return run


def test_the_report_runs_prints_and_resumes(report, tmp_path):
    pytest.importorskip("transformers")
    code, printed = report("unknowns", "memory", "growth", "step")
    assert code == 0
    parts = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "parts").glob("*.json")}
    assert {name: part["status"] for name, part in parts.items()} == dict.fromkeys(
        ("unknowns", "memory", "growth", "step"), "done"
    )
    assert set(parts["growth"]["tables"]) == {"growth_n", "growth_k", "growth_v"}
    assert {f"unknown_{letter}" for letter in "abcde"} < set(parts["unknowns"]["tables"])
    steps = by(parts["step"]["tables"]["step"]["rows"], "loss")
    assert set(steps) == {"fused, fast", "fused, low memory", "materialised"}
    assert all(row["tokens/s"] > 0 for row in steps.values())
    assert (tmp_path / "report.md").exists() and (tmp_path / "report.json").exists()
    if "matplotlib" in sys.modules:
        assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    tail = printed[printed.rindex("=" * 100) :]
    assert "Growth with N" in tail and len(tail) < 12_000

    code, printed = report("memory", "step")
    assert code == 0 and printed.count("done before") == 2
    code, printed = report("memory", more=["--minutes", "0"])
    assert code == 0 and "done before" in printed
    code, printed = report("memory", more=["--minutes", "0", "--force"])
    assert code == 0 and "memory       not run: " in printed


def test_a_part_that_crashes_is_reported_and_the_others_run(report, tmp_path, monkeypatch):
    from benchmarks import gpu_report

    def crash(context):
        raise RuntimeError("illegal memory access")

    monkeypatch.setitem(gpu_report.PARTS, "unknowns", gpu_report.Part(crash, 1))
    code, printed = report("unknowns", "memory")
    assert code == 1
    assert "crashed" in printed and "illegal memory access" in printed
    assert json.loads((tmp_path / "parts" / "memory.json").read_text())["status"] == "done"


def test_a_part_has_a_process_of_its_own(report, tmp_path):
    from benchmarks import gpu_report

    code = gpu_report.main(["--out", str(tmp_path), "--small", "--rounds", "1", "--part", "memory"])
    assert code == 0
    part = json.loads((tmp_path / "parts" / "memory.json").read_text())
    assert part["status"] == "done" and part["small"] is True
    assert "× less" in (tmp_path / "report.md").read_text()


def test_the_sharded_step_is_checked_against_one_process(importable):
    from benchmarks import bench_sharded

    model = bench_sharded.MODEL | dict(vocab_size=301, hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    job = bench_sharded.JOB | dict(model=model, k=8, sequences=3, length=24, mb_tokens=48, steps=1)
    alone, split = bench_sharded.table(job, [bench_sharded.LAYOUTS[0], bench_sharded.LAYOUTS[2]])
    assert (alone["ranks"], split["ranks"]) == (1, 2) and "tp 2 + sequence parallel" in split["layout"]
    assert alone["× one process"] == 1.0
    for row in (alone, split):
        named = sum(row[f"{phase} ms"] for phase in ("forward", "loss", "backward", "optimizer"))
        assert 0.5 * row["step ms"] < named <= 1.5 * row["step ms"]
        assert row["tokens/s"] > 0 and row["peak MB per rank"] > 50
    assert split["communication ms"] > 0
