"""DeepSeek-V4.1 once more, from its formulas, in float64 and loops: for a whole sequence at once, without simulation.

Nothing here comes from dsv4: tensors are decoded with ml_dtypes, and every list of keys is made anew for each query.
"""

import json
import math
import struct
import unicodedata
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from tokenizers import Tokenizer

Array = np.ndarray[Any, Any]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
PLAIN = {"F32": "<f4", "BF16": ml_dtypes.bfloat16}


def raw_tensors(folder: Path) -> dict[str, tuple[str, Array]]:
    """dtype and bytes [shape .., itemsize] of every tensor."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        raw = path.read_bytes()
        (size,) = struct.unpack("<Q", raw[:8])
        for name, entry in json.loads(raw[8 : 8 + size]).items():
            start, end = (8 + size + offset for offset in entry["data_offsets"])
            found[name] = entry["dtype"], np.frombuffer(raw[start:end], np.uint8).reshape(*entry["shape"], -1)
    return found


def decoded_tensors(folder: Path) -> dict[str, Array]:
    """Every weight as float64, scales multiplied in."""
    raw, found = raw_tensors(folder), {}
    for name, (dtype, values) in raw.items():
        if dtype in PLAIN:
            found[name] = values.view(PLAIN[dtype]).squeeze(-1).astype(np.float64)
        elif dtype in ("I8", "F8_E4M3"):
            if dtype == "I8":
                codes = np.stack((values[..., 0] & 15, values[..., 0] >> 4), -1).reshape(len(values), -1)
                numbers = E2M1[codes]
            else:
                numbers = values.view(ml_dtypes.float8_e4m3fn).squeeze(-1).astype(np.float64)
            scale = np.exp2(raw[name.removesuffix("weight") + "scale"][1].squeeze(-1).astype(np.float64) - 127)
            high = 1 if dtype == "I8" or ".engram.embed." in name else 32
            found[name] = numbers * scale.repeat(high, 0).repeat(32, 1)[: len(numbers), : numbers.shape[1]]
    return found


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def softmax(x: Array, axis: int = -1) -> Array:
    weights = np.exp(x - x.max(axis, keepdims=True))
    return weights / weights.sum(axis, keepdims=True)


class Oracle:
    """One checkpoint. `logits` and `hidden` of all positions of a sequence."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.w = folder, decoded_tensors(folder)
        config = json.loads((folder / "config.json").read_text())
        self.c: dict[str, Any] = {**config, **config["text_config"]}

    def norm(self, x: Array, name: str) -> Array:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.c["rms_norm_eps"]) * self.w[name]

    def rope(self, x: Array, positions: Array, compressed: bool, sign: int = 1) -> Array:
        """The last r dims of x [n, .., c] turned by the position of each of the n."""
        r = self.c["qk_rope_head_dim"]
        theta = self.c["compress_rope_theta" if compressed else "rope_theta"]
        frequency = theta ** -(np.arange(0, r, 2) / r)
        if compressed:
            y = self.c["rope_scaling"]

            def turns(k: float) -> float:
                return r * math.log(y["original_max_position_embeddings"] / (k * 2 * math.pi)) / (2 * math.log(theta))

            low = max(math.floor(turns(y["beta_fast"])), 0)
            high = min(math.ceil(turns(y["beta_slow"])), r - 1)
            ramp = np.clip((np.arange(r // 2) - low) / (high - low if high != low else 0.001), 0, 1)
            frequency = frequency * (1 - ramp) + frequency / y["factor"] * ramp
        angle = positions[:, None] * frequency
        turn = np.exp(1j * sign * angle).reshape(len(x), *[1] * (x.ndim - 2), r // 2)
        pairs = x[..., -r:].reshape(*x.shape[:-1], r // 2, 2)
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * turn
        out = x.copy()
        out[..., -r:] = np.stack((turned.real, turned.imag), -1).reshape(*x.shape[:-1], r)
        return out

    def mixes(self, h: Array, name: str) -> tuple[Array, Array, Array]:
        n, eps = self.c["hc_mult"], self.c["hc_eps"]
        x = h.reshape(len(h), -1)
        m = x @ self.w[f"{name}_fn"].T / np.sqrt((x * x).mean(-1, keepdims=True) + self.c["rms_norm_eps"])
        scale, base = self.w[f"{name}_scale"], self.w[f"{name}_base"]
        pre = sigmoid(m[:, :n] * scale[0] + base[:n]) + eps
        post = 2 * sigmoid(m[:, n : 2 * n] * scale[1] + base[n : 2 * n])
        comb = softmax((m[:, 2 * n :] * scale[2] + base[2 * n :]).reshape(-1, n, n)) + eps
        comb /= comb.sum(1, keepdims=True) + eps
        for _ in range(self.c["hc_sinkhorn_iters"] - 1):
            comb /= comb.sum(2, keepdims=True) + eps
            comb /= comb.sum(1, keepdims=True) + eps
        return pre, post, comb

    # Compressed keys

    def compress(self, x: Array, layer: int) -> None:
        """Of a KV source: self.keys [groups, c] and self.index_keys [groups, d]."""
        m, name = self.c["compress_ratios"][layer], f"layers.{layer}.attn."
        values = x @ self.w[name + "compressor.wkv.weight"].T
        groups = len(x) // m
        values = values[: groups * m].reshape(groups, m, -1)
        if m > 1:
            gate = (x @ self.w[name + "compressor.wgate.weight"].T)[: groups * m].reshape(groups, m, -1)
            values = values * softmax(gate, 1)
        z = self.norm(values.sum(1), name + "compressor.norm.weight")
        index = self.norm(z @ self.w[name + "indexer.wk.weight"].T, name + "indexer.k_norm.weight")
        starts = np.arange(groups) * m
        self.keys, self.index_keys = self.rope(z, starts, True), self.rope(index, starts, True)

    def choose(self, x: Array, qr: Array, layer: int) -> None:
        """Of an index source: self.lists, the groups of each query; the candidate source also sets self.blocks."""
        c, m, name = self.c, self.c["compress_ratios"][layer], f"layers.{layer}.attn.indexer."
        heads, d, size = c["index_n_heads"], c["index_head_dim"], c["candidate_block_size"]
        q = self.rope((qr @ self.w[name + "wq_b.weight"].T).reshape(len(x), heads, d), np.arange(len(x)), True)
        weight = x @ self.w[name + "weights_proj.weight"].T * d**-0.5 * heads**-0.5
        self.lists, blocks = [], []
        for t in range(len(x)):
            visible = (t + 1) // m
            scores = (weight[t][:, None] * np.maximum(q[t] @ self.index_keys[:visible].T, 0)).sum(0)
            if layer == c["candidate_source_layer_id"]:
                newest = (visible - 1) // size
                best = {b: scores[b * size : (b + 1) * size].max() for b in range(newest + 1)}
                ranked = sorted(best, key=lambda b, best=best, newest=newest: (b != newest, -best[b]))
                blocks.append(set(ranked[: c["candidate_topk_blocks"]]))
            elif self.blocks:
                scores = np.where([j // size in self.blocks[t] for j in range(visible)], scores, -np.inf)
            allowed = [j for j in np.argsort(-scores, kind="stable") if scores[j] > -np.inf]
            self.lists.append(sorted(allowed[: c["index_topk"]]))
        self.blocks = blocks or self.blocks

    def attention(self, x: Array, layer: int) -> Array:
        c, name, positions = self.c, f"layers.{layer}.attn.", np.arange(len(x))
        m, width, heads, window = (
            c["compress_ratios"][layer],
            c["head_dim"],
            c["num_attention_heads"],
            c["sliding_window"],
        )
        qr = self.norm(x @ self.w[name + "wq_a.weight"].T, name + "q_norm.weight")
        q = self.rope((qr @ self.w[name + "wq_b.weight"].T).reshape(len(x), heads, width), positions, m > 0)
        kv = self.rope(self.norm(x @ self.w[name + "wkv.weight"].T, name + "kv_norm.weight"), positions, m > 0)
        if layer in c["kv_source_layer_ids"]:
            self.compress(x, layer)
        if layer in c["index_source_layer_ids"]:
            self.choose(x, qr, layer)
        out = np.empty_like(q)
        for t in range(len(x)):
            keys = kv[max(0, t - window + 1) : t + 1]
            if m:
                keys = np.concatenate((keys, self.keys[self.lists[t]]))
            scores = q[t] @ keys.T * width**-0.5
            weights = np.exp(scores)
            out[t] = weights @ keys / (weights.sum(1) + np.exp(self.w[name + "attn_sink"]))[:, None]
        groups = self.rope(out, positions, m > 0, -1).reshape(len(x), c["o_groups"], -1)
        wo_a = self.w[name + "wo_a.weight"].reshape(c["o_groups"], c["o_lora_rank"], -1)
        low = np.einsum("tgi,goi->tgo", groups, wo_a).reshape(len(x), -1)
        return low @ self.w[name + "wo_b.weight"].T

    def experts(self, x: Array, layer: int) -> Array:
        c, name = self.c, f"layers.{layer}.ffn."

        def expert(v: Array, which: str, share: float) -> Array:
            w1, w2, w3 = (self.w[f"{name}{which}.w{i}.weight"] for i in (1, 2, 3))
            gate, up = np.minimum(w1 @ v, c["swiglu_limit"]), np.clip(w3 @ v, -c["swiglu_limit"], c["swiglu_limit"])
            return w2 @ (gate * sigmoid(gate) * up * share)

        scores = np.sqrt(np.log1p(np.exp(x @ self.w[name + "gate.weight"].T)))
        out = np.empty_like(x)
        for t in range(len(x)):
            chosen = np.argsort(-(scores[t] + self.w[name + "gate.bias"]), kind="stable")[: c["num_experts_per_tok"]]
            total = scores[t][chosen].sum() + 1e-20
            out[t] = expert(x[t], "shared_experts", 1.0)
            for e in chosen:
                out[t] += expert(x[t], f"experts.{e}", scores[t][e] / total * c["routed_scaling_factor"])
        return out

    # Engram

    def classes(self) -> list[int]:
        tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        numbers: dict[str, int] = {}
        return [numbers.setdefault(self.key(tokenizer, i), len(numbers)) for i in range(self.c["vocab_size"])]

    @staticmethod
    def key(tokenizer: Tokenizer, token: int) -> str:
        text = tokenizer.decode([token], skip_special_tokens=False)
        if "\N{REPLACEMENT CHARACTER}" in text:
            return str(tokenizer.id_to_token(token))
        plain = "".join(
            " " if c in " \t\r\n" else c.lower()
            for c in unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
            if unicodedata.category(c)[0] != "M"
        )
        while "  " in plain:
            plain = plain.replace("  ", " ")
        return plain if plain == " " else plain.strip() or text  # no token here has U+001C to U+001F alone

    def primes(self) -> Iterator[int]:
        return (n for n in count(self.c["engram_vocab_size"]) if all(n % d for d in range(2, int(n**0.5) + 1)))

    def rows(self, ids: list[int], table: int) -> list[list[int]]:
        c, classes = self.c, self.classes()
        longest, heads = c["engram_max_ngram_size"], c["engram_n_heads"]
        every = self.primes()
        mine = [[next(every) for _ in range((longest - 1) * heads)] for _ in range(table + 1)][-1]
        most = (2**63 - 1) // c["engram_compressed_vocab_size"] // 2
        drawn = np.random.default_rng(10007 * c["engram_layer_ids"][table]).integers(0, most, longest)
        found = []
        for t in range(len(ids)):
            back = [classes[ids[t - i]] if t >= i else classes[c["engram_pad_token_id"]] for i in range(longest)]
            hashed, row = back[0] * int(2 * drawn[0] + 1), []
            for i in range(1, longest):
                hashed ^= back[i] * int(2 * drawn[i] + 1)
                for head in range(heads):
                    column = (i - 1) * heads + head
                    row.append(hashed % mine[column] + sum(mine[:column]))
            found.append(row)
        return found

    def engram(self, h: Array, ids: list[int], layer: int) -> Array:
        c, name, d = self.c, f"layers.{layer}.engram.", self.c["hidden_size"]
        rows = self.rows(ids, c["engram_layer_ids"].index(layer))
        read = self.w[name + "embed.weight"][rows].reshape(len(ids), -1)
        mixed = (read @ self.w[name + "wkv.weight"].T).reshape(len(ids), -1, d)
        keys, value = mixed[:, :-1], mixed[:, -1:]

        def unit(x: Array) -> Array:
            return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-20)

        s = (unit(h) * unit(keys) * self.w[name + "q_weight"] * self.w[name + "k_weight"]).sum(-1) / math.sqrt(d)
        return h + sigmoid(np.sign(s) * np.sqrt(np.maximum(np.abs(s), 1e-6)))[..., None] * value

    def forward(self, ids: list[int]) -> tuple[Array, Array]:
        """Logits [t, V], and the means of the streams in front of the target layers, [t, targets * D]."""
        c, self.blocks = self.c, []
        h = np.repeat(self.w["embed.weight"][ids][:, None], c["hc_mult"], 1)
        pre, targets = np.eye(c["hc_mult"])[:1].repeat(len(ids), 0), []
        for layer in range(c["num_hidden_layers"]):
            if layer in c["engram_layer_ids"]:
                h = self.engram(h, ids, layer)
            if layer in c["dspark_target_layer_ids"]:
                targets.append(h.mean(1))
            for part, sublayer in (("attn", self.attention), ("ffn", self.experts)):
                following, post, comb = self.mixes(h, f"layers.{layer}.hc_{part}")
                u = self.norm(np.einsum("tj,tjd->td", pre, h), f"layers.{layer}.{part}_norm.weight")
                h = post[..., None] * sublayer(u, layer)[:, None] + np.einsum("tjk,tjd->tkd", comb, h)
                pre = following
        u = self.norm(np.einsum("tj,tjd->td", pre, h), "norm.weight")
        return u @ self.w["head.weight"].T, np.concatenate(targets, -1)
