"""Benchmarks: `pytest benchmarks/ --benchmark` runs them, prints ratio tables and writes JSON and Markdown.

A benchmark first checks that what it times is correct; pytest stops it there if not. Competitors are timed
interleaved (every round runs each of them once), so that a slow minute of the computer hits all alike, and the median
counts. Results go to ``--benchmark-out``, by default a folder named after the hardware.
"""

from __future__ import annotations

import json
import platform
import re
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks")
    group.addoption("--benchmark", action="store_true", help="run the benchmarks (they take minutes)")
    group.addoption("--benchmark-out", type=Path, help="folder for results (default: benchmarks/results/<hardware>)")
    group.addoption("--benchmark-rounds", type=int, default=7, help="interleaved rounds per table (default 7)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--benchmark"):
        return
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="a benchmark; give --benchmark to run it"))


def hardware() -> str:
    """Name of the accelerator, or of the processor and its threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"model name\s*: (.*)", info.read_text())):
        name = found[1]
    return f"{name} {torch.get_num_threads()} threads"


class Bench:
    """Times functions against each other and keeps the tables."""

    def __init__(self, config: pytest.Config):
        self.rounds: int = config.getoption("--benchmark-rounds")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        slug = re.sub(r"[^a-z0-9]+", "-", hardware().lower()).strip("-")
        self.folder: Path = config.getoption("--benchmark-out") or Path(__file__).parent / "results" / slug
        self.show = config.get_terminal_writer().line

    def time(self, competitors: dict[str, Callable[[], object]]) -> dict[str, float]:
        """Median seconds of each, over interleaved rounds, after one round of warm-up."""
        seconds: dict[str, list[float]] = {name: [] for name in competitors}
        for round_ in range(self.rounds + 1):
            for name, function in competitors.items():
                self.wait()
                start = time.perf_counter()
                function()
                self.wait()
                if round_:
                    seconds[name].append(time.perf_counter() - start)
        return {name: statistics.median(values) for name, values in seconds.items()}

    def peak_bytes(self, function: Callable[[], object]) -> int:
        """Most memory held above the level before the call: allocator's count on CUDA, sampled residency on the CPU."""
        if self.device.type == "cuda":
            self.wait()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            function()
            self.wait()
            return torch.cuda.max_memory_allocated() - before
        page, statm = 4096, Path("/proc/self/statm")
        if not statm.exists():
            return 0
        done, most = threading.Event(), 0

        def resident() -> int:
            return int(statm.read_text().split()[1]) * page

        def sample() -> None:
            nonlocal most
            while not done.wait(0.002):
                most = max(most, resident())

        before = resident()
        sampler = threading.Thread(target=sample)
        sampler.start()
        function()
        done.set()
        sampler.join()
        return max(0, most - before)

    def wait(self) -> None:
        """Until the device is idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def report(self, name: str, title: str, rows: list[dict[str, object]]) -> None:
        """Print a table and write NAME.json and NAME.md."""
        columns = list(rows[0])
        cells = [[_text(row[column]) for column in columns] for row in rows]
        widths = [max(len(line[i]) for line in [columns, *cells]) for i in range(len(columns))]

        def line(values: list[str]) -> str:
            return "| " + " | ".join(value.ljust(width) for value, width in zip(values, widths, strict=True)) + " |"

        table = [line(columns), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, cells)]
        facts = f"{hardware()}, torch {torch.__version__}, median of {self.rounds} interleaved rounds."
        self.show(f"\n\n{title}\n{facts}\n")
        for text in table:
            self.show(text)
        self.folder.mkdir(parents=True, exist_ok=True)
        record = {
            "title": title,
            "hardware": hardware(),
            "torch": torch.__version__,
            "rounds": self.rounds,
            "rows": rows,
        }
        (self.folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        (self.folder / f"{name}.md").write_text("\n".join([f"# {title}", "", facts, "", *table]) + "\n")


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@pytest.fixture
def bench(request: pytest.FixtureRequest, pytestconfig: pytest.Config) -> Bench:
    """The stopwatch; output capture is off while it prints."""
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    bench = Bench(pytestconfig)
    line = bench.show

    def show(text: str) -> None:
        with capture.global_and_fixture_disabled():
            line(text)

    bench.show = show
    return bench
