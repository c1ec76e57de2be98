"""One DSpark draft in float64, written from the formulas and from nothing of the engine. For tests only.

It takes what the main model hands over, [positions, targets * D], and computes a single draft the plain way: one block,
all keys at once, loops over heads, tokens and experts, nothing simulated and nothing cached.
"""

from typing import Any, NamedTuple

import numpy as np
from exact_values import values
from raw_safetensors import Tensors

Array = np.ndarray


class Draft(NamedTuple):
    """tokens [B], logits [B, V], confidence [B]."""

    tokens: list[int]
    logits: Array
    confidence: Array


def norm(x: Array, weight: Array | float, eps: float) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def rotated(x: Array, position: int, config: dict[str, Any], sign: int = 1) -> Array:
    """x [..., c] with its last dims turned as complex numbers by the position; stages have no YaRN."""
    r = config["qk_rope_head_dim"]
    angles = position * config["rope_theta"] ** (-np.arange(0, r, 2) / r)
    pairs = (x[..., -r::2] + 1j * x[..., -r + 1 :: 2]) * np.exp(sign * 1j * angles)
    out = x.copy()
    out[..., -r::2], out[..., -r + 1 :: 2] = pairs.real, pairs.imag
    return out


class Oracle:
    """The stages of one checkpoint of V4."""

    tables, block = ("markov_w1", "markov_w2"), (128, 128)

    def __init__(self, tensors: Tensors, config: dict[str, Any]) -> None:
        self.tensors, self.config, self.eps = tensors, config, config["rms_norm_eps"]
        self.stages = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("mtp."))

    def value(self, name: str) -> Array:
        return values(name, self.tensors, self.block)

    def keys(self, stage: int, x: Array, positions: list[int]) -> Array:
        name, eps = f"mtp.{stage}.attn.", self.eps
        kv = norm(x @ self.value(f"{name}wkv.weight").T, self.value(f"{name}kv_norm.weight"), eps)
        return np.stack([rotated(row, p, self.config) for row, p in zip(kv, positions, strict=True)])

    def heads(self, q: Array) -> Array:
        """Queries [B, H, c] before their rotation."""
        return norm(q, 1.0, self.eps)

    def attention(self, stage: int, x: Array, before: Array, positions: list[int]) -> Array:
        name, c = f"mtp.{stage}.attn.", self.config["head_dim"]
        keys = np.concatenate([before, self.keys(stage, x, positions)])
        sink, wo_a = self.value(f"{name}attn_sink"), self.value(f"{name}wo_a.weight")
        qr = norm(x @ self.value(f"{name}wq_a.weight").T, self.value(f"{name}q_norm.weight"), self.eps)
        q = (qr @ self.value(f"{name}wq_b.weight").T).reshape(len(x), -1, c)
        out = []
        for row, position in zip(self.heads(q), positions, strict=True):
            heads = []
            for head, query in enumerate(rotated(row, position, self.config)):
                weights = np.exp(keys @ query / np.sqrt(c))
                heads.append(weights @ keys / (weights.sum() + np.exp(sink[head])))
            groups = rotated(np.stack(heads), position, self.config, -1).reshape(self.config["o_groups"], -1)
            low = [part @ matrix.T for part, matrix in zip(groups, np.split(wo_a, len(groups)), strict=True)]
            out.append(np.concatenate(low))
        return np.stack(out) @ self.value(f"{name}wo_b.weight").T

    def expert(self, name: str, x: Array, share: float) -> Array:
        limit = self.config["swiglu_limit"]
        gate = np.minimum(self.value(f"{name}.w1.weight") @ x, limit)
        up = np.clip(self.value(f"{name}.w3.weight") @ x, -limit, limit)
        return self.value(f"{name}.w2.weight") @ (gate * sigmoid(gate) * up * share)

    def experts(self, stage: int, x: Array) -> Array:
        name, config = f"mtp.{stage}.ffn", self.config
        out = []
        for row in x:
            scores = np.sqrt(np.log1p(np.exp(self.value(f"{name}.gate.weight") @ row)))
            chosen = np.argsort(-(scores + self.value(f"{name}.gate.bias")))[: config["num_experts_per_tok"]]
            shares = scores[chosen] / scores[chosen].sum() * config["routed_scaling_factor"]
            routed = [self.expert(f"{name}.experts.{e}", row, s) for e, s in zip(chosen, shares, strict=True)]
            out.append(sum(routed) + self.expert(f"{name}.shared_experts", row, 1.0))
        return np.stack(out)

    def mixes(self, prefix: str, streams: Array) -> Array:
        """streams [n, D] -> the projections of the hyper-connection, over the root mean square."""
        flat = streams.reshape(-1)
        return self.value(f"{prefix}_fn") @ flat / np.sqrt((flat * flat).mean() + self.eps)

    def weights(self, prefix: str, streams: Array) -> tuple[Array, Array, Array]:
        n, eps = len(streams), self.config["hc_eps"]
        m, base, scale = self.mixes(prefix, streams), self.value(f"{prefix}_base"), self.value(f"{prefix}_scale")
        pre = sigmoid(m[:n] * scale[0] + base[:n]) + eps
        post = 2 * sigmoid(m[n : 2 * n] * scale[1] + base[n : 2 * n])
        comb = np.exp((m[2 * n :] * scale[2] + base[2 * n :]).reshape(n, n))
        comb = comb / comb.sum(1, keepdims=True) + eps
        comb = comb / (comb.sum(0, keepdims=True) + eps)
        for _ in range(self.config["hc_sinkhorn_iters"] - 1):
            comb = comb / (comb.sum(1, keepdims=True) + eps)
            comb = comb / (comb.sum(0, keepdims=True) + eps)
        return pre, post, comb

    def sublayer(self, stage: int, part: str, h: Array, compute: Any) -> Array:
        """One sublayer inside its hyper-connection: h [B, n, D] -> [B, n, D]."""
        found = [self.weights(f"mtp.{stage}.hc_{part}", streams) for streams in h]
        x = np.stack([pre @ streams for (pre, _, _), streams in zip(found, h, strict=True)])
        output = compute(norm(x, self.value(f"mtp.{stage}.{part}_norm.weight"), self.eps))
        pairs = zip(found, output, h, strict=True)
        return np.stack([np.outer(post, out) + comb.T @ streams for (_, post, comb), out, streams in pairs])

    def draft(self, hidden: Array, anchor: int) -> Draft:
        """The likeliest tokens after positions 0 .. len(hidden) - 1 and the anchor."""
        config, known = self.config, len(hidden)
        size, first = config["dspark_block_size"], max(0, known - config["sliding_window"])
        ids = [anchor] + [config["dspark_noise_token_id"]] * (size - 1)
        main = norm(hidden @ self.value("mtp.0.main_proj.weight").T, self.value("mtp.0.main_norm.weight"), self.eps)
        h = np.repeat(self.value("embed.weight")[ids][:, None], config["hc_mult"], axis=1)
        before = [self.keys(s, main[first:], list(range(first, known))) for s in range(self.stages)]
        return self.chain(self.vectors(h, before, list(range(known, known + size))), anchor)

    def vectors(self, h: Array, before: list[Array], positions: list[int]) -> Array:
        """The streams [B, n, D] through all stages, and as one [B, D]."""
        for s in range(self.stages):
            h = self.sublayer(s, "attn", h, lambda x, s=s: self.attention(s, x, before[s], positions))
            h = self.sublayer(s, "ffn", h, lambda x, s=s: self.experts(s, x))
        last = f"mtp.{self.stages - 1}.hc_head"
        scale, base = self.value(f"{last}_scale"), self.value(f"{last}_base")
        pre = [sigmoid(self.mixes(last, streams) * scale + base) + self.config["hc_eps"] for streams in h]
        return np.stack([weights @ streams for weights, streams in zip(pre, h, strict=True)])

    def chain(self, vectors: Array, before: int) -> Draft:
        """Token after token from the vectors behind the last stage [B, D]."""
        last = f"mtp.{self.stages - 1}."
        w1, w2 = (self.value(f"{last}markov_head.{name}.weight") for name in self.tables)
        tokens, logits, confidence = [], [], []
        for x in vectors:
            own = self.value("head.weight") @ norm(x, self.value(f"{last}norm.weight"), self.eps)
            logits.append(own + w2 @ w1[before])
            joined = np.concatenate([x, w1[before]])
            confidence.append(float((self.value(f"{last}confidence_head.proj.weight") @ joined)[0]))
            before = int(logits[-1].argmax())
            tokens.append(before)
        return Draft(tokens, np.stack(logits), np.array(confidence))


class OracleV41(Oracle):
    """Those of V4.1: no norm of the heads, experts of their own, and the streams' weights lag by one sublayer."""

    tables, block = ("embed", "head"), (32, 32)

    def __init__(self, tensors: Tensors, config: dict[str, Any]) -> None:
        text = config["text_config"]
        super().__init__(tensors, text | {"num_experts_per_tok": text["dspark_num_experts_per_tok"]})

    def heads(self, q: Array) -> Array:
        return q

    def vectors(self, h: Array, before: list[Array], positions: list[int]) -> Array:
        pre = np.zeros(h.shape[:2])
        pre[:, 0] = 1
        for s in range(self.stages):
            for part in ("attn", "ffn"):
                found = [self.weights(f"mtp.{s}.hc_{part}", streams) for streams in h]
                x = norm((pre[:, :, None] * h).sum(1), self.value(f"mtp.{s}.{part}_norm.weight"), self.eps)
                output = self.attention(s, x, before[s], positions) if part == "attn" else self.experts(s, x)
                pairs = zip(found, output, h, strict=True)
                h = np.stack([np.outer(post, out) + comb.T @ streams for (_, post, comb), out, streams in pairs])
                pre = np.stack([weights for weights, _, _ in found])
        return (pre[:, :, None] * h).sum(1)
