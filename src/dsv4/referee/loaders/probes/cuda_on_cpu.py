"""vLLM's CUDA platform on a machine without a GPU: its CUDA model and loader run, with all tensors on the CPU.

Compiled extensions and packages with kernels that do not import are replaced by empty ones: nothing of them is called.
"""

import importlib
import importlib.machinery
import os
import sys
import types
from typing import Any

import torch

CAPABILITY = os.environ.get("DSV4_CUDA_CAPABILITY", "9.0")  # of the GPU that is claimed
EXTENSIONS = ("vllm._C", "vllm._C_stable_libtorch", "vllm._moe_C_stable_libtorch")
KERNELS = ("vllm.vllm_flash_attn", "vllm.vllm_flash_attn.flash_attn_interface", "deep_gemm")
QUESTIONS = ("cutlass_scaled_mm_supports_fp8", "cutlass_scaled_mm_supports_block_fp8", "cutlass_group_gemm_supported")
_kept: list[Any] = []  # a torch library lives as long as somebody holds it


def _empty_module(name: str) -> types.ModuleType:
    """A module in which every name is a function that says False."""

    def attribute(one: str) -> Any:
        return None if one.startswith("__") else lambda *args, **kwargs: False

    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__path__ = []
    module.__dict__["__getattr__"] = attribute
    return module


def _replace_what_does_not_import() -> None:
    for name in (*EXTENSIONS, *KERNELS):
        try:
            importlib.import_module(name)
        except Exception:  # of a compiled extension: ImportError, OSError, RuntimeError
            sys.modules[name] = _empty_module(name)


def _from_hopper_on(capability: int) -> bool:
    return capability >= 90


def _answer_questions() -> None:
    """Operators that say what the kernels can do, where the extension that has them is absent."""
    library = torch.library.Library("_C", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name in QUESTIONS:
        if not hasattr(torch.ops._C, name):
            library.define(f"{name}(int capability) -> bool")  # type: ignore[no-untyped-call]
            library.impl(name, _from_hopper_on, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    _kept.append(library)


def _platform() -> Any:
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    class CudaOnCpu(NonNvmlCudaPlatform):  # type: ignore[misc]
        """Says CUDA where vLLM chooses code, and CPU where it places tensors."""

        device_type, dispatch_key, dist_backend = "cpu", "CPU", "gloo"

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:
            return DeviceCapability(*map(int, CAPABILITY.split(".")))

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "none"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return 80 << 30

        @classmethod
        def get_current_memory_usage(cls, device: Any = None) -> int:
            return 0

        @classmethod
        def set_device(cls, device: Any) -> None:
            pass

        @classmethod
        def num_compute_units(cls, device_id: int = 0) -> int:
            return 132

        @classmethod
        def is_pin_memory_available(cls) -> bool:
            return False

        def __getattr__(self, name: str) -> Any:
            raise AttributeError(name)

    return CudaOnCpu()


def no_streams() -> None:
    """Streams and events that layers make when they are built; torch without CUDA raises for them."""
    for name in ("Stream", "Event"):
        setattr(torch.cuda, name, type(name, (), {"__init__": lambda self, *args, **kwargs: None}))


def install() -> None:
    """From here on vLLM takes this machine for one with a GPU. Before its models are imported."""
    _replace_what_does_not_import()
    _answer_questions()
    platforms = importlib.import_module("vllm.platforms")
    platforms.current_platform = platforms._current_platform = _platform()  # type: ignore[attr-defined]
    no_streams()
    torch.cuda.current_device = lambda: 0
    for name in ("empty_cache", "set_device_index"):
        setattr(torch.accelerator, name, lambda *args: None)


def allow_missing_operators() -> None:
    """Operators of absent extensions can be looked up, as vLLM's layers do, and raise when they are called."""
    look_up = torch._ops._OpNamespace.__getattr__

    def absent(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError(f"the CUDA kernel {name} was called on the CPU")

        return call

    def look_up_or_absent(namespace: Any, name: str) -> Any:
        try:
            return look_up(namespace, name)
        except AttributeError:
            if namespace.name not in ("_C", "_moe_C", "_C_cache_ops") or name.startswith("__"):
                raise
            return absent(name)

    torch._ops._OpNamespace.__getattr__ = look_up_or_absent  # type: ignore[method-assign]
