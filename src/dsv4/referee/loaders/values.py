"""A folder's values beside those that an engine holds in memory, weight by weight.

The folder's are decoded by dsv4 and rounded to the dtype that the engine holds, then their bits are compared, by
SHA-256. An engine may hold float32 as BF16; what that changes is `rounded`, not `different`.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.checkpoint.weights import Format, Weight
from dsv4.errors import InputError
from dsv4.progress import Progress
from dsv4.quant.block_scales import dequantize_fp4, dequantize_fp8

from .process import Held

Outcome = Literal["equal", "rounded", "different", "shape", "not loaded", "left out", "not in the folder"]
TORCH_DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64,
    "int64": torch.int64,
}  # fmt: skip


@dataclass(frozen=True)
class Compared:
    """One weight: what became of it, and a line about the difference, if there is one."""

    name: str
    outcome: Outcome
    text: str = ""


def values_of(checkpoint: Checkpoint, weight: Weight) -> torch.Tensor:
    """The values of a weight as the folder has them: float32 for FP4 and FP8, else in the stored dtype.

    Raises InputError for a block scale that is no positive number.
    """
    codes = checkpoint.read_rows(weight.info)
    if weight.format is Format.PLAIN:
        return codes
    assert weight.scale is not None and weight.block is not None
    scale = checkpoint.read_rows(weight.scale)
    try:
        if weight.format is Format.FP4:
            return dequantize_fp4(codes, scale)
        return dequantize_fp8(codes, scale, weight.block)
    except ValueError as error:
        raise InputError(f"'{weight.name}': {error}", "The checkpoint is damaged: download it again.") from None


def _elements(values: torch.Tensor, count: int) -> list[float]:
    """`count` elements at equal distances, the first and the last among them: as a probe records them."""
    flat = values.reshape(-1)
    return [float(flat[place * (len(flat) - 1) // max(count - 1, 1)]) for place in range(count)]


def _difference(held: Held, expected: torch.Tensor) -> str:
    pairs = list(zip(held.elements, _elements(expected, len(held.elements)), strict=True))
    unequal = [(a, b) for a, b in pairs if a != b]
    if not unequal:
        return f"other values, though not among the {len(pairs)} elements recorded"
    quotients = sorted(a / b for a, b in unequal if b and a == a)
    factor = f", factor {quotients[0]:.6g} to {quotients[-1]:.6g}" if quotients else ""
    theirs, ours = unequal[0]
    return f"{theirs:.6g}, not {ours:.6g}; {len(unequal)} of {len(pairs)} recorded elements differ{factor}"


def compare(name: str, values: torch.Tensor, held: Held) -> Compared:
    """One weight. values: the folder's."""
    if held.shape != tuple(values.shape):
        return Compared(name, "shape", f"shape {list(held.shape)}, not {list(values.shape)}")
    dtype = TORCH_DTYPES.get(held.dtype)
    if dtype is None:
        return Compared(name, "different", f"held as {held.dtype}")
    expected = values.to(dtype).contiguous()
    if hashlib.sha256(expected.view(-1).view(torch.uint8).numpy().data).hexdigest() == held.sha256:
        rounded = values.is_floating_point() and not torch.equal(expected.to(values.dtype), values)
        return Compared(name, "rounded" if rounded else "equal", f"rounded to {held.dtype}" if rounded else "")
    if not held.loaded:
        return Compared(name, "not loaded", "never written: it holds what was there before")
    return Compared(name, "different", _difference(held, expected))


def compare_all(
    checkpoint: Checkpoint, weights: Mapping[str, Weight], held: Mapping[str, Any], progress: Progress
) -> Iterator[Compared]:
    """Every weight of the folder, and those that the engine holds beside them. A weight with a fault is left out:
    the rules name it. `progress` is called with bytes.
    """
    for name, weight in weights.items():
        if weight.fault is None and name not in held:
            yield Compared(name, "left out" if weight.is_draft else "not loaded", "the engine has no parameter for it")
        elif weight.fault is None:
            yield compare(name, values_of(checkpoint, weight), held[name])
        progress(weight.info.nbytes)
    for name in held.keys() - weights.keys():
        yield Compared(name, "not in the folder", "the engine has it, the folder does not")
