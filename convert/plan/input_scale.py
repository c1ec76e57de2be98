"""`--input-scale`: the factor by which an engine scales activations before it rounds them to NVFP4.

It is the largest activation of a calibration run / 2688, which is 6 * 448. No checkpoint has activations, so it cannot
be derived here, and a wrong one costs accuracy without an error: the user states it, one number for all matrices, or a
file from a calibration.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv4.convert.checkpoint.header import strict_json
from dsv4.errors import InputError, UsageError

SUFFIX = ".input_scale"
MAX_BYTES = 100_000_000


@dataclass(frozen=True)
class InputScale:
    """One number for all matrices, or one by the name of each tensor. described: for manifest and journal."""

    described: str
    number: float = 1.0
    by_name: Mapping[str, float] = field(default_factory=dict)

    def of(self, name: str) -> float:
        """The number of a tensor. Raises InputError if the file does not have it."""
        if self.by_name and name not in self.by_name:
            raise InputError(f"'{name}' is not in the file of --input-scale", "It needs one of every expert matrix.")
        return self.by_name.get(name, self.number)


def _is_scale(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _of_file(path: Path) -> InputScale:
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise InputError(f"{path}: {size} bytes, at most {MAX_BYTES} are believable")
    raw = path.read_bytes()
    found = strict_json(raw, str(path), "Write tensor name -> number, such as layers.0.ffn.experts.0.w1.input_scale.")
    if not isinstance(found, dict) or not found:
        raise InputError(f"{path}: a JSON object of tensor names and numbers is expected")
    for name, value in found.items():
        if not _is_scale(value):
            raise InputError(f"{path}: '{name}' is {str(value)[:40]}; a positive number expected")
    return InputScale(f"sha256:{hashlib.sha256(raw).hexdigest()}", by_name=found)


def read_input_scale(given: str | float | Path) -> InputScale:
    """A number, or the path of a JSON file: tensor name -> number. Raises UsageError, and InputError for the file."""
    try:
        number = float(str(given))
    except ValueError:
        number = math.nan
    if _is_scale(number):
        return InputScale(repr(number), number)
    path = Path(str(given))
    if not path.is_file():
        raise UsageError(f"--input-scale {given}: neither a positive number nor a file", "Such as --input-scale 1.0.")
    return _of_file(path)
