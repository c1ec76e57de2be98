"""The compiled row of the kernel table: the C files in `c/`, built at installation (setup.py), called by ctypes.

It gives the same bits as the reference forms, because both follow the order of summation of deterministic.py; the tests
compare them. Weights stay packed in memory and are decoded in registers, so a token moves half a byte per FP4 weight
and one byte per FP8 weight.
The library has every kernel in several forms, with vector code for AVX-512, AVX2 or NEON and in plain C, all with the
same bits. The best form that this processor has is taken; DSV4_KERNELS asks for one (`FORMS`). Where there is no
library `library` is None, and `table.py` selects the reference forms instead of the functions here.
"""

import ctypes
import functools
import os
import struct
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import NamedTuple

import torch

from dsv4 import compiled
from dsv4.errors import UsageError
from dsv4.model.weights import BFLOAT16, FLOAT4_E2M1FN, FLOAT8_E4M3FN, FLOAT32, Matrix
from dsv4.quant.activation import FP4_GROUP

from . import reference
from . import reference_small as small
from .deterministic import ELEMENTS_PER_STEP
from .reference import Experts, Product, QueryWeights

VARIABLE = "DSV4_KERNELS"
BEST = "native"  # value of the variable: the best form that this processor has
PLAIN = "plain"
# The forms in words, best first; their names end those of the C functions.
FORMS = {"avx512bf16": "AVX-512 with BF16", "avx512": "AVX-512", "avx2": "AVX2", "neon": "NEON", PLAIN: "plain C"}
FORMATS = FLOAT32, BFLOAT16, FLOAT8_E4M3FN, FLOAT4_E2M1FN  # their codes come from C
SMALLEST_SHARED_WORK = 1 << 18  # products; below that a second thread costs more than it gives
WORK_PER_ELEMENT = 4  # of the small operations, in products


class _Matrix(ctypes.Structure):
    """struct matrix of vectors.h."""

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
        ("exact", ctypes.c_int32),
    ]


# struct product of products.h: w, x and y; m_count, strides of x and y, start, stop; x is bfloat16, y is, exact.
_PRODUCT = struct.Struct("@PPPqqqqqiii4x")


_TYPES = {
    "m": ctypes.POINTER(_Matrix),
    "p": ctypes.c_void_p,
    "l": ctypes.c_int64,
    "i": ctypes.c_int32,
    "f": ctypes.c_float,
}
# Argument types of each C function: m struct matrix *, p pointer, l int64, i int32, f float.
_OPERATIONS = {
    "dsv4_linears": "plpi",
    "dsv4_sparse_attention": "pppppflllllippi",
    "dsv4_index_scores": "mppllippi",
    "dsv4_simulate_fp8": "ppllllii",
    "dsv4_inverse_rms": "pfppllii",
    "dsv4_rms_norm": "ppfppllii",
    "dsv4_head_norm": "pfppllii",
    "dsv4_rotate": "pppllllii",
    "dsv4_hc_split_sinkhorn": "pppppplllf",
    "dsv4_hc_pre": "ppplllii",
    "dsv4_hc_input": "pppfpplllii",
    "dsv4_hc_post": "ppppplllii",
    "dsv4_swiglu": "ppppllfii",
    "dsv4_sqrtsoftplus": "ppli",
    "dsv4_pool": "pppplli",
    "dsv4_simulate_index": "ppplllii",
    "dsv4_choose_experts": "pppplll",
    "dsv4_expert_weights": "pppplllff",
    "dsv4_add_experts": "ppppplllii",
    "dsv4_gate": "ppipppllffpi",
    "dsv4_hc_mixes": "ppippppplllffpi",
    "dsv4_token_experts": "ppppplllfipi",
    "dsv4_queries": "ppppppppppplllllfiipi",
    "dsv4_project": "ppppppllllllipi",
}
# The same of those that return an int64: what C alone knows about scratch (bytes), limits and codes of formats.
_SIZES = {
    "dsv4_linears_scratch": "pli",
    "dsv4_sparse_attention_scratch": "lll",
    "dsv4_index_scores_scratch": "lll",
    "dsv4_row_scratch": "ll",
    "dsv4_pool_scratch": "ll",
    "dsv4_gate_scratch": "pilli",
    "dsv4_hc_mixes_scratch": "pili",
    "dsv4_token_experts_scratch": "plii",
    "dsv4_queries_scratch": "pppili",
    "dsv4_project_scratch": "pplili",
    "dsv4_most_streams": "",
    **{f"dsv4_{name}": "" for name in FORMATS},
}


def _runs(loaded: ctypes.CDLL, form: str) -> bool:
    """Whether the library has a form and this processor runs it."""
    if not hasattr(loaded, f"dsv4_linears_{form}") or not getattr(loaded, f"dsv4_has_{form}")():
        return False
    # Which order the processor's bfloat16 dot product adds in is tried out: it is written down nowhere.
    return form != "avx512bf16" or bool(loaded.dsv4_dot_is_in_order_avx512bf16())


@functools.cache
def forms() -> list[str]:
    """The forms that the library has and that this processor runs, best first; none without a library."""
    loaded = compiled.library()
    return [] if loaded is None else [form for form in FORMS if _runs(loaded, form)]


def wanted_form() -> str | None:
    """The form that runs: the one that DSV4_KERNELS asks for, else the best; None without a library.

    Raises UsageError for a form that is unknown, or that the library or this processor lacks.
    """
    name = os.environ.get(VARIABLE) or BEST
    if name != BEST and name not in FORMS:
        raise UsageError(f"{VARIABLE} is '{name}'", f"It is one of {', '.join((BEST, *FORMS))}, or not set.")
    if name == BEST or compiled.library() is None:
        return next(iter(forms()), None)
    if name not in forms():
        raise UsageError(
            f"{VARIABLE} is '{name}', which this processor does not have, or the compiler of the installation did not",
            f"Here it can be {', '.join((BEST, *forms()))}, or unset.",
        )
    return name


def bind(loaded: ctypes.CDLL, form: str) -> SimpleNamespace:
    """The C functions of one form under their names without it."""
    functions = SimpleNamespace(form=form)
    for names, result in ((_OPERATIONS, None), (_SIZES, ctypes.c_int64)):
        for name, letters in names.items():
            function = getattr(loaded, f"{name}_{form}")
            function.argtypes, function.restype = [_TYPES[letter] for letter in letters], result
            setattr(functions, name, function)
    return functions


@functools.cache
def library() -> SimpleNamespace | None:
    """The C functions of the form that runs; None without a compiled library. Raises UsageError, see `wanted_form`."""
    form, loaded = wanted_form(), compiled.library()
    return None if loaded is None or form is None else bind(loaded, form)


def form_name() -> str:
    """The form of the kernels that runs on the CPU, in words."""
    found = library()
    return "torch, without the compiled library" if found is None else FORMS[found.form]


def is_slow() -> bool:
    """Whether the kernels on the CPU use no vector code: decoding is then many times slower."""
    found = library()
    return found is None or found.form == PLAIN


def _loaded() -> SimpleNamespace:
    found = library()
    assert found is not None, "select_kernels takes this row only where there is a library"
    return found


class _Described(NamedTuple):
    """A matrix as C sees it, made once."""

    matrix: _Matrix
    address: int  # of `matrix`
    exact: bool  # whether products with bfloat16 are exact in float32: eight significant bits times eight at most
    whole_steps: bool  # whether rows, and blocks of rows, are whole steps of a dot product, as C takes for granted


def _describe(matrix: Matrix) -> _Described:
    found: _Described | None = matrix.kept.get("c")
    if found is None:
        (rows, columns), quantized = matrix.shape, matrix.scale is not None
        block_columns = matrix.block.columns if quantized else columns
        exact = matrix.format != FLOAT32 and matrix.exact_products
        described = _Matrix(
            values=matrix.values.data_ptr(),
            scale=matrix.scale.data_ptr() if matrix.scale is not None else None,
            rows=rows,
            columns=columns,
            block_rows=matrix.block.rows if quantized else 1,
            block_columns=block_columns,
            scale_columns=matrix.scale.shape[1] if matrix.scale is not None else 1,
            format=getattr(_loaded(), f"dsv4_{matrix.format}")(),
            scale_is_float32=int(matrix.scale is not None and matrix.scale.dtype == torch.float32),
            exact=int(exact),
        )
        whole = columns > 0 and columns % ELEMENTS_PER_STEP == 0 and block_columns % ELEMENTS_PER_STEP == 0
        found = matrix.kept["c"] = _Described(described, ctypes.addressof(described), exact, whole)
    return found


def _is_bfloat16(x: torch.Tensor) -> bool:
    return x.dtype == torch.bfloat16


def _threads(work: int) -> int:
    return torch.get_num_threads() if work >= SMALLEST_SHARED_WORK else 1


def _threads_for(x: torch.Tensor) -> int:
    """For an operation that does something to each element."""
    return _threads(x.numel() * WORK_PER_ELEMENT)


_kept = threading.local()


def _scratch(size: int) -> int:
    """Address of memory for one call of C, kept and reused by each thread: fresh pages cost time."""
    buffer: torch.Tensor | None = getattr(_kept, "buffer", None)
    if buffer is None or buffer.nbytes < size:
        _kept.buffer = buffer = torch.empty(size, dtype=torch.uint8)
    return buffer.data_ptr()


def _row_scratch(columns: int, threads: int) -> int:
    return _scratch(_loaded().dsv4_row_scratch(columns, threads))


def _rows_together(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def linears_into(products: Sequence[Product], results: Sequence[torch.Tensor]) -> None:
    """Several of `linear` in one call, whose threads share out the rows of all; see KernelTable.linears_into."""
    described = [_describe(product.matrix) for product in products]
    if not all(one.whole_steps for one in described):
        for product, y in zip(products, results, strict=True):
            y.copy_(reference.linear(*product, y.dtype))
        return
    inputs, listed, work = [_rows_together(product.x) for product in products], [], 0
    for x, one, product, y in zip(inputs, described, products, results, strict=True):
        (rows, columns), is_bf16, start = x.shape, x.dtype == torch.bfloat16, product.start
        listed.append(
            _PRODUCT.pack(
                one.address, x.data_ptr(), y.data_ptr(), rows, x.stride(0), y.stride(0), start, start + y.shape[1],
                is_bf16, y.dtype == torch.bfloat16, is_bf16 and one.exact,
            )
        )  # fmt: skip
        work += rows * columns * y.shape[1]
    loaded, threads, together, count = _loaded(), _threads(work), b"".join(listed), len(listed)
    loaded.dsv4_linears(together, count, _scratch(loaded.dsv4_linears_scratch(together, count, threads)), threads)


def linear(
    x: torch.Tensor, matrix: Matrix, start: int = 0, stop: int | None = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """See reference.linear."""
    result = torch.empty(x.shape[0], (matrix.shape[0] if stop is None else stop) - start, dtype=dtype)
    linears_into([Product(x, matrix, start, stop)], [result])
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
        queries, heads, width, listed, len(window), _is_bfloat16(q), result.data_ptr(), scratch, threads,
    )  # fmt: skip
    return result


def index_scores(q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """See reference.index_scores."""
    queries, heads, width = q.shape
    if width % ELEMENTS_PER_STEP:
        return reference.index_scores(q, weights, keys)
    is_bf16, q, keys = _is_bfloat16(q), q.contiguous(), keys.contiguous()
    matrix = Matrix("index keys", BFLOAT16 if is_bf16 else FLOAT32, (len(keys), width), keys)
    wide_weights = weights.to(torch.float32).contiguous()
    scores = torch.empty(queries, len(keys), dtype=torch.float32)
    threads = _threads(scores.numel() * heads * width)
    scratch = _scratch(_loaded().dsv4_index_scores_scratch(heads, width, threads))
    _loaded().dsv4_index_scores(
        _describe(matrix).matrix, q.data_ptr(), wide_weights.data_ptr(), queries, heads, is_bf16,
        scores.data_ptr(), scratch, threads,
    )  # fmt: skip
    return scores


def simulate_fp8(x: torch.Tensor, group: int) -> torch.Tensor:
    """See dsv4.quant.activation.simulate_fp8."""
    return simulate_key(x, x.shape[-1], group)


def simulate_key(x: torch.Tensor, quantized: int, group: int) -> torch.Tensor:
    """See reference_small.simulate_key."""
    x = x.contiguous()
    result, columns = torch.empty_like(x), x.shape[-1]
    _loaded().dsv4_simulate_fp8(
        x.data_ptr(), result.data_ptr(), x.numel() // max(columns, 1), columns, quantized, group, _is_bfloat16(x),
        _threads_for(x),
    )  # fmt: skip
    return result


def inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """See reference_small.inverse_rms."""
    x, columns, threads = x.contiguous(), x.shape[-1], _threads_for(x)
    result, scratch = torch.empty(x.shape[:-1], dtype=torch.float32), _row_scratch(columns, threads)
    _loaded().dsv4_inverse_rms(
        x.data_ptr(), eps, result.data_ptr(), scratch, result.numel(), columns, _is_bfloat16(x), threads
    )
    return result


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See reference_small.rms_norm."""
    x, columns, threads = x.contiguous(), x.shape[-1], _threads_for(x)
    result, scratch, rows = torch.empty_like(x), _row_scratch(columns, threads), x.numel() // columns
    _loaded().dsv4_rms_norm(
        x.data_ptr(), weight.data_ptr(), eps, result.data_ptr(), scratch, rows, columns, _is_bfloat16(x),
        threads,
    )  # fmt: skip
    return result


def head_norm(q: torch.Tensor, eps: float) -> torch.Tensor:
    """See reference_small.head_norm."""
    q, (tokens, heads, columns), threads = q.contiguous(), q.shape, _threads_for(q)
    result, scratch = torch.empty_like(q), _row_scratch(columns, threads)
    _loaded().dsv4_head_norm(
        q.data_ptr(), eps, result.data_ptr(), scratch, tokens * heads, columns, _is_bfloat16(q), threads,
    )  # fmt: skip
    return result


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """See reference_small.rotate."""
    x, cos, sin, (rows, heads, columns) = x.contiguous(), cos.contiguous(), sin.contiguous(), x.shape
    _loaded().dsv4_rotate(
        x.data_ptr(), cos.data_ptr(), sin.data_ptr(), rows, heads, columns, cos.shape[1], _is_bfloat16(x),
        _threads(2 * rows * heads * cos.shape[1] * WORK_PER_ELEMENT),
    )  # fmt: skip
    return x


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


def hc_input(weights: torch.Tensor, h: torch.Tensor, norm: torch.Tensor, eps: float) -> torch.Tensor:
    """See reference_small.hc_input."""
    weights, h, (rows, n, columns), threads = weights.contiguous(), h.contiguous(), h.shape, _threads_for(h)
    result = torch.empty(rows, columns, dtype=h.dtype)
    _loaded().dsv4_hc_input(
        weights.data_ptr(), h.data_ptr(), norm.data_ptr(), eps, result.data_ptr(), _row_scratch(columns, threads),
        rows, n, columns, _is_bfloat16(h), threads,
    )  # fmt: skip
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


def sqrtsoftplus(x: torch.Tensor) -> torch.Tensor:
    """See reference_small.sqrtsoftplus."""
    x = x.contiguous()
    result = torch.empty_like(x)
    _loaded().dsv4_sqrtsoftplus(x.data_ptr(), result.data_ptr(), x.numel(), _threads_for(x))
    return result


def simulate_index(x: torch.Tensor) -> torch.Tensor:
    """See reference_small.simulate_index."""
    x, columns, threads = x.contiguous(), x.shape[-1], _threads_for(x)
    if columns < 1 or columns & (columns - 1):
        return small.simulate_index(x)
    result, scratch = torch.empty_like(x), _row_scratch(columns, threads)
    _loaded().dsv4_simulate_index(
        x.data_ptr(), result.data_ptr(), scratch, x.numel() // columns, columns, FP4_GROUP, _is_bfloat16(x), threads
    )
    return result


def pool(kv: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """See reference_small.pool."""
    kv, gate, threads = kv.contiguous(), gate.contiguous(), _threads_for(kv)
    result, tokens = torch.empty(kv.shape[:-1], dtype=torch.float32), kv.shape[-1]
    _loaded().dsv4_pool(
        kv.data_ptr(), gate.data_ptr(), result.data_ptr(), _scratch(_loaded().dsv4_pool_scratch(tokens, threads)),
        result.numel(), tokens, threads,
    )  # fmt: skip
    return result


def choose_experts(scores: torch.Tensor, bias: torch.Tensor, count: int) -> torch.Tensor:
    """See reference_small.choose_experts."""
    scores, (rows, experts) = scores.contiguous(), scores.shape
    result = torch.empty(rows, count, dtype=torch.int64)
    biased = _scratch(experts * torch.float32.itemsize)
    _loaded().dsv4_choose_experts(scores.data_ptr(), bias.data_ptr(), result.data_ptr(), biased, rows, experts, count)
    return result


def expert_weights(scores: torch.Tensor, experts: torch.Tensor, eps: float, factor: float) -> torch.Tensor:
    """See reference_small.expert_weights."""
    scores, experts, (rows, count) = scores.contiguous(), experts.contiguous(), experts.shape
    result = torch.empty(rows, count, dtype=torch.float32)
    _loaded().dsv4_expert_weights(
        scores.data_ptr(), experts.data_ptr(), result.data_ptr(), _scratch(count * torch.float32.itemsize),
        rows, scores.shape[1], count, eps, factor,
    )  # fmt: skip
    return result


def add_experts(outputs: torch.Tensor, experts: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """See reference_small.add_experts."""
    outputs, experts, shared, (rows, count, columns) = (
        outputs.contiguous(), experts.contiguous(), shared.contiguous(), outputs.shape,
    )  # fmt: skip
    result, threads = torch.empty_like(shared), _threads_for(outputs)
    _loaded().dsv4_add_experts(
        outputs.data_ptr(), shared.data_ptr(), experts.data_ptr(), result.data_ptr(), _row_scratch(columns, threads),
        rows, count, columns, _is_bfloat16(outputs), threads,
    )  # fmt: skip
    return result


def gate(
    x: torch.Tensor,
    matrix: Matrix,
    bias: torch.Tensor | None,
    experts: torch.Tensor | None,
    count: int,
    eps: float,
    factor: float,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """`KernelTable.gate` in one call; None for a matrix whose rows are no whole steps."""
    one, loaded = _describe(matrix), _loaded()
    if not one.whole_steps:
        return None
    x, rows, is_bf16 = x.contiguous(), len(x), _is_bfloat16(x)
    threads = _threads(rows * matrix.shape[0] * matrix.shape[1])
    experts = torch.empty(rows, count, dtype=torch.int64) if experts is None else experts.contiguous()
    weights = torch.empty(rows, count, dtype=torch.float32)
    loaded.dsv4_gate(
        one.address, x.data_ptr(), is_bf16, None if bias is None else bias.data_ptr(), experts.data_ptr(),
        weights.data_ptr(), rows, count, eps, factor,
        _scratch(loaded.dsv4_gate_scratch(one.address, is_bf16, rows, count, threads)), threads,
    )  # fmt: skip
    return experts, weights


def hc_mixes(
    h: torch.Tensor,
    fn: Matrix,
    scale: torch.Tensor,
    base: torch.Tensor,
    iterations: int,
    rms_eps: float,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """`KernelTable.hc_mixes` in one call; None where C has no form for it."""
    one, loaded, h, (rows, n, _) = _describe(fn), _loaded(), h.contiguous(), h.shape
    if not one.whole_steps or n > loaded.dsv4_most_streams():
        return None
    is_bf16, threads = _is_bfloat16(h), _threads(rows * fn.shape[0] * fn.shape[1])
    pre, post = torch.empty(2, rows, n, dtype=torch.float32)
    comb = torch.empty(rows, n, n, dtype=torch.float32)
    loaded.dsv4_hc_mixes(
        one.address, h.data_ptr(), is_bf16, scale.data_ptr(), base.data_ptr(), pre.data_ptr(), post.data_ptr(),
        comb.data_ptr(), rows, n, iterations, rms_eps, eps,
        _scratch(loaded.dsv4_hc_mixes_scratch(one.address, is_bf16, rows, threads)), threads,
    )  # fmt: skip
    return pre, post, comb


class _DescribedExperts(NamedTuple):
    """All experts of a layer as C sees them, made once."""

    addresses: ctypes.Array[ctypes.c_void_p]  # of the matrices, three for each expert
    work: int  # products of one expert
    whole_steps: bool


def _describe_experts(experts: Experts) -> _DescribedExperts:
    found: _DescribedExperts | None = experts.kept.get("c")
    if found is None:
        described = [_describe(matrix) for expert in experts.matrices for matrix in expert]
        addresses = (ctypes.c_void_p * len(described))(*(one.address for one in described))
        width, inner = experts.matrices[0].w2.shape
        found = _DescribedExperts(addresses, 3 * width * inner, all(one.whole_steps for one in described))
        experts.kept["c"] = found
    return found


def token_experts(
    x: torch.Tensor, experts: Experts, chosen: torch.Tensor, shares: torch.Tensor, limit: float, group: int
) -> torch.Tensor | None:
    """`KernelTable.token_experts` in one call; None for matrices whose rows are no whole steps."""
    described, loaded = _describe_experts(experts), _loaded()
    if not described.whole_steps:
        return None
    x, chosen, shares, count, is_bf16 = (
        x.contiguous(), chosen.contiguous(), shares.contiguous(), chosen.shape[1], _is_bfloat16(x),
    )  # fmt: skip
    result, threads, addresses = torch.empty_like(x), _threads((count + 1) * described.work), described.addresses
    loaded.dsv4_token_experts(
        x.data_ptr(), addresses, chosen.data_ptr(), shares.data_ptr(), result.data_ptr(), count,
        len(experts.matrices) - 1, group, limit, is_bf16,
        _scratch(loaded.dsv4_token_experts_scratch(addresses, count, is_bf16, threads)), threads,
    )  # fmt: skip
    return result


def queries_and_keys(
    x: torch.Tensor, weights: QueryWeights, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """`WindowAttention.queries_and_keys` in one call; None for matrices whose rows are no whole steps.

    x [T, D]; cos, sin float32 [T, r / 2] -> [T, q_lora_rank], [T, H, c], [T, c].
    """
    matrices, loaded = [_describe(matrix) for matrix in (weights.wq_a, weights.wkv, weights.wq_b)], _loaded()
    if not all(one.whole_steps for one in matrices):
        return None
    x, cos, sin, is_bf16, rows = x.contiguous(), cos.contiguous(), sin.contiguous(), _is_bfloat16(x), len(x)
    (rank, _), (c, _), (wide, _) = (matrix.shape for matrix in (weights.wq_a, weights.wkv, weights.wq_b))
    qr, q, kv = x.new_empty(rows, rank), x.new_empty(rows, wide // c, c), x.new_empty(rows, c)
    threads, addresses = _threads(rows * wide * rank), [one.address for one in matrices]
    loaded.dsv4_queries(
        x.data_ptr(), *addresses, weights.q_norm.data_ptr(), weights.kv_norm.data_ptr(), cos.data_ptr(), sin.data_ptr(),
        qr.data_ptr(), q.data_ptr(), kv.data_ptr(), rows, cos.shape[1], weights.group, weights.quantized,
        weights.key_group, weights.eps, weights.norm_heads, is_bf16,
        _scratch(loaded.dsv4_queries_scratch(*addresses, is_bf16, rows, threads)), threads,
    )  # fmt: skip
    return qr, q, kv


def project(
    output: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, wo_a: Matrix, wo_b: Matrix, groups: int, group: int
) -> torch.Tensor | None:
    """`WindowAttention.project` in one call; None for matrices whose rows are no whole steps.

    output [T, H, c], overwritten; cos, sin float32 [T, r / 2] of the rotation back -> [T, D].
    """
    first, last, loaded = _describe(wo_a), _describe(wo_b), _loaded()
    if not (first.whole_steps and last.whole_steps):
        return None
    output, cos, sin, is_bf16, (rows, heads, c) = (
        output.contiguous(), cos.contiguous(), sin.contiguous(), _is_bfloat16(output), output.shape,
    )  # fmt: skip
    result, threads = output.new_empty(rows, wo_b.shape[0]), _threads(rows * wo_b.shape[0] * wo_b.shape[1])
    loaded.dsv4_project(
        output.data_ptr(), cos.data_ptr(), sin.data_ptr(), first.address, last.address, result.data_ptr(), rows, heads,
        c, cos.shape[1], groups, group, is_bf16,
        _scratch(loaded.dsv4_project_scratch(first.address, last.address, groups, is_bf16, rows, threads)), threads,
    )  # fmt: skip
    return result
