"""The compiled row of the table of operations: `native.c`, built once with the machine's C compiler, through ctypes.

It gives the same bits as the reference forms in ops.py, because both follow the order of summation of numerics.py; the
tests compare them. Weights stay packed in memory and are decoded in registers, so a token moves half a byte per FP4
weight and one byte per FP8 weight.
The library is built on first use into the user's cache folder, under a name that is a hash of source, flags and CPU.
Where there is no compiler the reference forms do the work, slowly. Left out: prebuilt binaries, and devices other than
the CPU.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from . import ops
from .numerics import LANES
from .weights import BFLOAT16, FLOAT4_E2M1FN, FLOAT8_E4M3FN, FLOAT32, QUANTIZED, Matrix

SOURCE = Path(__file__).with_name("native.c")
COMPILERS = ("cc", "gcc", "clang")
# -ffp-contract=off: a product and a sum are two roundings, unless the source says otherwise.
FLAGS = ("-O3", "-std=gnu11", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared", "-w")
OPTIONAL_FLAGS = (("-march=native", "-fopenmp"), ("-march=native",), ("-fopenmp",), ())
CODES = {FLOAT32: 0, BFLOAT16: 1, FLOAT8_E4M3FN: 2, FLOAT4_E2M1FN: 3}  # enum format
HEADS_PER_TILE = 4
SMALLEST_SHARED_WORK = 1 << 18  # products; below that a second thread costs more than it gives


class _Matrix(ctypes.Structure):
    """struct matrix of native.c."""

    _fields_ = [
        ("values", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("block_rows", ctypes.c_int64),
        ("block_columns", ctypes.c_int64),
        ("scale_columns", ctypes.c_int64),
        ("format", ctypes.c_int32),
        ("scale_is_float32", ctypes.c_int32),
    ]


def _cpu() -> str:
    """What -march=native depends on: a cache folder may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(next((line for line in lines if line.startswith(key)), "") for key in ("model name", "flags"))


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dsv4"


def _compile(compiler: str, target: Path) -> bool:
    """Build the library as `target` with the best flags that this compiler takes; false if none works."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built = Path(folder) / target.name
        for extra in OPTIONAL_FLAGS:
            command = [compiler, *FLAGS, *extra, str(SOURCE), "-o", str(built), "-lm"]
            if subprocess.run(command, capture_output=True, check=False).returncode == 0:
                os.replace(built, target)
                return True
    return False


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled library, built if need be; None where that is impossible."""
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        return None
    identity = "\0".join((SOURCE.read_text(), compiler, *FLAGS, platform.machine(), _cpu()))
    name = f"native-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    try:
        folder = _cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / name
        if target.exists() or _compile(compiler, target):
            return ctypes.CDLL(str(target))
    except OSError:
        pass  # a read-only home, or a compiler that builds for another machine
    return None


def _describe(matrix: Matrix) -> _Matrix:
    quantized = matrix.scale is not None
    return _Matrix(
        values=matrix.values.data_ptr(),
        scale=matrix.scale.data_ptr() if matrix.scale is not None else None,
        rows=matrix.shape[0],
        columns=matrix.shape[1],
        block_rows=matrix.block.rows if quantized else 1,
        block_columns=matrix.block.columns if quantized else matrix.shape[1],
        scale_columns=matrix.scale.shape[1] if matrix.scale is not None else 1,
        format=CODES[matrix.format],
        scale_is_float32=int(matrix.scale is not None and matrix.scale.dtype == torch.float32),
    )


def _threads(work: int) -> int:
    return torch.get_num_threads() if work >= SMALLEST_SHARED_WORK else 1


def _native_lengths(matrix: Matrix) -> bool:
    return matrix.shape[1] % LANES == 0 and (matrix.format not in QUANTIZED or matrix.block.columns % LANES == 0)


def linear(x: torch.Tensor, matrix: Matrix, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """See ops.linear."""
    loaded = library()
    if loaded is None or not _native_lengths(matrix):
        return ops.linear(x, matrix, start, stop)
    stop = matrix.shape[0] if stop is None else stop
    values = x.to(torch.float32).contiguous()
    result = torch.empty(len(values), stop - start, dtype=torch.float32)
    # Eight significant bits times eight at most: a product that float32 holds exactly.
    exact = x.dtype == torch.bfloat16 and matrix.format != FLOAT32 and matrix.powers_of_two
    loaded.dsv4_linear(
        ctypes.byref(_describe(matrix)),
        ctypes.c_void_p(values.data_ptr()),
        ctypes.c_int64(len(values)),
        ctypes.c_int64(values.shape[1]),
        ctypes.c_int64(start),
        ctypes.c_int64(stop),
        ctypes.c_void_p(result.data_ptr()),
        ctypes.c_int32(exact),
        ctypes.c_int32(_threads(result.numel() * values.shape[1])),
    )
    return result


def sparse_attention(
    q: torch.Tensor,
    window: torch.Tensor,
    compressed: torch.Tensor,
    index: torch.Tensor,
    sink: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """See ops.sparse_attention."""
    loaded, (queries, heads, width) = library(), q.shape
    if loaded is None or width % LANES:
        return ops.sparse_attention(q, window, compressed, index, sink, scale)
    q, window, compressed, index = q.contiguous(), window.contiguous(), compressed.contiguous(), index.contiguous()
    listed, result = index.shape[1], torch.empty_like(q)
    threads = _threads(2 * q.numel() * listed)
    scratch = torch.empty(threads * (listed + 2 * HEADS_PER_TILE) * width, dtype=torch.float32)
    loaded.dsv4_sparse_attention(
        ctypes.c_void_p(q.data_ptr()),
        ctypes.c_void_p(window.data_ptr()),
        ctypes.c_void_p(compressed.data_ptr()),
        ctypes.c_void_p(index.data_ptr()),
        ctypes.c_void_p(sink.data_ptr()),
        ctypes.c_float(scale),
        ctypes.c_int64(queries),
        ctypes.c_int64(heads),
        ctypes.c_int64(width),
        ctypes.c_int64(listed),
        ctypes.c_int64(len(window)),
        ctypes.c_int32(q.dtype == torch.bfloat16),
        ctypes.c_void_p(result.data_ptr()),
        ctypes.c_void_p(scratch.data_ptr()),
        ctypes.c_int32(threads),
    )
    return result


def index_scores(q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """See ops.index_scores."""
    loaded, (queries, heads, width) = library(), q.shape
    if loaded is None or width % LANES:
        return ops.index_scores(q, weights, keys)
    rounded, keys = q.dtype == torch.bfloat16, keys.contiguous()
    matrix = Matrix("index keys", BFLOAT16 if rounded else FLOAT32, (len(keys), width), keys)
    wide, wide_weights = q.to(torch.float32).contiguous(), weights.to(torch.float32).contiguous()
    scores = torch.empty(queries, len(keys), dtype=torch.float32)
    threads = _threads(scores.numel() * heads * width)
    scratch = torch.empty(threads * heads * 5, dtype=torch.float32)
    loaded.dsv4_index_scores(
        ctypes.byref(_describe(matrix)),
        ctypes.c_void_p(wide.data_ptr()),
        ctypes.c_void_p(wide_weights.data_ptr()),
        ctypes.c_int64(queries),
        ctypes.c_int64(heads),
        ctypes.c_int32(rounded),
        ctypes.c_void_p(scores.data_ptr()),
        ctypes.c_void_p(scratch.data_ptr()),
        ctypes.c_int32(threads),
    )
    return scores


NATIVE = ops.Operations(linear, sparse_attention, index_scores)
