"""Options shared by tests and benchmarks, and how tests are spread over cores (``pytest -n auto``)."""

from typing import Any

import pytest

# These start Ray, which wants some cores to itself: one at a time.
_ONE_AT_A_TIME = ("tests/ray/", "tests/test_slurm.py", "tests/test_benchmarks.py")
# These fill all cores with processes of their own; what waits for others runs before, beside the light ones.
_LAST = ("tests/distributed/",)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # of several: all have to agree on the order
        items.sort(key=lambda item: (item.nodeid.startswith(_LAST), not item.nodeid.startswith(_ONE_AT_A_TIME)))
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="takes minutes; give --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file stays on one core, for its fixtures; files in the order in which they were collected."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "ray" if nodeid.startswith(_ONE_AT_A_TIME) else nodeid.split("::")[0]

    config.option.loadscopereorder = False
    return ByFile(config, log)
