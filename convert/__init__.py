"""The files: reading a checkpoint, planning its conversion, writing the result, proving it.

    from dsv4.convert import convert, verify

    convert("DeepSeek-V4-Flash", "Flash-FP8", target="vllm")    # a Result; the command's options and defaults
    verify("DeepSeek-V4-Flash", "Flash-FP8").exit_code == 0     # a Verification; .verdict is its sentence

Rooms, bottom-up: `checkpoint` reads; `plan` decides; `write` writes; `hub` fetches. `proof` shares nothing with them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv4.convert.api import convert as convert
    from dsv4.convert.sides import verify as verify

__all__ = ["convert", "verify"]

_LAZY = {
    "convert": "api",
    "verify": "sides",
}  # public name -> module, imported when first used: torch takes a second


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
