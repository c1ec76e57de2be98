"""What a probe records: the stage reached, the engine's choices, an error, and of every weight what is in memory.

A weight is recorded in the dtype that the engine holds it in; codes with scales are decoded to float32 by what their
dtypes mean. Recorded are the SHA-256 of the values' bytes and some elements, so that the answer stays small.
"""

import contextlib
import hashlib
import itertools
import os
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import torch

FILL = 0x5B  # every byte of a parameter before the loader runs: what was never loaded does not look like a weight
ELEMENTS = 16  # of each weight that are recorded as numbers
MOST_TEXT = 2000  # characters of an error's message
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
HERE = os.path.dirname(os.path.abspath(__file__))


def fill(parameters: Iterator[torch.Tensor]) -> None:
    """Set every byte of every parameter to FILL."""
    for parameter in parameters:
        if parameter.numel():
            parameter.data.view(-1).view(torch.uint8).fill_(FILL)


def scale_values(scale: torch.Tensor) -> torch.Tensor:
    """Block scales as float32: bytes are exponents (E8M0), floats are themselves."""
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        return torch.exp2(scale.view(torch.uint8).double() - 127).float()
    return scale.float()


def _codes(codes: torch.Tensor) -> torch.Tensor:
    """E4M3 codes, or bytes of two E2M1 codes with the low nibble first, as float32."""
    if codes.dtype == torch.float8_e4m3fn:
        return codes.float()
    packed = codes.view(torch.uint8)
    both = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
    return torch.tensor([*FP4, *(-value for value in FP4)])[both.int()]


def decode(codes: torch.Tensor, scale: torch.Tensor, block: Sequence[int]) -> torch.Tensor:
    """Codes [rows, columns], and scales of blocks of (rows, columns), as float32. FP4 blocks are 1 x 32."""
    values = _codes(codes)
    rows, columns = block if codes.dtype == torch.float8_e4m3fn else (1, 32)
    spread = scale_values(scale).repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return values * spread[: values.shape[0], : values.shape[1]]


def _cut(tensor: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
    """Rows one after the other, as many as each size says."""
    ends = list(itertools.accumulate(sizes))
    return [tensor[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def parts(codes: torch.Tensor, scale: torch.Tensor | None, sizes: Sequence[int], block: Sequence[int]) -> Any:
    """Matrices that lie one below the other in one parameter, each decoded with its own rows of scales."""
    pieces = _cut(codes, sizes)
    if scale is None:
        return pieces
    rows = block[0] if codes.dtype == torch.float8_e4m3fn else 1
    scales = _cut(scale, [-(-size // rows) for size in sizes])
    return [decode(piece, one, block) for piece, one in zip(pieces, scales, strict=True)]


def _inside(tensor: torch.Tensor, shape: Sequence[int] | None) -> torch.Tensor:
    """Without the padding that an engine adds for its kernels, if it adds any."""
    if shape is None or len(shape) != tensor.dim() or any(a < b for a, b in zip(tensor.shape, shape, strict=True)):
        return tensor
    return tensor[tuple(slice(size) for size in shape)]


class Record:
    """Filled by a probe, written as JSON by `__main__`."""

    def __init__(self, request: Any) -> None:
        self.shapes: Any = request["shapes"]
        self.block: Any = request["block"]
        self.version = self.stage = ""
        self.choices: dict[str, str] = {}
        self.weights: dict[str, Any] = {}
        self.error: Any = None

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Record an exception with the stage at which it was raised, instead of raising it."""
        try:
            yield
        except (Exception, SystemExit) as error:
            frames = traceback.extract_tb(error.__traceback__)
            last = frames[-1] if frames else None
            self.error = {
                "type": type(error).__name__,
                "message": str(error)[:MOST_TEXT],
                "where": f"{last.filename}:{last.lineno}" if last else "",
                "in_probe": last is not None and os.path.dirname(last.filename) == HERE,
            }

    def weight(self, name: str, values: torch.Tensor, loaded: bool = True) -> None:
        """One weight under the release's name. loaded: False where the engine itself says that it was not."""
        values = _inside(values.detach(), self.shapes.get(name)).contiguous()
        if not values.is_floating_point():
            values = values.to(torch.int64)
        flat = values.view(-1)
        count = min(ELEMENTS, len(flat))
        places = [place * (len(flat) - 1) // max(count - 1, 1) for place in range(count)]
        self.weights[name] = {
            "dtype": str(values.dtype).removeprefix("torch."),
            "shape": list(values.shape),
            "sha256": hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest(),
            "elements": [float(flat[place]) for place in places],
            "loaded": loaded and not (len(flat) > 1 and bool((flat == flat[0]).all())),
        }

    def result(self) -> Any:
        """What `__main__` writes."""
        return {name: value for name, value in vars(self).items() if name not in ("shapes", "block")}
