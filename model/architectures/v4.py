"""DeepSeek-V4, Flash and Pro: the forward pass.

    h = embed, in n streams
    each layer:  x, post, comb = hyper-connection of h;  h = post * attention(norm(x)) + comb h;  the same with experts
    logits = head(norm(the streams as one))

The MTP block computes one more such block from the streams at t and the embedding of token t + 1. DSpark's stages are
such blocks too, of the anchor and noise tokens, and attend to what the main stack hands over: see drafting/dspark.py.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from dsv4.model.cache import Cache, new_cache
from dsv4.model.config import Config
from dsv4.model.drafting.dspark import DSpark, Keys, MarkovHead, Start
from dsv4.model.drafting.stage_attention import StageAttention
from dsv4.model.layers.attention import Attention
from dsv4.model.layers.head import Head, OutputHead
from dsv4.model.layers.hyper_connection import HyperConnection, mean_of_streams
from dsv4.model.layers.moe import MixtureOfExperts
from dsv4.model.layers.numerics import Numerics
from dsv4.model.layers.rotary import Rotary, rotary_frequencies
from dsv4.model.weight_store import WeightStore, WeightView
from dsv4.model.weights import DraftStages

from .stack import Architecture, Call, Streams, Trace


class Block:
    """Attention, then experts, each inside a hyper-connection."""

    def __init__(self, config: Config, layer: int, weights: WeightView, rotary: Rotary, numerics: Numerics) -> None:
        self._config, self._weights, self._numerics = config, weights, numerics
        self.attention = Attention(config, layer, weights.view("attn."), rotary, numerics)
        self._experts = MixtureOfExperts(config, layer, weights.view("ffn."), numerics)
        self._around_attention = HyperConnection(config, weights, "attn", numerics)
        self._around_experts = HyperConnection(config, weights, "ffn", numerics)

    def __call__(self, h: torch.Tensor, token_ids: torch.Tensor, call: Call, name: str, entry: int) -> torch.Tensor:
        """h [T, n, D] -> [T, n, D]; `name` is the block's name for the trace, `entry` its place in the caches."""

        def attend(x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, call.positions, call.segments, call.layer_caches(entry))

        return self.around(attend, h, token_ids, call.trace, name)

    def around(
        self,
        attend: Callable[[torch.Tensor], torch.Tensor],
        h: torch.Tensor,
        token_ids: torch.Tensor,
        trace: Trace,
        name: str,
    ) -> torch.Tensor:
        """The block with the attention that is given, from its normed input [T, D] to its output [T, D]."""
        kernels, eps = self._numerics.kernels, self._config.rms_norm_eps
        if self._weights.foresees:
            pre, _, _ = self._around_experts.mixes(h)
            self._experts.foresee(kernels.hc_input(pre, h, self._weights.vector("ffn_norm.weight"), eps), token_ids)
        pre, post, comb = self._around_attention.mixes(h)
        output = attend(kernels.hc_input(pre, h, self._weights.vector("attn_norm.weight"), eps))
        h = self._around_attention.post(output, h, post, comb)
        trace(f"{name}.attn", output)
        pre, post, comb = self._around_experts.mixes(h)
        x = kernels.hc_input(pre, h, self._weights.vector("ffn_norm.weight"), eps)
        output, experts = self._experts(x, token_ids)
        h = self._around_experts.post(output, h, post, comb)
        trace(f"{name}.ffn.gate.experts", experts)
        trace(f"{name}.ffn", output)
        trace(name, h)
        return h


class MtpBlock:
    """Predicts token t + 2 from the main model's streams at t and token t + 1."""

    def __init__(self, config: Config, stage: int, store: WeightStore, rotary: Rotary, numerics: Numerics) -> None:
        self._config, self._numerics = config, numerics
        self._weights = store.view(f"mtp.{stage}.")
        self._name = f"mtp.{stage}"
        self._block = Block(config, config.num_hidden_layers + stage, self._weights, rotary, numerics)
        self.head = Head(config, self._weights, store.view(""), numerics)

    def __call__(self, h: torch.Tensor, embedded: torch.Tensor, token_ids: torch.Tensor, call: Call) -> torch.Tensor:
        """h [T, n, D], embeddings [T, D] of the next tokens and their ids [T] -> streams [T, n, D]."""
        eps, linear, weights = self._config.rms_norm_eps, self._numerics.quantized_linear, self._weights
        norm = self._numerics.kernels.rms_norm
        token = linear(norm(embedded, weights.vector("enorm.weight"), eps), weights.matrix("e_proj.weight"))
        normed = norm(h, weights.vector("hnorm.weight"), eps)
        streams = linear(normed.flatten(0, 1), weights.matrix("h_proj.weight")).view(h.shape)
        return self._block(token.unsqueeze(1) + streams, token_ids, call, self._name, 0)


class V4Stages:
    """The draft stages of DSpark: see drafting/dspark.py, whose Stages this is."""

    def __init__(self, config: Config, count: int, store: WeightStore, rotary: Rotary, numerics: Numerics) -> None:
        self._config, self._store, self._numerics = config, store, numerics
        first = config.num_hidden_layers
        views = [store.view(f"mtp.{i}.") for i in range(count)]
        self._blocks = [Block(config, first + i, view, rotary, numerics) for i, view in enumerate(views)]
        self._attention = [StageAttention(block.attention) for block in self._blocks]
        self._head = Head(config, views[-1], store.view(""), numerics)
        self.count, self.reserve, self.logits = (
            count,
            rotary.reserve,
            OutputHead(config, views[-1], store.view(""), numerics),
        )

    def keys(self, main_x: torch.Tensor, positions: torch.Tensor) -> Keys:
        """See drafting/dspark.py."""
        return [attention.keys(main_x, positions) for attention in self._attention]

    def block(self, ids: torch.Tensor, positions: torch.Tensor, starts: Sequence[Start], trace: Trace) -> torch.Tensor:
        """See drafting/dspark.py."""
        h = self._store.embedding(ids).to(self._numerics.dtype)
        h = h.unsqueeze(1).expand(-1, self._config.hc_mult, -1).contiguous()
        for stage, (block, attention) in enumerate(zip(self._blocks, self._attention, strict=True)):
            attend = partial(attention, positions=positions, before=[start.keys[stage] for start in starts])
            h = block.around(attend, h, ids, trace, f"mtp.{stage}")
        return self._head.vector(h)


class V4:
    """The main stack of DeepSeek-V4 and its draft stages."""

    def __init__(self, config: Config, stages: DraftStages, store: WeightStore, numerics: Numerics) -> None:
        self._config, self._numerics, self._device = config, numerics, store.device
        self._rotaries = rotaries = {
            kind: Rotary(rotary_frequencies(config, kind), store.device, numerics.kernels) for kind in (False, True)
        }
        self.layers = [
            Block(config, i, store.view(f"layers.{i}."), rotaries[config.ratio(i) > 0], numerics)
            for i in range(config.num_hidden_layers)
        ]
        self.head = Head(config, store.view(""), store.view(""), numerics)
        self.mtp = [
            MtpBlock(config, i, store, rotaries[config.ratio(config.num_hidden_layers + i) > 0], numerics)
            for i in range(stages.blocks if stages.kind == "mtp" else 0)
        ]
        self.dspark: DSpark | None = None
        if stages.kind == "dspark":
            markov = MarkovHead(f"mtp.{stages.blocks - 1}.", ("markov_w1", "markov_w2"), store, numerics)
            self.dspark = DSpark(
                config, V4Stages(config, stages.blocks, store, rotaries[False], numerics), markov, store, numerics
            )
        self._targets = () if self.dspark is None else self.dspark.own.target_layer_ids

    def new_cache(self, batch_size: int) -> Cache:
        """An empty cache for the main stack."""
        layers = range(self._config.num_hidden_layers)
        return new_cache(self._config, layers, batch_size, self._numerics.dtype, self._device)

    def new_mtp_cache(self, batch_size: int) -> Cache:
        """An empty cache for the MTP block, which has its own keys."""
        first = self._config.num_hidden_layers
        return new_cache(self._config, range(first, first + 1), batch_size, self._numerics.dtype, self._device)

    def reserve(self, positions: int) -> None:
        """See `stack.Stack`."""
        for rotary in self._rotaries.values():
            rotary.reserve(positions)

    @property
    def hidden_shape(self) -> tuple[int, ...]:
        """Of one token: the streams before the head; for DSpark the mean of the streams after its target layers."""
        if self._targets:
            return (len(self._targets) * self._config.hidden_size,)
        return self._config.hc_mult, self._config.hidden_size

    def __call__(self, embedded: torch.Tensor, token_ids: torch.Tensor, call: Call) -> Streams:
        """See `stack.Stack`."""
        means = []
        h = embedded.unsqueeze(1).expand(-1, self._config.hc_mult, -1).contiguous()
        call.trace("embed", h)
        for number, layer in enumerate(self.layers):
            h = layer(h, token_ids, call, f"layers.{number}", number)
            if number in self._targets:
                means.append(mean_of_streams(h, self._numerics))
        return Streams(h, torch.cat(means, dim=-1) if means else h)


ARCHITECTURE = Architecture(Config.from_json, V4)
