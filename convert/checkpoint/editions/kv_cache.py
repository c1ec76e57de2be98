"""What a KV cache consists of: the terms in which each architecture's file says how large it is.

Keys and values are one vector of `head_dim` per position. Every layer keeps the last `sliding_window` of them; some
keep compressed ones of all tokens, and index keys of `index_head_dim` beside them.
"""

from dataclasses import dataclass
from typing import NamedTuple

from dsv4.convert.checkpoint.config import Config, config_count


class Compressed(NamedTuple):
    """What one layer keeps of all tokens: `nbytes` for every `ratio` of them."""

    ratio: int
    nbytes: int


@dataclass(frozen=True)
class CacheLayout:
    """What the size depends on: how many layers keep a window, its length, and what else grows with the context.

    window_entry_bytes, entry_bytes: of a key-value vector in a window, and of a compressed one. formats: in words.
    """

    windows: int
    sliding_window: int
    window_entry_bytes: int
    entry_bytes: int
    index_key_bytes: int
    compressed: tuple[Compressed, ...]
    formats: str

    def bytes_at(self, tokens: int) -> int:
        """Bytes for one sequence of `tokens`, over all layers."""
        windows = self.windows * min(tokens, self.sliding_window) * self.window_entry_bytes
        return windows + sum(tokens // layer.ratio * layer.nbytes for layer in self.compressed)


class Keeping(NamedTuple):
    """What a layer keeps, as tensors and config tell: its compress ratio, 0 for a window only; has it an indexer?"""

    ratio: int
    indexed: bool


class Widths(NamedTuple):
    """What the sizes of an architecture follow from, as config.json calls it."""

    sliding_window: int
    head_dim: int
    rope_dim: int
    index_head_dim: int

    @classmethod
    def read(cls, config: Config) -> "Widths | None":
        """The widths of a config, None where one is missing or does not fit."""
        keys = ("sliding_window", "head_dim", "qk_rope_head_dim", "index_head_dim")
        window, head, rope, index = (config_count(config, key) for key in keys)
        if window is None or head is None or rope is None or index is None or rope > head:
            return None
        return cls(window, head, rope, index)

    @property
    def index_key_bytes(self) -> int:
        """Bytes of one index key: float4_e2m1fn and one float8_e8m0fnu scale per 32 dims."""
        return self.index_head_dim // 2 + -(-self.index_head_dim // 32)
