"""One process for each core runs the tests (`pytest -n auto`): more threads in each would only wait for each other."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, here and in the programs under test
