"""One process for each core runs the tests (`pytest -n auto`): more threads in each would only wait for each other.

Hypothesis draws the same examples on every run; `--hypothesis-profile fresh` draws new ones. The fast loop does not
wait for the disk: an fsync of this process does nothing there. What must be durable is tested by the calls themselves.
"""

import os

import pytest
from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, here and in the programs under test

settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("fresh", deadline=None)
settings.load_profile("same")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("markexpr") == "not slow":
        os.fsync = lambda descriptor: None
