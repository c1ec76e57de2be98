"""DeepSeek-V4.1: the forward pass of the text model.

    h = embed, in n streams;  pre = (1, 0, 0, 0)
    each layer:  h += n-grams, in front of two layers
                 next, post, comb = hyper-connection of h;  h = post * attention(norm(pre h)) + comb h;  pre = next
                 the same with experts
    logits = head(norm(pre h))

So every sublayer reads the streams through the weights that the sublayer before it computed: they lag by one.
Draft stages go on from the mean of the streams in front of some layers.
"""

from collections.abc import Callable
from collections.abc import Sequence as Ordered
from dataclasses import replace
from functools import partial

import torch

from dsv4.model.cache import Cache, CompressorState, LayerCache, Sequence, TokenHistory, empty_window
from dsv4.model.drafting.dspark import DSpark, Keys, MarkovHead, Start
from dsv4.model.drafting.stage_attention import StageAttention
from dsv4.model.layers.engram.layer import Engram
from dsv4.model.layers.engram.token_classes import token_classes
from dsv4.model.layers.head import OutputHead
from dsv4.model.layers.hyper_connection import HyperConnection, mean_of_streams
from dsv4.model.layers.moe import MixtureOfExperts
from dsv4.model.layers.numerics import Numerics
from dsv4.model.layers.rotary import Rotary, rotary_frequencies
from dsv4.model.layers.shared_attention import Shared, SharedKeyAttention
from dsv4.model.layers.shared_keys import IndexSource, KeySource, Selection, nothing_chosen
from dsv4.model.weight_store import WeightStore, WeightView
from dsv4.model.weights import DraftStages

from .stack import Architecture, Call, DraftBlock, Streams, Trace
from .v41_config import V41Config

FP8_GROUP = 32  # of the inputs of quantized layers


def _attention(
    config: V41Config, layer: int, weights: WeightView, rotary: Rotary, numerics: Numerics
) -> SharedKeyAttention:
    ratio, source, indexer = config.ratio(layer), None, None
    if layer in config.kv_source_layer_ids:
        source = KeySource(config, weights, ratio, rotary, numerics)
    if layer in config.index_source_layer_ids:
        keep = config.candidate_topk_blocks if layer == config.candidate_source_layer_id else None
        size = config.candidate_block_size
        indexer = IndexSource(config, weights.view("indexer."), ratio, rotary, numerics, size, keep)
    return SharedKeyAttention(config, weights, rotary, numerics, source, indexer)


class Block:
    """Attention, then experts, each inside a hyper-connection that lags by one sublayer."""

    def __init__(self, config: V41Config, layer: int, weights: WeightView, rotary: Rotary, numerics: Numerics) -> None:
        self._config, self._weights, self._numerics = config, weights, numerics
        self.attention = _attention(config, layer, weights.view("attn."), rotary, numerics)
        self._experts = MixtureOfExperts(config, layer, weights.view("ffn."), numerics)
        self._around_attention = HyperConnection(config, weights, "attn", numerics)
        self._around_experts = HyperConnection(config, weights, "ffn", numerics)

    def _input(self, pre: torch.Tensor, h: torch.Tensor, norm: str) -> torch.Tensor:
        return self._numerics.kernels.hc_input(pre, h, self._weights.vector(norm), self._config.rms_norm_eps)

    def __call__(
        self, h: torch.Tensor, pre: torch.Tensor, token_ids: torch.Tensor, call: Call, layer: int, shared: Shared | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Streams h [T, n, D] and the weights pre [T, n] for the first sublayer -> both for the next block."""

        def attend(x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, call.positions, call.segments, call.layer_caches(layer), shared)

        return self.around(attend, h, pre, token_ids, call.trace, f"layers.{layer}")

    def around(
        self,
        attend: Callable[[torch.Tensor], torch.Tensor],
        h: torch.Tensor,
        pre: torch.Tensor,
        token_ids: torch.Tensor,
        trace: Trace,
        name: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The block with the attention that is given, from its normed input [T, D] to its output [T, D]."""
        following, post, comb = self._around_attention.mixes(h)
        if self._weights.foresees:
            self._experts.foresee(self._input(following, h, "ffn_norm.weight"), token_ids)
        output = attend(self._input(pre, h, "attn_norm.weight"))
        h, pre = self._around_attention.post(output, h, post, comb), following
        trace(f"{name}.attn", output)
        following, post, comb = self._around_experts.mixes(h)
        output, experts = self._experts(self._input(pre, h, "ffn_norm.weight"), token_ids)
        h = self._around_experts.post(output, h, post, comb)
        trace(f"{name}.ffn.gate.experts", experts)
        trace(f"{name}.ffn", output)
        trace(name, h)
        return h, following


def _first_pre(h: torch.Tensor) -> torch.Tensor:
    """The weights [T, n] of streams [T, n, D] that no sublayer has computed yet: the first stream alone."""
    pre = torch.zeros(h.shape[:2], dtype=torch.float32, device=h.device)
    pre[:, 0] = 1
    return pre


class V41Stages:
    """The draft stages of DSpark: see drafting/dspark.py, whose Stages this is. They have experts of their own."""

    def __init__(self, config: V41Config, count: int, store: WeightStore, rotary: Rotary, numerics: Numerics) -> None:
        self._config, self._store, self._numerics = config, store, numerics
        first, views = config.num_hidden_layers, [store.view(f"mtp.{i}.") for i in range(count)]
        own = config.of_stages()
        self._blocks = [Block(own, first + i, view, rotary, numerics) for i, view in enumerate(views)]
        self._attention = [StageAttention(block.attention) for block in self._blocks]
        self.count, self.reserve = count, rotary.reserve
        self.logits = OutputHead(config, views[-1], store.view(""), numerics)

    def keys(self, main_x: torch.Tensor, positions: torch.Tensor) -> Keys:
        """See drafting/dspark.py."""
        return [attention.keys(main_x, positions) for attention in self._attention]

    def block(self, ids: torch.Tensor, positions: torch.Tensor, starts: Ordered[Start], trace: Trace) -> torch.Tensor:
        """See drafting/dspark.py."""
        h = self._store.embedding(ids).to(self._numerics.dtype)
        h = h.unsqueeze(1).expand(-1, self._config.hc_mult, -1).contiguous()
        pre = _first_pre(h)
        for stage, (block, attention) in enumerate(zip(self._blocks, self._attention, strict=True)):
            attend = partial(attention, positions=positions, before=[start.keys[stage] for start in starts])
            h, pre = block.around(attend, h, pre, ids, trace, f"mtp.{stage}")
        return self._numerics.kernels.hc_pre(pre, h)


class V41:
    """The main stack of DeepSeek-V4.1 and its draft stages."""

    mtp: tuple[DraftBlock, ...] = ()

    def __init__(self, config: V41Config, stages: DraftStages, store: WeightStore, numerics: Numerics) -> None:
        self._config, self._device = config, store.device
        self._numerics = numerics = replace(numerics, fp8_group=FP8_GROUP)
        self._rotaries = {
            kind: Rotary(rotary_frequencies(config, kind), store.device, numerics.kernels) for kind in (False, True)
        }
        self.layers = [
            Block(config, i, store.view(f"layers.{i}."), self._rotaries[config.ratio(i) > 0], numerics)
            for i in range(config.num_hidden_layers)
        ]
        self.engrams = self._build_engrams(store)
        self.head = OutputHead(config, store.view(""), store.view(""), numerics)
        self.dspark: DSpark | None = None
        if stages.kind == "dspark":
            own = V41Stages(config, stages.blocks, store, self._rotaries[False], numerics)
            markov = MarkovHead(f"mtp.{stages.blocks - 1}.", ("embed", "head"), store, numerics)
            self.dspark = DSpark(config, own, markov, store, numerics)
        self._targets = () if self.dspark is None else self.dspark.own.target_layer_ids

    def _build_engrams(self, store: WeightStore) -> dict[int, Engram]:
        config, engrams = self._config, self._config.engrams
        if not engrams.layers:
            return {}
        classes = token_classes(store.checkpoint, config.vocab_size, engrams.classes)
        return {
            layer: Engram(config, engrams, table, classes, store.view(f"layers.{layer}.engram."), self._numerics)
            for table, layer in enumerate(engrams.layers)
        }

    def reserve(self, positions: int) -> None:
        """See `stack.Stack`."""
        for rotary in self._rotaries.values():
            rotary.reserve(positions)

    @property
    def hidden_shape(self) -> tuple[int, ...]:
        """Of one token: the means of the streams in front of the target layers, one after the other."""
        return (len(self._targets) * self._config.hidden_size,)

    def _layer_cache(self, layer: int) -> LayerCache:
        config, dtype, device = self._config, self._numerics.dtype, self._device
        cache = LayerCache(empty_window(config, dtype, device))
        if layer in config.kv_source_layer_ids:
            cache.compressor = CompressorState(config.ratio(layer), config.head_dim, dtype, device)
            cache.indexer = CompressorState(config.ratio(layer), config.index_head_dim, dtype, device)
        if layer in config.engrams.layers:
            cache.history = TokenHistory(config.engrams.longest - 1)
        return cache

    def new_cache(self, batch_size: int) -> Cache:
        """An empty cache for the main stack."""
        layers = range(self._config.num_hidden_layers)
        return Cache(self._config, [Sequence([self._layer_cache(i) for i in layers]) for _ in range(batch_size)])

    def new_mtp_cache(self, batch_size: int) -> Cache:
        """An empty cache without layers: there is no MTP block."""
        return Cache(self._config, [Sequence([]) for _ in range(batch_size)])

    def shared(self, layer: int, call: Call, selections: list[Selection]) -> Shared | None:
        """What a layer shares with others in a call, with the selections so far; None for a window alone."""
        config = self._config
        if not config.ratio(layer):
            return None
        keys, handed_over = call.layer_caches(config.kv_source(layer)), None
        if self._numerics.released_index_keys:
            handed_over = call.layer_caches(config.hands_over_to(layer))
        return Shared(keys, handed_over, selections)

    def __call__(self, embedded: torch.Tensor, token_ids: torch.Tensor, call: Call) -> Streams:
        """See `stack.Stack`. `hidden` is what DSpark stages go on from."""
        h = embedded.unsqueeze(1).expand(-1, self._config.hc_mult, -1).contiguous()
        pre = _first_pre(h)
        selections = [nothing_chosen(segment.count) for segment in call.segments]
        targets = [embedded[:, :0]]
        call.trace("embed", h)
        for number, layer in enumerate(self.layers):
            if number in self.engrams:
                h = self.engrams[number](h, token_ids, call.segments, call.layer_caches(number))
                call.trace(f"layers.{number}.engram", h)
            if number in self._targets:
                targets.append(mean_of_streams(h, self._numerics))
            h, pre = layer(h, pre, token_ids, call, number, self.shared(number, call, selections))
        return Streams(self._numerics.kernels.hc_pre(pre, h), torch.cat(targets, dim=1))


ARCHITECTURE = Architecture(V41Config.from_json, V41)
