"""Options shared by tests and benchmarks, and how tests are spread over cores (``pytest -n auto``)."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parent
# These start processes of their own, which fill the cores by themselves and share one Ray cluster.
_ONE_AT_A_TIME = ("tests/distributed/", "tests/ray/", "tests/test_slurm.py", "tests/test_benchmarks.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """With ``-n``: a file stays together, for its fixtures; files in the order of their names, the long ones first."""
    if getattr(config.option, "numprocesses", None) and config.option.dist in ("no", "load"):
        config.option.dist, config.option.loadscopereorder = "loadgroup", False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    parallel = config.pluginmanager.hasplugin("xdist")
    skip = pytest.mark.skip(reason="takes minutes; give --slow")
    for item in items:
        if parallel:
            file = item.path.relative_to(ROOT).as_posix()
            item.add_marker(pytest.mark.xdist_group("processes" if file.startswith(_ONE_AT_A_TIME) else file))
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(skip)
