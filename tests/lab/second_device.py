"""A second device, implemented in Python for machines without a GPU: it computes on the CPU and refuses mixed operands.

    python second_device.py compare CHECKPOINT BYTES      what the engine computes on it, against the CPU, as JSON
    python second_device.py run CHECKPOINT ...            `dsv4 run`, which may say --device npu
    python second_device.py reached CHECKPOINT ...        the same, where ranks can exchange what lies on the device
    python second_device.py quant                         which functions of dsv4.quant give the same bits on both

Its tensors are boxes around CPU tensors. Each operation of torch that meets one unpacks them all, and fails if a tensor
of the CPU is among them, as a real device would: a forgotten `device=` shows. It is a program and not a fixture because
torch can have one such device per process, under one name, and because a few functions of torch do not know about
boxes: they are replaced before the engine is imported.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "npu"
MOVES = ("aten::copy_", "aten::_copy_from")  # besides _to_copy, the only operations between devices


class Box(torch.Tensor):
    """A tensor of the device, with the strides of the one inside, which decide what can be a view."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Box":
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=NAME,
        )

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self) -> Any:
        raise TypeError("this tensor is not in the CPU's memory")

    def data_ptr(self) -> int:
        raise TypeError("this tensor is not in the CPU's memory")

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(operation, *args, **(kwargs or {}))


def unbox(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value.inner if isinstance(value, Box) else value


def compute(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """One operation of torch on boxes, or one that makes a box."""
    name = operation._schema.name
    flat, spec = pytree.tree_flatten((args, kwargs))
    boxes = {id(value.inner): value for value in flat if isinstance(value, Box)}
    if name == "aten::_to_copy":
        away = kwargs.get("device") is not None and kwargs["device"].type == "cpu"
        inner = operation(unbox(args[0]), **(kwargs | {"device": None}))
        return inner if away else Box(inner)
    strangers = [v for v in flat if isinstance(v, torch.Tensor) and not isinstance(v, Box) and v.dim()]
    if strangers and name not in MOVES:
        raise RuntimeError(f"{name} got tensors of two devices")
    unboxed, named = pytree.tree_unflatten([unbox(value) for value in flat], spec)
    if name == "aten::_copy_from":
        unboxed[1].copy_(unboxed[0])
        return args[1]
    result = operation(*unboxed, **named)
    # What works in place returns the tensor that it was given.
    return pytree.tree_map_only(torch.Tensor, lambda made: boxes[id(made)] if id(made) in boxes else Box(made), result)


def made_on_the_cpu(function: Any) -> Any:
    """A function that makes a tensor, which then moves: what it does inside of torch a box cannot follow."""

    def make(*arguments: Any, device: Any = None, **options: Any) -> torch.Tensor:
        made = function(*arguments, **options)
        return made if device is None else made.to(device)

    return make


def install() -> torch.library.Library:
    """Make the device known to torch under `NAME`, for as long as the result lives."""
    _setup_privateuseone_for_python_backend(NAME)
    library = torch.library.Library("_", "IMPL")
    library.fallback(compute, "PrivateUse1")
    torch.tensor, torch.arange = made_on_the_cpu(torch.tensor), made_on_the_cpu(torch.arange)
    torch.inference_mode = torch.no_grad  # inference tensors cannot be boxed
    return library


def logits(folder: str, device: str, **options: Any) -> list[torch.Tensor]:
    """Of main model and draft stages: a prefill and single steps, across blocks of 4 and of 128."""
    from dsv4.model import load
    from dsv4.model.evaluate.logits import teacher_forced

    tokens = [7 * i % 250 for i in range(136)]
    done = teacher_forced(load(folder, device, **options), tokens, prefill=131)
    return [computed for computed in (done.logits, done.draft_logits) if computed is not None]


def is_mixing_refused() -> bool:
    try:
        torch.zeros(3, device=NAME) + torch.zeros(3)
    except RuntimeError:
        return True
    return False


def calls_of_quant() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Functions of dsv4.quant and arguments for them, with blocks that are cut short and scales far apart."""
    from dsv4.quant import (
        Block,
        activation,
        dequantize_fp4,
        dequantize_fp8,
        e2m1,
        e4m3,
        e8m0,
        fp4_to_fp8,
        fp4_to_fp8_compiled,
        fp8_to_fp4,
        quantize_fp4,
        quantize_fp8,
        to_bf16,
    )

    random = torch.Generator().manual_seed(0)

    def some(*shape: int, low: int = 0, high: int = 256) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=random, dtype=torch.uint8)

    block, packed, scale = Block(128, 128), some(2, 130, 48), some(2, 130, 3, low=100, high=125)
    chosen = fp4_to_fp8.choose_block_scales(packed, scale, block).scale_bytes
    codes, values = fp4_to_fp8.cast(packed, scale, chosen, block), torch.randn(2, 130, 96, generator=random)
    out = torch.empty_like(codes)
    return {
        "e2m1.encode": (e2m1.encode, (values,)),
        "e2m1.decode": (e2m1.decode, (packed & 15,)),
        "e2m1.pack": (e2m1.pack, (packed & 15,)),
        "e2m1.unpack": (e2m1.unpack, (packed,)),
        "e4m3.encode": (e4m3.encode, (values,)),
        "e4m3.decode": (e4m3.decode, (some(256),)),
        "e8m0.encode": (e8m0.encode, (values.abs() + 1,)),
        "e8m0.decode": (e8m0.decode, (scale,)),
        "e8m0.exact": (e8m0.exact, (e8m0.decode(scale),)),
        "choose": (fp4_to_fp8.choose_block_scales, (packed, some(2, 130, 3, low=1, high=254), block)),
        "cast": (fp4_to_fp8.cast, (packed, scale, chosen, block)),
        "cast_into": (fp4_to_fp8.cast_into, (packed, scale, chosen, block, out)),
        "compiled": (fp4_to_fp8_compiled.cast_into, (packed[0], scale[0], chosen[0], block, out[0])),
        "exact_values": (fp4_to_fp8.exact_values, (packed, scale, chosen, block)),
        "fp8_to_fp4": (fp8_to_fp4.cast, (codes, chosen, block)),
        "fp8_to_fp4, float32 scales": (fp8_to_fp4.cast, (codes, e8m0.decode(chosen), block)),
        "from_fp4": (to_bf16.from_fp4, (packed, scale)),
        "from_fp8": (to_bf16.from_fp8, (codes, chosen, block)),
        "dequantize_fp4": (dequantize_fp4, (packed, scale)),
        "dequantize_fp8": (dequantize_fp8, (codes, chosen, block)),
        "quantize_fp4": (quantize_fp4, (values,)),
        "quantize_fp8": (quantize_fp8, (values, Block(32, 32))),
        "simulate_fp4": (activation.simulate_fp4, (values.bfloat16(),)),
        "simulate_fp8": (activation.simulate_fp8, (values.bfloat16(), 32)),
        "hadamard": (activation.hadamard, (values[..., :64].bfloat16(),)),
    }


def pieces(result: Any) -> list[Any]:
    """The tensors and numbers of a result."""
    if is_dataclass(result):
        return [getattr(result, field.name) for field in fields(result)]
    return list(result) if isinstance(result, tuple) else [result]


def same_bits(one: Any, other: Any) -> bool:
    if not isinstance(one, torch.Tensor):
        return bool(one == other)
    there = isinstance(other, Box) and other.dtype == one.dtype and other.shape == one.shape
    return there and torch.equal(one.contiguous().view(torch.uint8), other.inner.contiguous().view(torch.uint8))


def quant() -> dict[str, bool]:
    """For each function whether all that it returns lies on the device and has the bits of the CPU."""
    found = {}
    for name, (function, arguments) in calls_of_quant().items():
        moved = [a.to(NAME) if isinstance(a, torch.Tensor) else a for a in arguments]
        pairs = zip(pieces(function(*arguments)), pieces(function(*moved)), strict=True)
        found[name] = all(same_bits(here, there) for here, there in pairs)
    return found


def compare(folder: str, least_memory: int) -> dict[str, Any]:
    """What the test looks at."""
    torch.set_num_threads(1)
    expected = logits(folder, "cpu", simulation=False)
    found: dict[str, Any] = {"mixing_is_refused": is_mixing_refused()}
    for name, limit in {"in memory": None, "streaming": least_memory}.items():
        there = logits(folder, NAME, simulation=False, max_memory=limit)
        differences = [float((a - b).abs().max() / a.abs().max()) for a, b in zip(expected, there, strict=True)]
        found[name] = max(differences)
    found["simulated"] = all(bool(each.isfinite().all()) for each in logits(folder, NAME))
    return found


def main() -> int:
    library = install()
    if sys.argv[1] in ("compare", "quant"):
        found = quant() if sys.argv[1] == "quant" else compare(sys.argv[2], int(sys.argv[3]))
        print(json.dumps(found))
        return 0
    from dsv4 import cli
    from dsv4.commands import distributed as ranks

    if sys.argv[1] == "reached":
        ranks.BACKENDS[NAME] = "gloo"  # which gets what is in the boxes
    code = cli.run(["run", *sys.argv[2:]])
    del library
    return code


if __name__ == "__main__":
    raise SystemExit(main())
