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

from dsv4.model.weights import BFLOAT16, FLOAT4_E2M1FN, FLOAT8_E4M3FN, FLOAT32, QUANTIZED, Matrix
from dsv4.quant.activation import simulate_fp8 as reference_simulate_fp8

from . import reference as ops
from . import reference_small as parts
from .deterministic import ELEMENTS_PER_STEP, paired

SOURCE = Path(__file__).with_name("native.c")
COMPILERS = ("cc", "gcc", "clang")
# -ffp-contract=off: a product and a sum are two roundings, unless the source says otherwise.
FLAGS = ("-O3", "-std=gnu11", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared", "-w")
OPTIONAL_FLAGS = (("-march=native", "-fopenmp"), ("-march=native",), ("-fopenmp",), ())
CODES = {FLOAT32: 0, BFLOAT16: 1, FLOAT8_E4M3FN: 2, FLOAT4_E2M1FN: 3}  # enum format
HEADS_PER_TILE = 4
MOST_STREAMS = 64
ROWS_PER_STRIP = 16
SMALLEST_SHARED_WORK = 1 << 18  # products; below that a second thread costs more than it gives
WORK_PER_ELEMENT = 4  # of the small operations, in products


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


# Argument types of each function of native.c: m struct matrix *, p pointer, l int64, i int32, f float.
SIGNATURES = {
    "dsv4_linear": "mpllllppiiiii",
    "dsv4_sparse_attention": "pppppflllllippi",
    "dsv4_index_scores": "mppllippi",
    "dsv4_simulate_fp8": "pplllii",
    "dsv4_mean_square": "pppllii",
    "dsv4_rms_norm": "ppfppllii",
    "dsv4_head_norm": "pfppllii",
    "dsv4_rotate": "ppppllllii",
    "dsv4_split_mixes": "pppppplllf",
    "dsv4_collapse": "ppplllii",
    "dsv4_expand": "ppppplllii",
    "dsv4_swiglu": "ppppllfii",
}


def _cpu() -> str:
    """What -march=native depends on: a cache folder may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(next((line for line in lines if line.startswith(key)), "") for key in ("model name", "flags"))


def compiler() -> str | None:
    """Where the machine's C compiler is; None where it has none."""
    return next((found for name in COMPILERS if (found := shutil.which(name))), None)


def cache_folder() -> Path:
    """Where compiled libraries are kept, for this user."""
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


def _open(path: Path) -> ctypes.CDLL:
    types = {"m": ctypes.POINTER(_Matrix), "p": ctypes.c_void_p, "l": ctypes.c_int64, "i": ctypes.c_int32}
    types["f"] = ctypes.c_float
    loaded = ctypes.CDLL(str(path))
    for name, letters in SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = [types[letter] for letter in letters], None
    loaded.dsv4_has_dot.argtypes, loaded.dsv4_has_dot.restype = [], ctypes.c_int32
    return loaded


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled library, built if need be; None where that is impossible."""
    compiled_by = compiler()
    if compiled_by is None:
        return None
    sources = (path.read_text() for path in sorted(SOURCE.parent.glob("native*.[ch]")))
    identity = "\0".join((*sources, compiled_by, *FLAGS, platform.machine(), _cpu()))
    name = f"native-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / name
        if target.exists() or _compile(compiled_by, target):
            return _open(target)
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


def _is_bfloat16(x: torch.Tensor) -> bool:
    return x.dtype == torch.bfloat16


def _threads(work: int) -> int:
    return torch.get_num_threads() if work >= SMALLEST_SHARED_WORK else 1


def _threads_for(x: torch.Tensor) -> int:
    """For an operation that does something to each element."""
    return _threads(x.numel() * WORK_PER_ELEMENT)


def _native_lengths(matrix: Matrix) -> bool:
    step = ELEMENTS_PER_STEP
    return matrix.shape[1] % step == 0 and (matrix.format not in QUANTIZED or matrix.block.columns % step == 0)


@functools.cache
def has_dot() -> bool:
    """Whether the compiled code may use this CPU's bfloat16 dot product, which it tries out."""
    loaded = library()
    return loaded is not None and bool(loaded.dsv4_has_dot())


def linear(
    x: torch.Tensor, matrix: Matrix, start: int = 0, stop: int | None = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """See ops.linear."""
    loaded = library()
    if loaded is None or not _native_lengths(matrix):
        return ops.linear(x, matrix, start, stop, dtype)
    stop = matrix.shape[0] if stop is None else stop
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, columns = x.shape
    result = torch.empty(rows, stop - start, dtype=dtype)
    # Eight significant bits times eight at most: a product that float32 holds exactly.
    exact = _is_bfloat16(x) and matrix.format != FLOAT32 and matrix.exact_products
    threads = _threads(result.numel() * columns)
    strips, width = threads * ROWS_PER_STRIP, columns + ELEMENTS_PER_STEP
    scratch = torch.empty((2 * rows + strips) * width + strips * rows, dtype=torch.float32)
    loaded.dsv4_linear(
        _describe(matrix), x.data_ptr(), rows, x.stride(0), start, stop, result.data_ptr(), scratch.data_ptr(),
        _is_bfloat16(x), _is_bfloat16(result), exact, has_dot(), threads,
    )  # fmt: skip
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
    if loaded is None or width % ELEMENTS_PER_STEP:
        return ops.sparse_attention(q, window, compressed, index, sink, scale)
    q, window, compressed, index = q.contiguous(), window.contiguous(), compressed.contiguous(), index.contiguous()
    listed, result = index.shape[1], torch.empty_like(q)
    threads = _threads(2 * q.numel() * listed)
    scratch = torch.empty(threads * (listed + 2 * HEADS_PER_TILE) * width, dtype=torch.float32)
    loaded.dsv4_sparse_attention(
        q.data_ptr(), window.data_ptr(), compressed.data_ptr(), index.data_ptr(), sink.data_ptr(), scale,
        queries, heads, width, listed, len(window), _is_bfloat16(q), result.data_ptr(), scratch.data_ptr(), threads,
    )  # fmt: skip
    return result


def index_scores(q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """See ops.index_scores."""
    loaded, (queries, heads, width) = library(), q.shape
    if loaded is None or width % ELEMENTS_PER_STEP:
        return ops.index_scores(q, weights, keys)
    rounded, keys = _is_bfloat16(q), keys.contiguous()
    matrix = Matrix("index keys", BFLOAT16 if rounded else FLOAT32, (len(keys), width), keys)
    wide, wide_weights = paired(q.to(torch.float32)).contiguous(), weights.to(torch.float32).contiguous()
    scores = torch.empty(queries, len(keys), dtype=torch.float32)
    threads = _threads(scores.numel() * heads * width)
    scratch = torch.empty(threads * (heads * 5 + 4 * (width + ELEMENTS_PER_STEP)), dtype=torch.float32)
    loaded.dsv4_index_scores(
        _describe(matrix), wide.data_ptr(), wide_weights.data_ptr(), queries, heads, rounded,
        scores.data_ptr(), scratch.data_ptr(), threads,
    )  # fmt: skip
    return scores


def simulate_fp8(x: torch.Tensor, group: int) -> torch.Tensor:
    """See dsv4.quant.activation.simulate_fp8."""
    loaded = library()
    if loaded is None:
        return reference_simulate_fp8(x, group)
    x = x.contiguous()
    result, columns = torch.empty_like(x), x.shape[-1]
    rows = x.numel() // max(columns, 1)  # keys may be nothing but their rotary part
    loaded.dsv4_simulate_fp8(x.data_ptr(), result.data_ptr(), rows, columns, group, _is_bfloat16(x), _threads_for(x))
    return result


def mean_square(x: torch.Tensor) -> torch.Tensor:
    """See parts.mean_square."""
    loaded = library()
    if loaded is None:
        return parts.mean_square(x)
    x, columns, threads = x.contiguous(), x.shape[-1], _threads_for(x)
    result, scratch = torch.empty(x.shape[:-1], dtype=torch.float32), torch.empty(threads * columns)
    loaded.dsv4_mean_square(
        x.data_ptr(), result.data_ptr(), scratch.data_ptr(), result.numel(), columns, _is_bfloat16(x), threads
    )
    return result


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See parts.rms_norm."""
    loaded = library()
    if loaded is None:
        return parts.rms_norm(x, weight, eps)
    x, columns, threads = x.contiguous(), x.shape[-1], _threads_for(x)
    result, scratch, rows = torch.empty_like(x), torch.empty(threads * columns), x.numel() // columns
    loaded.dsv4_rms_norm(
        x.data_ptr(), weight.data_ptr(), eps, result.data_ptr(), scratch.data_ptr(), rows, columns, _is_bfloat16(x),
        threads,
    )  # fmt: skip
    return result


def head_norm(q: torch.Tensor, eps: float) -> torch.Tensor:
    """See parts.head_norm."""
    loaded = library()
    if loaded is None:
        return parts.head_norm(q, eps)
    q, (tokens, heads, columns), threads = q.contiguous(), q.shape, _threads_for(q)
    result, scratch = torch.empty_like(q), torch.empty(threads * columns)
    loaded.dsv4_head_norm(
        q.data_ptr(), eps, result.data_ptr(), scratch.data_ptr(), tokens * heads, columns, _is_bfloat16(q), threads,
    )  # fmt: skip
    return result


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """See parts.rotate."""
    loaded = library()
    if loaded is None:
        return parts.rotate(x, cos, sin)
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    result, (rows, heads, columns) = torch.empty_like(x), x.shape
    loaded.dsv4_rotate(
        x.data_ptr(), cos.data_ptr(), sin.data_ptr(), result.data_ptr(), rows, heads, columns, cos.shape[1],
        _is_bfloat16(x), _threads_for(x),
    )  # fmt: skip
    return result


def split_mixes(
    mixes: torch.Tensor, scale: torch.Tensor, base: torch.Tensor, n: int, iterations: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See parts.split_mixes."""
    loaded = library()
    if loaded is None or n > MOST_STREAMS:
        return parts.split_mixes(mixes, scale, base, n, iterations, eps)
    mixes, rows = mixes.contiguous(), len(mixes)
    pre, post = torch.empty(rows, n, dtype=torch.float32), torch.empty(rows, n, dtype=torch.float32)
    comb = torch.empty(rows, n, n, dtype=torch.float32)
    loaded.dsv4_split_mixes(
        mixes.data_ptr(), scale.data_ptr(), base.data_ptr(), pre.data_ptr(), post.data_ptr(), comb.data_ptr(),
        rows, n, iterations, eps,
    )  # fmt: skip
    return pre, post, comb


def collapse(weights: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """See parts.collapse."""
    loaded = library()
    if loaded is None:
        return parts.collapse(weights, h)
    weights, h, (rows, n, columns) = weights.contiguous(), h.contiguous(), h.shape
    result = torch.empty(rows, columns, dtype=h.dtype)
    loaded.dsv4_collapse(
        weights.data_ptr(), h.data_ptr(), result.data_ptr(), rows, n, columns, _is_bfloat16(h), _threads_for(h)
    )
    return result


def expand(output: torch.Tensor, h: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
    """See parts.expand."""
    loaded = library()
    if loaded is None:
        return parts.expand(output, h, post, comb)
    output, h, post, comb = output.contiguous(), h.contiguous(), post.contiguous(), comb.contiguous()
    result, (rows, n, columns) = torch.empty_like(h), h.shape
    loaded.dsv4_expand(
        output.data_ptr(), h.data_ptr(), post.data_ptr(), comb.data_ptr(), result.data_ptr(), rows, n, columns,
        _is_bfloat16(h), _threads_for(h),
    )  # fmt: skip
    return result


def swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float, share: torch.Tensor | None) -> torch.Tensor:
    """See parts.swiglu."""
    loaded = library()
    if loaded is None:
        return parts.swiglu(gate, up, limit, share)
    gate, up, share = gate.contiguous(), up.contiguous(), None if share is None else share.contiguous()
    result, (rows, columns) = torch.empty_like(gate), gate.shape
    loaded.dsv4_swiglu(
        gate.data_ptr(), up.data_ptr(), None if share is None else share.data_ptr(), result.data_ptr(),
        rows, columns, limit, _is_bfloat16(gate), _threads_for(gate),
    )  # fmt: skip
    return result


NATIVE = ops.Operations(
    linear=linear,
    sparse_attention=sparse_attention,
    index_scores=index_scores,
    simulate_fp8=simulate_fp8,
    mean_square=mean_square,
    rms_norm=rms_norm,
    head_norm=head_norm,
    rotate=rotate,
    split_mixes=split_mixes,
    collapse=collapse,
    expand=expand,
    swiglu=swiglu,
)
