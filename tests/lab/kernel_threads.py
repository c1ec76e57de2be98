"""Compiled kernels that share out even the smallest work over a number of threads."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch

from dsv4.model.kernels import binding


@contextlib.contextmanager
def kernel_threads(count: int) -> Iterator[None]:
    """Every call of a kernel uses `count` threads."""
    with (
        mock.patch.object(binding, "SMALLEST_SHARED_WORK", 0),
        mock.patch.object(torch, "get_num_threads", lambda: count),
    ):
        yield
