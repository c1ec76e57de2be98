"""A device besides the CPU, made in Python, for machines that have none: it computes on the CPU, and refuses to mix.

    python second_device.py compare CHECKPOINT BYTES      what the engine computes on it, against the CPU, as JSON
    python second_device.py run CHECKPOINT ...            `dsv4 run`, which may say --device npu

Its tensors are boxes around CPU tensors. Each operation of torch that meets one unpacks them all, and fails if a tensor
of the CPU is among them, as a real device would: a forgotten `device=` shows. It is a program and not a fixture because
torch can have one such device per process, under one name, and because a few functions of torch do not know about
boxes: they are replaced before the engine is imported.
"""

import json
import sys
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


_tensor = torch.tensor


def tensor(data: Any, device: Any = None, **options: Any) -> torch.Tensor:
    made = _tensor(data, **options)
    return made if device is None else made.to(device)


def install() -> torch.library.Library:
    """Make the device known to torch under `NAME`, for as long as the result lives."""
    _setup_privateuseone_for_python_backend(NAME)
    library = torch.library.Library("_", "IMPL")
    library.fallback(compute, "PrivateUse1")
    torch.tensor = tensor
    torch.inference_mode = torch.no_grad  # inference tensors cannot be boxed
    return library


def logits(folder: str, device: str, **options: Any) -> list[torch.Tensor]:
    """Of main model and MTP block: a prefill and single steps, across blocks of 4 and of 128."""
    from dsv4.model import load
    from dsv4.model.evaluate import teacher_forced

    tokens = [7 * i % 250 for i in range(136)]
    done = teacher_forced(load(folder, device, **options), tokens, prefill=131)
    assert done.mtp_logits is not None
    return [done.logits, done.mtp_logits]


def is_mixing_refused() -> bool:
    try:
        torch.zeros(3, device=NAME) + torch.zeros(3)
    except RuntimeError:
        return True
    return False


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
    if sys.argv[1] == "compare":
        print(json.dumps(compare(sys.argv[2], int(sys.argv[3]))))
        return 0
    from dsv4 import cli

    code = cli.run(sys.argv[1:])
    del library
    return code


if __name__ == "__main__":
    raise SystemExit(main())
