"""One process for each core runs the tests (`pytest -n auto`): more threads in each would only wait for each other.

Hypothesis draws the same examples on every run; `--hypothesis-profile fresh` draws new ones. Tests do not wait for the
disk: an fsync of this process does nothing. What must be durable is tested by the calls themselves, and `python -m
dsv4` makes them. In the fast loop tests go to the processes by file, so that no fixture is made twice.
"""

import os
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, here and in the programs under test

settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("fresh", deadline=None)
settings.load_profile("same")


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all but the first cases of a test as slow, where `fast_cases` says how many are in the fast loop."""
    seen = Counter[str]()
    for item in items:
        if mark := item.get_closest_marker("fast_cases"):
            test = item.nodeid.partition("[")[0]
            seen[test] += 1
            if seen[test] > mark.args[0]:
                item.add_marker(pytest.mark.slow)


def pytest_configure(config: pytest.Config) -> None:
    os.fsync = lambda descriptor: None
    if config.getoption("markexpr") == "not slow" and config.getoption("dist", None) == "load":
        config.option.dist = "loadfile"


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """What the command line sets for its own process, such as large pages, does not reach the next test's programs."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
