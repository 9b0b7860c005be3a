"""Runs every Python example of docs/kernels.md as a reader would: in order, and with torchrun where it says so."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GUIDE = ROOT / "docs" / "kernels.md"
LAUNCH = "# torchrun --standalone --nproc-per-node=2 "


def examples():
    """(first line number, source) of each python block."""
    found, lines = [], GUIDE.read_text().splitlines()
    for number, line in enumerate(lines):
        if line == "```python":
            end = lines.index("```", number)
            found.append((number + 2, "\n".join(lines[number + 1 : end]) + "\n"))
    return found


LAUNCHED = [(line, source) for line, source in examples() if source.startswith(LAUNCH)]
IN_ORDER = [(line, source) for line, source in examples() if not source.startswith(LAUNCH)]


def test_the_examples_run_in_order(tmp_path, monkeypatch, capsys):
    pytest.importorskip("accelerate", reason="the Hugging Face Trainer needs accelerate")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "guide"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="teacher.tail_logsumexp is missing")
        for line, source in IN_ORDER:
            # Blank lines in front, so that a traceback names the guide's own line.
            exec(compile("\n" * (line - 1) + source, str(GUIDE), "exec"), names)
    assert names["losses"][-1] < 0.9 * names["losses"][0]
    logged = [entry["loss"] for entry in names["trainer"].state.log_history if "loss" in entry]
    assert len(logged) == 6 and logged[-1] < logged[0]
    # Micro-batches of the Trainer are normalised by their sum: its loss is a mean over tokens, as in the loop.
    assert 0.5 * names["losses"][0] < logged[0] < 2.0 * names["losses"][0]
    assert "tensor" in capsys.readouterr().out


@pytest.mark.parametrize(("line", "source"), LAUNCHED, ids=[source.split()[4] for _, source in LAUNCHED])
def test_the_examples_for_two_processes_run(line, source, tmp_path):
    script = tmp_path / source.splitlines()[0].removeprefix(LAUNCH)
    script.write_text(source)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"docs/kernels.md, line {line}:\n{done.stderr[-3000:]}"


def test_the_guide_has_both_kinds_of_examples():
    assert len(IN_ORDER) >= 6 and len(LAUNCHED) == 2
