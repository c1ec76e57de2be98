"""The compiled row of the kernel table: the C files beside this one, built once with the machine's compiler, by ctypes.

It gives the same bits as the reference forms, because both follow the order of summation of deterministic.py; the tests
compare them. Weights stay packed in memory and are decoded in registers, so a token moves half a byte per FP4 weight
and one byte per FP8 weight.
The library is built on first use into the user's cache folder, under a name that is a hash of source, flags and CPU:
with vector code for AVX-512 or AVX2 where the processor has it, else in plain C, all with the same bits. DSV4_KERNELS
asks for one form (`FORMS`). Where no library can be built `library` is None, and `table.py` selects the reference forms
instead of the functions here.
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

from dsv4.errors import UsageError, printable
from dsv4.model.weights import BFLOAT16, FLOAT4_E2M1FN, FLOAT8_E4M3FN, FLOAT32, Matrix

from . import reference
from . import reference_small as small
from .deterministic import ELEMENTS_PER_STEP, paired

FOLDER = Path(__file__).parent
COMPILERS = ("cc", "gcc", "clang")
# -ffp-contract=off: a product and a sum are two roundings, unless the source says otherwise. -Wno-psabi: vectors wider
# than the machine's registers are passed between inlined functions only, so by no ABI.
FLAGS = ("-O3", "-std=gnu11", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi", "-fPIC", "-shared")
VARIABLE = "DSV4_KERNELS"
# Values of the variable, and the flags that have the compiler build that form. `native`: the best of this processor.
FORMS = {"native": ("-march=native",), "avx2": ("-march=haswell",), "plain": ()}
NAMES = ("plain C", "AVX2", "AVX-512", "AVX-512 with BF16")  # by what dsv4_form returns
FORMATS = {FLOAT32: 0, BFLOAT16: 1, FLOAT8_E4M3FN: 2, FLOAT4_E2M1FN: 3}  # enum format
SMALLEST_SHARED_WORK = 1 << 18  # products; below that a second thread costs more than it gives
WORK_PER_ELEMENT = 4  # of the small operations, in products


class _Matrix(ctypes.Structure):
    """struct matrix of cpu_vectors.h."""

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


_TYPES = {
    "m": ctypes.POINTER(_Matrix),
    "p": ctypes.c_void_p,
    "l": ctypes.c_int64,
    "i": ctypes.c_int32,
    "f": ctypes.c_float,
}
# Argument types of each C function: m struct matrix *, p pointer, l int64, i int32, f float.
_OPERATIONS = {
    "dsv4_linear": "mpllllppiiiii",
    "dsv4_sparse_attention": "pppppflllllippi",
    "dsv4_index_scores": "mppllippi",
    "dsv4_simulate_fp8": "pplllii",
    "dsv4_inverse_rms": "pfppllii",
    "dsv4_rms_norm": "ppfppllii",
    "dsv4_head_norm": "pfppllii",
    "dsv4_rotate": "ppppllllii",
    "dsv4_hc_split_sinkhorn": "pppppplllf",
    "dsv4_hc_pre": "ppplllii",
    "dsv4_hc_post": "ppppplllii",
    "dsv4_swiglu": "ppppllfii",
}
# The same of those that return an int64: what C alone knows about scratch and limits.
_SIZES = {
    "dsv4_linear_scratch": "lll",
    "dsv4_sparse_attention_scratch": "lll",
    "dsv4_index_scores_scratch": "lll",
    "dsv4_row_scratch": "ll",
    "dsv4_most_streams": "",
    "dsv4_has_dot": "",
    "dsv4_form": "",
}


def sources() -> list[Path]:
    """The C files, headers left out."""
    return sorted(FOLDER.glob("*.c"))


def _cpu() -> str:
    """Model and flags of the processor, which -march=native depends on: machines may share a cache folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(next((line for line in lines if line.startswith(key)), "") for key in ("model name", "flags"))


def compiler() -> str | None:
    """Path of the machine's C compiler; None if it has none."""
    return next((found for name in COMPILERS if (found := shutil.which(name))), None)


def cache_folder() -> Path:
    """The folder of this user's compiled libraries."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dsv4"


def wanted_form() -> str:
    """The form that DSV4_KERNELS asks for. Raises UsageError for one that is unknown or that this processor lacks."""
    form = os.environ.get(VARIABLE) or "native"
    if form not in FORMS:
        raise UsageError(f"{VARIABLE} is '{printable(form)}'", f"It is one of {', '.join(FORMS)}, or not set.")
    if form == "avx2" and "avx2" not in _cpu().split():
        raise UsageError(f"{VARIABLE} is 'avx2', which this processor does not have", f"Unset {VARIABLE}.")
    return form


def _flags(form: str) -> list[tuple[str, ...]]:
    """Sets of flags to try in turn: not every compiler knows this processor or has OpenMP."""
    march = FORMS[form]
    tried = [(*march, "-fopenmp"), march]
    return tried if form != "native" else [*tried, ("-fopenmp",), ()]


def _compile(compiler: str, form: str, target: Path) -> bool:
    """Build the library as `target` with the best flags that this compiler takes; false if none works."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built = Path(folder) / target.name
        for extra in _flags(form):
            command = [compiler, *FLAGS, *extra, *map(str, sources()), "-o", str(built), "-lm"]
            if subprocess.run(command, capture_output=True, check=False).returncode == 0:
                os.replace(built, target)
                return True
    return False


def _open(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    for names, result in ((_OPERATIONS, None), (_SIZES, ctypes.c_int64)):
        for name, letters in names.items():
            function = getattr(loaded, name)
            function.argtypes, function.restype = [_TYPES[letter] for letter in letters], result
    return loaded


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled library, built if need be; None where that is impossible. Raises UsageError, see `wanted_form`."""
    form, compiled_by = wanted_form(), compiler()
    if compiled_by is None:
        return None
    texts = (path.read_text() for path in sorted([*FOLDER.glob("*.h"), *sources()]))
    identity = "\0".join((*texts, compiled_by, form, *FLAGS, platform.machine(), _cpu()))
    name = f"kernels-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / name
        if target.exists() or _compile(compiled_by, form, target):
            return _open(target)
    except OSError:
        pass  # a read-only home, or a compiler that builds for another machine
    return None


def form_name() -> str:
    """The form of the kernels that runs on the CPU, in words."""
    loaded = library()
    return "torch, without a compiler" if loaded is None else NAMES[loaded.dsv4_form()]


def is_slow() -> bool:
    """Whether the kernels on the CPU use no vector code: decoding is then many times slower."""
    return form_name() not in NAMES[1:]


def _loaded() -> ctypes.CDLL:
    loaded = library()
    assert loaded is not None, "select_kernels takes this row only where there is a library"
    return loaded


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
        format=FORMATS[matrix.format],
        scale_is_float32=int(matrix.scale is not None and matrix.scale.dtype == torch.float32),
    )


def _is_bfloat16(x: torch.Tensor) -> bool:
    return x.dtype == torch.bfloat16


def _threads(work: int) -> int:
    return torch.get_num_threads() if work >= SMALLEST_SHARED_WORK else 1


def _threads_for(x: torch.Tensor) -> int:
    """For an operation that does something to each element."""
    return _threads(x.numel() * WORK_PER_ELEMENT)


def _scratch(floats: int) -> torch.Tensor:
    return torch.empty(floats, dtype=torch.float32)


def _row_scratch(columns: int, threads: int) -> torch.Tensor:
    return _scratch(_loaded().dsv4_row_scratch(columns, threads))


def _whole_steps(matrix: Matrix) -> bool:
    """Whether rows, and blocks of rows, are whole steps of a dot product, as the C code takes for granted."""
    step = ELEMENTS_PER_STEP
    return matrix.shape[1] % step == 0 and (matrix.scale is None or matrix.block.columns % step == 0)


@functools.cache
def has_dot() -> bool:
    """Whether the compiled code may use this CPU's bfloat16 dot product, which it tries out."""
    return bool(_loaded().dsv4_has_dot())


def linear(
    x: torch.Tensor, matrix: Matrix, start: int = 0, stop: int | None = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """See reference.linear."""
    if not _whole_steps(matrix):
        return reference.linear(x, matrix, start, stop, dtype)
    stop = matrix.shape[0] if stop is None else stop
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, columns = x.shape
    result = torch.empty(rows, stop - start, dtype=dtype)
    # Eight significant bits times eight at most: a product that float32 holds exactly.
    exact = _is_bfloat16(x) and matrix.format != FLOAT32 and matrix.exact_products
    threads = _threads(result.numel() * columns)
    scratch = _scratch(_loaded().dsv4_linear_scratch(rows, columns, threads))
    _loaded().dsv4_linear(
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
    """See reference.sparse_attention."""
    queries, heads, width = q.shape
    if width % ELEMENTS_PER_STEP:
        return reference.sparse_attention(q, window, compressed, index, sink, scale)
    q, window, compressed, index = q.contiguous(), window.contiguous(), compressed.contiguous(), index.contiguous()
    listed, result = index.shape[1], torch.empty_like(q)
    threads = _threads(2 * q.numel() * listed)
    scratch = _scratch(_loaded().dsv4_sparse_attention_scratch(width, listed, threads))
    _loaded().dsv4_sparse_attention(
        q.data_ptr(), window.data_ptr(), compressed.data_ptr(), index.data_ptr(), sink.data_ptr(), scale,
        queries, heads, width, listed, len(window), _is_bfloat16(q), result.data_ptr(), scratch.data_ptr(), threads,
    )  # fmt: skip
    return result


def index_scores(q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """See reference.index_scores."""
    queries, heads, width = q.shape
    if width % ELEMENTS_PER_STEP:
        return reference.index_scores(q, weights, keys)
    rounded, keys = _is_bfloat16(q), keys.contiguous()
    matrix = Matrix("index keys", BFLOAT16 if rounded else FLOAT32, (len(keys), width), keys)
    wide, wide_weights = paired(q.to(torch.float32)).contiguous(), weights.to(torch.float32).contiguous()
    scores = torch.empty(queries, len(keys), dtype=torch.float32)
    threads = _threads(scores.numel() * heads * width)
    scratch = _scratch(_loaded().dsv4_index_scores_scratch(heads, width, threads))
    _loaded().dsv4_index_scores(
        _describe(matrix), wide.data_ptr(), wide_weights.data_ptr(), queries, heads, rounded,
        scores.data_ptr(), scratch.data_ptr(), threads,
    )  # fmt: skip
    return scores


def simulate_fp8(x: torch.Tensor, group: int) -> torch.Tensor:
    """See dsv4.quant.activation.simulate_fp8."""
    x = x.contiguous()
    result, columns = torch.empty_like(x), x.shape[-1]
    rows = x.numel() // max(columns, 1)  # keys may be nothing but their rotary part
    _loaded().dsv4_simulate_fp8(x.data_ptr(), result.data_ptr(), rows, columns, group, _is_bfloat16(x), _threads_for(x))
    return result


def inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """See reference_small.inverse_rms."""
    x, columns, threads = x.contiguous(), x.shape[-1], _threads_for(x)
    result, scratch = torch.empty(x.shape[:-1], dtype=torch.float32), _row_scratch(columns, threads)
    _loaded().dsv4_inverse_rms(
        x.data_ptr(), eps, result.data_ptr(), scratch.data_ptr(), result.numel(), columns, _is_bfloat16(x), threads
    )
    return result


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See reference_small.rms_norm."""
    x, columns, threads = x.contiguous(), x.shape[-1], _threads_for(x)
    result, scratch, rows = torch.empty_like(x), _row_scratch(columns, threads), x.numel() // columns
    _loaded().dsv4_rms_norm(
        x.data_ptr(), weight.data_ptr(), eps, result.data_ptr(), scratch.data_ptr(), rows, columns, _is_bfloat16(x),
        threads,
    )  # fmt: skip
    return result


def head_norm(q: torch.Tensor, eps: float) -> torch.Tensor:
    """See reference_small.head_norm."""
    q, (tokens, heads, columns), threads = q.contiguous(), q.shape, _threads_for(q)
    result, scratch = torch.empty_like(q), _row_scratch(columns, threads)
    _loaded().dsv4_head_norm(
        q.data_ptr(), eps, result.data_ptr(), scratch.data_ptr(), tokens * heads, columns, _is_bfloat16(q), threads,
    )  # fmt: skip
    return result


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """See reference_small.rotate."""
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    result, (rows, heads, columns) = torch.empty_like(x), x.shape
    _loaded().dsv4_rotate(
        x.data_ptr(), cos.data_ptr(), sin.data_ptr(), result.data_ptr(), rows, heads, columns, cos.shape[1],
        _is_bfloat16(x), _threads_for(x),
    )  # fmt: skip
    return result


def hc_split_sinkhorn(
    mixes: torch.Tensor, scale: torch.Tensor, base: torch.Tensor, n: int, iterations: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See reference_small.hc_split_sinkhorn."""
    if n > _loaded().dsv4_most_streams():
        return small.hc_split_sinkhorn(mixes, scale, base, n, iterations, eps)
    mixes, rows = mixes.contiguous(), len(mixes)
    pre, post = torch.empty(rows, n, dtype=torch.float32), torch.empty(rows, n, dtype=torch.float32)
    comb = torch.empty(rows, n, n, dtype=torch.float32)
    _loaded().dsv4_hc_split_sinkhorn(
        mixes.data_ptr(), scale.data_ptr(), base.data_ptr(), pre.data_ptr(), post.data_ptr(), comb.data_ptr(),
        rows, n, iterations, eps,
    )  # fmt: skip
    return pre, post, comb


def hc_pre(weights: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """See reference_small.hc_pre."""
    weights, h, (rows, n, columns) = weights.contiguous(), h.contiguous(), h.shape
    result = torch.empty(rows, columns, dtype=h.dtype)
    _loaded().dsv4_hc_pre(
        weights.data_ptr(), h.data_ptr(), result.data_ptr(), rows, n, columns, _is_bfloat16(h), _threads_for(h)
    )
    return result


def hc_post(output: torch.Tensor, h: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
    """See reference_small.hc_post."""
    output, h, post, comb = output.contiguous(), h.contiguous(), post.contiguous(), comb.contiguous()
    result, (rows, n, columns) = torch.empty_like(h), h.shape
    _loaded().dsv4_hc_post(
        output.data_ptr(), h.data_ptr(), post.data_ptr(), comb.data_ptr(), result.data_ptr(), rows, n, columns,
        _is_bfloat16(h), _threads_for(h),
    )  # fmt: skip
    return result


def swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float, share: torch.Tensor | None) -> torch.Tensor:
    """See reference_small.swiglu."""
    gate, up, share = gate.contiguous(), up.contiguous(), None if share is None else share.contiguous()
    result, (rows, columns) = torch.empty_like(gate), gate.shape
    _loaded().dsv4_swiglu(
        gate.data_ptr(), up.data_ptr(), None if share is None else share.data_ptr(), result.data_ptr(),
        rows, columns, limit, _is_bfloat16(gate), _threads_for(gate),
    )  # fmt: skip
    return result
