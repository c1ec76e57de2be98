"""The inference engine: the whole DeepSeek-V4 architecture, driven by the checkpoint's own config.

    import torch
    from dsv4.model import load

    model = load("DeepSeek-V4-Flash")
    cache = model.new_cache(batch_size=1)
    output = model.forward(torch.tensor([[0, 17, 4]]), cache)  # output.logits float32 [1, 3, V]

Bottom-up: config, weights (names and formats), parallel (the ranks' shares), reading/ (weights from the files),
weight_store (what stays in memory), kernels/ (the hot operations, one row of functions for each kind of device),
cache, layers/, transformer, generate, loading; evaluate/ compares logits, chat/ has the text around the tokens.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .chat.completion import parse_completion
    from .chat.encoding import encode_messages
    from .loading import load
    from .transformer import Transformer

__all__ = ["Transformer", "encode_messages", "load", "parse_completion"]

_MODULES = {
    "Transformer": ".transformer",
    "encode_messages": ".chat.encoding",
    "load": ".loading",
    "parse_completion": ".chat.completion",
}


def __getattr__(name: str) -> Any:
    # Importing the package must stay cheap: torch takes seconds.
    if name not in _MODULES:
        raise AttributeError(name)
    return getattr(import_module(_MODULES[name], __name__), name)
