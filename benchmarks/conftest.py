"""Benchmarks: `pytest benchmarks/ --benchmark` runs them, prints tables and writes JSON, Markdown and a plot.

A benchmark first checks that what it times is correct; pytest stops it there if not. The results of one device and
day go into one file, ``benchmarks/results/<device>_<date>.json``, or into ``--benchmark-out``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
if str(HERE.parent) not in sys.path:  # benchmarks.* and fastkd, whether or not they are installed
    sys.path.insert(0, str(HERE.parent))


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks")
    group.addoption("--benchmark", action="store_true", help="run the benchmarks (they take minutes)")
    group.addoption("--benchmark-out", type=Path, help="folder for results (default: benchmarks/results)")
    group.addoption("--benchmark-rounds", type=int, default=7, help="interleaved rounds per table (default 7)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--benchmark"):
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="a benchmark; give --benchmark to run it"))


@pytest.fixture
def bench(pytestconfig: pytest.Config):
    """The stopwatch; output capture is off while it prints. Fails the test at its end if fastkd itself failed."""
    from benchmarks.measure import Bench

    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    line = pytestconfig.get_terminal_writer().line

    def show(text: str) -> None:
        with capture.global_and_fixture_disabled():
            line(text)

    made = Bench(
        rounds=pytestconfig.getoption("--benchmark-rounds"), out=pytestconfig.getoption("--benchmark-out"), show=show
    )
    yield made
    assert not made.failures, "; ".join(made.failures)
