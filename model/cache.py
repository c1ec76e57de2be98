"""The key cache: per sequence and layer exactly the keys that the architecture needs, growing with the sequence.

    window       the last sliding_window keys, [<= W, c]; never [max_position_embeddings, c]
    compressed   one key per finished block of `ratio` tokens, [length // ratio, c]
    index keys   the same at index_head_dim, on layers with an indexer
    unfinished   the raw `kv` and `g` of the tokens whose block is not finished (and of the block before, ratio 4)
    classes      the token classes of the latest tokens, on V4.1's layers with an n-gram table

A sequence has its own length, so that prompts of unequal length share a batch. A call of `forward` appends; up to
MAX_UNDO tokens of the latest call can be taken back with `truncate`, which is what a rejected draft needs. For that,
a call of s tokens keeps min(s, MAX_UNDO) keys more than the next token attends to.
"""

from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass, field, replace

import torch

from dsv4.errors import UsageError

from .config import OVERLAP_RATIO, Config

MAX_UNDO = 8
SMALLEST_GROWTH = 64  # entries
RECENT_GROWTH = 16  # rows of recent tokens: so many single steps until they move


class GrowingRows:
    """A [n, width] tensor that grows at the end, in steps of an eighth, without moving on every append."""

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self._buffer = torch.empty(0, width, dtype=dtype, device=device)
        self.length = 0

    def append(self, rows: torch.Tensor) -> None:
        """Add rows [m, width] at the end."""
        needed = self.length + len(rows)
        if needed > len(self._buffer):
            spare = max(SMALLEST_GROWTH, needed // 8) if self.length else 0
            grown = self._buffer.new_empty(needed + spare, self._buffer.shape[1])
            grown[: self.length] = self._buffer[: self.length]
            self._buffer = grown
        self._buffer[self.length : needed] = rows
        self.length = needed

    def rows(self) -> torch.Tensor:
        """All rows, [length, width]."""
        return self._buffer[: self.length]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._buffer.nbytes


class RecentRows:
    """Rows [n, ...] of the latest tokens. They are appended at the end and dropped at the front, and seldom move."""

    def __init__(self, empty: torch.Tensor) -> None:
        self._buffer, self._first, self._length = empty, 0, 0
        self.start = 0  # position of the first row

    def __len__(self) -> int:
        return self._length

    def rows(self) -> torch.Tensor:
        """All rows, as a part of the buffer."""
        return self._buffer[self._first : self._first + self._length]

    def append(self, rows: torch.Tensor) -> None:
        """Add the rows of the next tokens."""
        end = self._first + self._length
        if end + len(rows) > len(self._buffer):
            spare = RECENT_GROWTH if self._length else 0
            grown = self._buffer.new_empty(self._length + len(rows) + spare, *self._buffer.shape[1:])
            grown[: self._length] = self.rows()
            self._buffer, self._first, end = grown, 0, self._length
        self._buffer[end : end + len(rows)] = rows
        self._length += len(rows)

    def drop(self, position: int) -> None:
        """Drop the rows of tokens before `position`."""
        count = position - self.start
        if count <= 0:
            return
        self.start, self._first, self._length = position, self._first + count, self._length - count
        if self._first > RECENT_GROWTH:
            self._buffer, self._first = self.rows().clone(), 0

    def truncate(self, position: int) -> None:
        """Remove the rows of tokens from `position` on."""
        self._length = min(self._length, max(0, position - self.start))

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._buffer.nbytes


class CompressorState:
    """The compressed keys of one compressor and the raw tokens that are not compressed yet."""

    def __init__(self, ratio: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.ratio, self.overlap = ratio, ratio == OVERLAP_RATIO
        width = head_dim * (2 if self.overlap else 1)
        self.raw = RecentRows(torch.empty(0, 2, width, dtype=torch.float32, device=device))  # [tokens, (kv, g), width]
        self.entries = GrowingRows(head_dim, dtype, device)

    def branch(self) -> "CompressorState":
        """A copy to go on from; see Cache.branch."""
        copied = copy(self)
        copied.raw, copied.entries = copy(self.raw), copy(self.entries)
        return copied

    def trim(self, length: int) -> None:
        """Drop the raw tokens that no block from `length` on needs."""
        self.raw.drop((length // self.ratio - self.overlap) * self.ratio)

    def truncate(self, length: int) -> None:
        """Remove everything from position `length` on."""
        self.raw.truncate(length)
        self.entries.length = min(self.entries.length, length // self.ratio)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.raw.nbytes + self.entries.nbytes


class TokenHistory:
    """The classes of the latest tokens, int64 on the CPU: n-grams look back at most `reach` of them."""

    def __init__(self, reach: int) -> None:
        self.reach = reach
        self.classes = torch.empty(0, dtype=torch.int64)
        self._start = 0  # position of the first of them

    def trim(self, length: int) -> None:
        """Drop the classes that no token from position `length` on looks at."""
        first = max(0, length - self.reach)
        if first > self._start:
            self.classes = self.classes[first - self._start :].clone()
            self._start = first

    def truncate(self, length: int) -> None:
        """Remove everything from position `length` on."""
        self.classes = self.classes[: max(0, length - self._start)]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.classes.nbytes


class LayerCache:
    """One layer of one sequence: its window, compressors and token history."""

    def __init__(
        self,
        window: RecentRows,
        compressor: CompressorState | None = None,
        indexer: CompressorState | None = None,
        history: TokenHistory | None = None,
    ) -> None:
        self.window = window  # keys [n, c]
        self.compressor, self.indexer, self.history = compressor, indexer, history

    def states(self) -> list[CompressorState | TokenHistory]:
        """What the layer has beside its window."""
        return [state for state in (self.compressor, self.indexer, self.history) if state is not None]

    def branch(self) -> "LayerCache":
        """A copy to go on from; see Cache.branch."""
        copied = copy(self)
        copied.window = copy(self.window)
        copied.compressor = self.compressor and self.compressor.branch()
        copied.indexer = self.indexer and self.indexer.branch()
        copied.history = copy(self.history)
        return copied

    def trim(self, length: int, window: int) -> None:
        """Drop the entries that no token from position `length` on needs."""
        self.window.drop(length - window + 1)
        for state in self.states():
            state.trim(length)

    def truncate(self, length: int) -> None:
        """Remove everything from position `length` on."""
        self.window.truncate(length)
        for state in self.states():
            state.truncate(length)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.window.nbytes + sum(state.nbytes for state in self.states())


@dataclass
class Sequence:
    """All layers of one sequence. `floor` is the shortest length that `truncate` can go back to."""

    layers: list[LayerCache]
    length: int = 0
    floor: int = 0


@dataclass
class Cache:
    """Key caches of a batch, for the main stack or for one MTP block. Made by Transformer.new_cache."""

    config: Config
    sequences: list[Sequence] = field(default_factory=list)

    @property
    def lengths(self) -> list[int]:
        """Tokens seen so far, per sequence."""
        return [sequence.length for sequence in self.sequences]

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and states."""
        return sum(layer.nbytes for sequence in self.sequences for layer in sequence.layers)

    def advance(self, row: int, count: int) -> None:
        """Advance a sequence by `count` tokens, and drop the entries that no later token needs."""
        sequence = self.sequences[row]
        sequence.length += count
        sequence.floor = sequence.length - min(count, MAX_UNDO)
        for layer in sequence.layers:
            layer.trim(sequence.floor, self.config.sliding_window)

    def branch(self) -> "Cache":
        """The same sequences, to go on from on trial: what is appended to the branch does not change this cache.

        Keys are shared, not copied. Use the branch before more is appended to this cache, and then drop it.
        """
        rows = [replace(sequence, layers=[layer.branch() for layer in sequence.layers]) for sequence in self.sequences]
        return replace(self, sequences=rows)

    def truncate(self, row: int, length: int) -> None:
        """Shorten a sequence to `length` tokens. Raises UsageError beyond the last MAX_UNDO of the latest call."""
        sequence = self.sequences[row]
        if not sequence.floor <= length <= sequence.length:
            raise UsageError(f"cannot go from {sequence.length} back to {length} tokens, at most to {sequence.floor}")
        for layer in sequence.layers:
            layer.truncate(length)
        sequence.length = length


def empty_window(config: Config, dtype: torch.dtype, device: torch.device) -> RecentRows:
    """A window without keys."""
    return RecentRows(torch.empty(0, config.head_dim, dtype=dtype, device=device))


def _v4_layer(config: Config, layer: int, dtype: torch.dtype, device: torch.device) -> LayerCache:
    ratio, window = config.ratio(layer), empty_window(config, dtype, device)
    compressor = CompressorState(ratio, config.head_dim, dtype, device) if ratio else None
    indexed = ratio == OVERLAP_RATIO
    return LayerCache(
        window, compressor, CompressorState(ratio, config.index_head_dim, dtype, device) if indexed else None
    )


def layer_bytes(config: Config, layer: int, tokens: int, piece: int, itemsize: int) -> int:
    """Most bytes of one layer of a sequence that grows to `tokens` in calls of `piece`; keys have `itemsize` bytes.

    As if every layer with compressed keys had index keys too, and blocks that overlap.
    """
    ratio, in_call = config.kept_ratio(layer), min(tokens, piece) + MAX_UNDO + RECENT_GROWTH
    held = (config.sliding_window + in_call) * config.head_dim * itemsize
    if not ratio:
        return held
    entries = tokens // ratio * 9 // 8 + SMALLEST_GROWTH
    raw = (in_call + 2 * ratio) * 2 * 2 * torch.float32.itemsize
    return held + (config.head_dim + config.index_head_dim) * (entries * itemsize + raw)


def cache_bytes(config: Config, tokens: int, piece: int, itemsize: int) -> int:
    """Most bytes of the keys of one sequence in all layers and MTP blocks, and of the largest while it is enlarged."""
    layers = [layer_bytes(config, i, tokens, piece, itemsize) for i in range(len(config.compress_ratios))]
    return sum(layers) + max(layers)


def new_cache(config: Config, layers: range, batch_size: int, dtype: torch.dtype, device: torch.device) -> Cache:
    """An empty cache for `batch_size` sequences over the given layers of V4."""
    rows = [Sequence([_v4_layer(config, layer, dtype, device) for layer in layers]) for _ in range(batch_size)]
    return Cache(config, rows)


def select(cache: Cache, rows: Iterable[int]) -> Cache:
    """The same sequences of a batch's cache, only some of them."""
    return replace(cache, sequences=[cache.sequences[row] for row in rows])
