"""config.json of DeepSeek-V4.1: the fields that V4 has not, and the relations between layers that the engine needs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from dsv4.convert.checkpoint.config import required_number
from dsv4.errors import InputError
from dsv4.model.config import Config, dspark_config
from dsv4.model.layers.engram.hashing import Engrams

FP8_BLOCK = 32
MOST_ROWS = 1 << 32  # of one head: a hostile config must not make us search for primes without end
MOST_PRIMES = 1 << 10


@dataclass(frozen=True)
class V41Config(Config):
    """Dimensions and constants of one model of V4.1."""

    kv_source_layer_ids: tuple[int, ...]
    index_source_layer_ids: tuple[int, ...]
    candidate_source_layer_id: int  # -1: none
    candidate_topk_blocks: int
    candidate_block_size: int
    engrams: Engrams

    FIXED: ClassVar[dict[str, Any]] = {**Config.FIXED, "model_type": "deepseek_v41"}
    RATIOS: ClassVar[tuple[int, ...]] = (0, 1, 2)
    gate_epsilon: ClassVar[float] = 1e-20
    shares_index_keys: ClassVar[bool] = True
    smallest_indexed_ratio: ClassVar[int] = 1

    @classmethod
    def _special(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return {
            **super()._special(config),
            "num_hash_layers": 0,
            "dspark": dspark_config(config, experts="dspark_"),
            "kv_source_layer_ids": _layers(config, "kv_source_layer_ids"),
            "index_source_layer_ids": _layers(config, "index_source_layer_ids"),
            "candidate_source_layer_id": _candidate_source(config),
            "engrams": _engrams(config),
        }

    @property
    def rows_per_table(self) -> int:
        """Rows of each n-gram table that a token reads."""
        return self.engrams.columns

    def kept_ratio(self, layer: int) -> int:
        """Only KV sources keep compressed keys."""
        return self.ratio(layer) if layer in self.kv_source_layer_ids else 0

    def kv_source(self, layer: int) -> int:
        """The KV source that a layer with a ratio reads: the nearest at or before it."""
        return max(source for source in self.kv_source_layer_ids if source <= layer)

    def hands_over_to(self, layer: int) -> int:
        """Whose index keys the released code uses where a step finishes no group of the layer's ratio.

        There, every source publishes its keys in one slot when it has finished a group: the slot holds those of a
        source before the layer that finishes one at every step, else those of the last source, from the step before.
        """
        before = [source for source in self.kv_source_layer_ids if source < layer and self.ratio(source) == 1]
        return max(before or self.kv_source_layer_ids)

    def _problems(self) -> Iterator[tuple[bool, str]]:
        yield from super()._problems()
        yield from _source_problems(self)
        widths = {
            "hidden_size": self.hidden_size,
            "moe_intermediate_size": self.moe_intermediate_size,
            "q_lora_rank": self.q_lora_rank,
            "head_dim": self.head_dim,
            "o_groups * o_lora_rank": self.o_groups * self.o_lora_rank,
            "index_head_dim": self.index_head_dim,
            "engram_head_dim": self.engrams.width,
        }
        for name, width in widths.items():
            yield width % FP8_BLOCK != 0, f"{name} is not a multiple of {FP8_BLOCK}"
        yield self.engrams.pad_token >= self.vocab_size, "engram_pad_token_id is not in the vocabulary"
        beyond = any(layer >= self.num_hidden_layers for layer in self.engrams.layers)
        yield beyond, "engram_layer_ids name a layer that does not exist"


def _source_problems(config: V41Config) -> Iterator[tuple[bool, str]]:
    """What is wrong with the sources of keys and lists."""
    layers = range(config.num_hidden_layers)
    sources, indexers = config.kv_source_layer_ids, config.index_source_layer_ids
    yield any(layer not in layers for layer in indexers), "index_source_layer_ids name a layer that does not exist"
    yield not set(sources) <= set(indexers), "a layer of kv_source_layer_ids is not in index_source_layer_ids"
    for layer in [layer for layer in layers if layer < len(config.compress_ratios) and config.ratio(layer)]:
        found = max((source for source in sources if source <= layer), default=None)
        wrong = found is None or config.ratio(found) != config.ratio(layer)
        yield wrong, f"layer {layer} has no layer of kv_source_layer_ids with its ratio at or before it"
    for layer in indexers:
        windowed = layer in layers and layer < len(config.compress_ratios) and config.ratio(layer) == 0
        yield windowed, f"layer {layer} is in index_source_layer_ids, its compress ratio is 0"
    yield from _candidate_problems(config)


def _candidate_problems(config: V41Config) -> Iterator[tuple[bool, str]]:
    candidate = config.candidate_source_layer_id
    if candidate < 0:
        return
    yield candidate not in config.index_source_layer_ids, "candidate_source_layer_id is not in index_source_layer_ids"
    crossed = any(source > candidate for source in config.kv_source_layer_ids)
    yield crossed, "a layer of kv_source_layer_ids is behind candidate_source_layer_id, whose groups are others"
    # With fewer groups than a query may choose, the released top-k is not defined.
    visible = (config.candidate_topk_blocks - 1) * config.candidate_block_size + 1
    yield visible < config.index_topk, f"the candidate blocks hold {visible} groups, fewer than index_topk"


def _layers(config: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """A list of layers in ascending order. Raises InputError."""
    value = config.get(key)
    if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
        raise InputError(f"config.json: {key} must be a list of layers")
    if sorted(set(value)) != value:
        raise InputError(f"config.json: {key} must be in ascending order")
    return tuple(value)


def _candidate_source(config: Mapping[str, Any]) -> int:
    value = config.get("candidate_source_layer_id")
    if type(value) is not int or value < -1:
        raise InputError("config.json: candidate_source_layer_id must be a layer, or -1")
    return value


def _engrams(config: Mapping[str, Any]) -> Engrams:
    layers, rows = _layers(config, "engram_layer_ids"), config.get("engram_num_embeddings")
    if not isinstance(rows, list) or len(rows) != len(layers) or not all(type(n) is int and n > 0 for n in rows):
        raise InputError("config.json: engram_num_embeddings must have a count for each of engram_layer_ids")
    names = ("max_ngram_size", "n_heads", "head_dim", "vocab_size", "compressed_vocab_size")
    longest, heads, width, vocabulary, classes = (required_number(config, f"engram_{n}", True) for n in names)
    pad = config.get("engram_pad_token_id")
    if type(pad) is not int or pad < 0:
        raise InputError("config.json: engram_pad_token_id must be a token id")
    if longest < 2 or vocabulary > MOST_ROWS or len(layers) * (longest - 1) * heads > MOST_PRIMES:
        raise InputError("config.json: the engram tables are larger than any model's")
    return Engrams(layers, tuple(rows), longest, heads, width, vocabulary, pad, classes)
