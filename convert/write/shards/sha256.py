"""SHA-256 of files that are written: of two at a time where the compiled library can, otherwise hashlib's.

The instructions of a processor for SHA-256 are idle half of the time while one file is hashed; `c/sha256.c` hashes a
second one in between. The digests are the same.
"""

import ctypes
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np

from dsv4 import compiled


class Hash(Protocol):
    """What is used of hashlib's objects."""

    def update(self, data: memoryview, /) -> None:
        """The next bytes."""
        ...

    def hexdigest(self) -> str:
        """Of the bytes so far; more may follow."""
        ...


@dataclass(frozen=True)
class Algorithm:
    """How files are hashed: `new` begins one, `update_two` takes the next bytes of two at the same time."""

    new: Callable[[], Hash]
    update_two: Callable[[Any, memoryview, Any, memoryview], None] | None = None


class _Struct(ctypes.Structure):
    """`struct hash` of sha256.c."""

    _fields_ = [("state", ctypes.c_uint32 * 8), ("length", ctypes.c_uint64), ("rest", ctypes.c_uint8 * 64)]


@cache
def _library() -> ctypes.CDLL | None:
    """The library with the hash; None where there is none or this processor lacks the instructions."""
    library = compiled.library()
    if library is None or not library.dsv4_sha256_works():
        return None
    one, pointer, count = ctypes.POINTER(_Struct), ctypes.c_void_p, ctypes.c_int64
    library.dsv4_sha256_begin.argtypes = [one]
    library.dsv4_sha256_update.argtypes = [one, pointer, count]
    library.dsv4_sha256_update_two.argtypes = [one, pointer, count, one, pointer, count]
    library.dsv4_sha256_digest.argtypes = [one, ctypes.POINTER(ctypes.c_uint8 * 32)]
    return library


def _address(data: memoryview) -> int:
    return int(np.frombuffer(data, np.uint8).ctypes.data) if data else 0


class CompiledHash:
    """SHA-256 by the compiled library, which must be there."""

    def __init__(self) -> None:
        library = _library()
        assert library is not None
        self._library, self._struct = library, _Struct()
        library.dsv4_sha256_begin(self._struct)

    def update(self, data: memoryview, /) -> None:
        """The next bytes."""
        self._library.dsv4_sha256_update(self._struct, _address(data), len(data))

    def update_with(self, data: memoryview, other: "CompiledHash", other_data: memoryview) -> None:
        """The next bytes, and those of another file, in little more time than the longer ones of them take."""
        self._library.dsv4_sha256_update_two(
            self._struct, _address(data), len(data), other._struct, _address(other_data), len(other_data)
        )

    def hexdigest(self) -> str:
        """Of the bytes so far; more may follow."""
        digest = (ctypes.c_uint8 * 32)()
        self._library.dsv4_sha256_digest(self._struct, digest)
        return bytes(digest).hex()


def algorithm() -> Algorithm:
    """The fastest on this machine."""
    if _library() is None:
        return Algorithm(hashlib.sha256)
    return Algorithm(CompiledHash, CompiledHash.update_with)
