"""Options shared by tests and benchmarks, and how tests are spread over cores (``pytest -n auto``)."""

from typing import Any

import pytest

# These start processes of their own, which fill the cores by themselves and share one Ray cluster.
_ONE_AT_A_TIME = ("tests/distributed/", "tests/ray/", "tests/test_slurm.py", "tests/test_benchmarks.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="takes minutes; give --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file stays on one core, for its fixtures; files in the order of their names, the longest first."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "processes" if nodeid.startswith(_ONE_AT_A_TIME) else nodeid.split("::")[0]

    config.option.loadscopereorder = False
    return ByFile(config, log)
