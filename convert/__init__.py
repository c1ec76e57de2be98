"""The files: reading a checkpoint, planning its conversion, writing the result, proving it."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .conversion import convert as convert
    from .verification import verify as verify

_LAZY = {
    "convert": "conversion",
    "verify": "verification",
}  # public name -> module, imported when first used: torch takes a second


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
