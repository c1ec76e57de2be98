"""The compiled library of the kernels as ctypes sees it: forms, signatures, matrices, threads and scratch memory.

The library has every kernel in several forms, with vector code for AVX-512, AVX2 or NEON and in plain C, all with the
same bits. The best form that this processor has is taken; DSV4_KERNELS asks for one (`FORMS`). Where there is no
library `library` is None, and `table.py` selects the reference forms instead of the functions of cpu.py.
"""

import ctypes
import functools
import os
import threading
from types import SimpleNamespace
from typing import NamedTuple

import torch

from dsv4 import compiled
from dsv4.errors import UsageError
from dsv4.model.weights import BFLOAT16, FLOAT4_E2M1FN, FLOAT8_E4M3FN, FLOAT32, Matrix

from .deterministic import ELEMENTS_PER_STEP

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
    "dsv4_best_in_reach": "ppplllpi",
    "dsv4_list_keys": "pppllll",
    "dsv4_raw_keys": "ppppppllipi",
    "dsv4_index_queries": "ppppppppllllfipi",
    "dsv4_head_vector": "ppippplffpi",
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
    "dsv4_best_in_reach_scratch": "lli",
    "dsv4_raw_keys_scratch": "ppili",
    "dsv4_index_queries_scratch": "ppili",
    "dsv4_head_vector_scratch": "pili",
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


def loaded_library() -> SimpleNamespace:
    """The C functions, for functions that run only where there is a library."""
    found = library()
    assert found is not None, "select_kernels takes this row only where there is a library"
    return found


class Described(NamedTuple):
    """A matrix as C sees it, made once."""

    matrix: _Matrix
    address: int  # of `matrix`
    exact: bool  # whether products with bfloat16 are exact in float32: eight significant bits times eight at most
    whole_steps: bool  # whether rows, and blocks of rows, are whole steps of a dot product, as C takes for granted


def describe(matrix: Matrix) -> Described:
    """A matrix for C; kept with it."""
    found: Described | None = matrix.kept.get("c")
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
            format=getattr(loaded_library(), f"dsv4_{matrix.format}")(),
            scale_is_float32=int(matrix.scale is not None and matrix.scale.dtype == torch.float32),
            exact=int(exact),
        )
        whole = columns > 0 and columns % ELEMENTS_PER_STEP == 0 and block_columns % ELEMENTS_PER_STEP == 0
        found = matrix.kept["c"] = Described(described, ctypes.addressof(described), exact, whole)
    return found


def is_bfloat16(x: torch.Tensor) -> bool:
    """Whether C reads it as bfloat16; else it is float32."""
    return x.dtype == torch.bfloat16


def threads_of(work: int) -> int:
    """The number of threads for so many products."""
    return torch.get_num_threads() if work >= SMALLEST_SHARED_WORK else 1


def threads_for(x: torch.Tensor) -> int:
    """The number of threads for an operation that does something to each element."""
    return threads_of(x.numel() * WORK_PER_ELEMENT)


_kept = threading.local()


def scratch_of(size: int) -> int:
    """Address of memory for one call of C, kept and reused by each thread: fresh pages cost time."""
    buffer: torch.Tensor | None = getattr(_kept, "buffer", None)
    if buffer is None or buffer.nbytes < size:
        _kept.buffer = buffer = torch.empty(size, dtype=torch.uint8)
    return buffer.data_ptr()


def row_scratch(columns: int, threads: int) -> int:
    """Address of memory for one row in float32 for each thread."""
    return scratch_of(loaded_library().dsv4_row_scratch(columns, threads))
