"""The inference engine: the whole DeepSeek-V4 architecture, driven by the checkpoint's own config.

    import torch
    from dsv4.model import load

    model = load("DeepSeek-V4-Flash")
    cache = model.new_cache(batch_size=1)
    output = model.forward(torch.tensor([[0, 17, 4]]), cache)  # output.logits float32 [1, 3, V]

Files, bottom-up: numerics (sums of fixed order), config, weights (names and formats), residency (what stays in
memory), ops (the table of hot operations), layers, cache, compressor, indexer, attention, moe, transformer, loading.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .loading import load
    from .transformer import Transformer

__all__ = ["Transformer", "load"]


def __getattr__(name: str) -> Any:
    # Importing the package must stay cheap: torch takes seconds.
    if name == "load":
        from .loading import load

        return load
    if name == "Transformer":
        from .transformer import Transformer

        return Transformer
    raise AttributeError(name)
