"""The tensors of a small DeepSeek-V4 checkpoint, drawn from a seed.

Codes and scale bytes are drawn directly, never produced by an encoder, so that these checkpoints can test the
encoders. Every tensor has its own random stream, made from the seed and its name: changing the geometry of one
leaves the values of the others alone.

Matrices have a standard deviation of about 1/sqrt(inputs), norms weights around 1: activations keep their size
through any number of layers.
"""

import math
import zlib
from collections.abc import Iterator
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch

from .geometry import VISION_DOWNSAMPLE, VISION_PATCH, VISION_WIDTH, DSpark, Geometry

# How often each magnitude occurs, of 128: about what rounding a normal distribution to E2M1 gives.
_MAGNITUDES = (15, 28, 24, 19, 19, 14, 8, 1)
_CODE_OF_BYTE = np.repeat(np.arange(16, dtype=np.uint8), _MAGNITUDES * 2)
_E2M1_DEVIATION = 1.75  # root mean square of E2M1 values drawn that way
_OFFSETS = np.repeat(np.arange(-2, 3), (12, 52, 116, 64, 12))  # exponent offsets of neighbouring groups, of 256
_E4M3_DEVIATION = 50.0  # keeps eight standard deviations below 448


def _random(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def _exponent(deviation: float) -> int:
    return round(math.log2(deviation))


def _fp4(name: str, rows: int, columns: int, seed: int, gain: float) -> Iterator[tuple[str, torch.Tensor]]:
    """An FP4 weight as the release stores it: I8 [rows, columns/2] and E8M0 [rows, columns/32]."""
    rng = _random(seed, name)
    codes = _CODE_OF_BYTE[rng.integers(0, 256, (rows, columns), dtype=np.uint8)]
    exponent = _exponent(gain / math.sqrt(columns) / _E2M1_DEVIATION)
    bytes_ = 127 + exponent + _OFFSETS[rng.integers(0, 256, (rows, columns // 32), dtype=np.uint8)]
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    yield f"{name}.weight", torch.from_numpy(packed).view(torch.int8)
    yield f"{name}.scale", torch.from_numpy(bytes_.astype(np.uint8)).view(torch.float8_e8m0fnu)


class Block(NamedTuple):
    """Rows and columns of the elements that share a block scale."""

    rows: int
    columns: int


def _fp8(
    name: str, rows: int, columns: int, seed: int, float32_scale: bool, gain: float, block: Block
) -> Iterator[tuple[str, torch.Tensor]]:
    """An FP8 weight: E4M3 [rows, columns] and one power of two per block, as E8M0 or float32.

    Blocks differ in how far down their codes reach: some have subnormals, none has a NaN.
    """
    rng = _random(seed, name)
    blocks = (-(-rows // block.rows), -(-columns // block.columns))
    lower = rng.integers(0, 4, blocks)
    deviations = np.exp2(-lower.astype(np.float32)).repeat(block.rows, 0).repeat(block.columns, 1)[:rows, :columns]
    values = rng.standard_normal((rows, columns), dtype=np.float32) * deviations * np.float32(_E4M3_DEVIATION)
    exponents = lower + _exponent(gain / math.sqrt(columns) / _E4M3_DEVIATION)
    yield f"{name}.weight", torch.from_numpy(values).clamp(-448, 448).to(torch.float8_e4m3fn)
    if float32_scale:
        yield f"{name}.scale", torch.from_numpy(np.exp2(exponents).astype(np.float32))
    else:
        yield f"{name}.scale", torch.from_numpy((127 + exponents).astype(np.uint8)).view(torch.float8_e8m0fnu)


class Dimensions(Protocol):
    """What the geometries of all architectures have."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def moe_intermediate_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def q_lora_rank(self) -> int: ...
    @property
    def o_groups(self) -> int: ...
    @property
    def o_lora_rank(self) -> int: ...
    @property
    def hc_mult(self) -> int: ...


G = TypeVar("G", bound=Dimensions)


class ModuleSource(Generic[G]):
    """Draws the modules that all architectures have. `base`: routed experts are FP8, all FP8 scales float32."""

    fp8_block = Block(128, 128)

    def __init__(self, geometry: G, seed: int, *, base: bool) -> None:
        self.g, self.seed, self.base = geometry, seed, base

    def _normal(
        self, name: str, shape: tuple[int, ...], deviation: float, mean: float = 0.0, dtype: torch.dtype = torch.float32
    ) -> tuple[str, torch.Tensor]:
        values = _random(self.seed, name).standard_normal(shape, dtype=np.float32) * np.float32(deviation)
        return name, torch.from_numpy(values + np.float32(mean)).to(dtype)

    def _norm(self, name: str, width: int) -> tuple[str, torch.Tensor]:
        return self._normal(f"{name}.weight", (width,), 0.2, 1.0, torch.bfloat16)

    def _bf16(self, name: str, rows: int, columns: int, gain: float = 1.0) -> tuple[str, torch.Tensor]:
        return self._normal(f"{name}.weight", (rows, columns), gain / math.sqrt(columns), dtype=torch.bfloat16)

    def _fp8(
        self, name: str, rows: int, columns: int, gain: float = 1.0, block: Block | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        return _fp8(name, rows, columns, self.seed, self.base, gain, block or self.fp8_block)

    def _expert(self, name: str) -> Iterator[tuple[str, torch.Tensor]]:
        hidden, inner = self.g.hidden_size, self.g.moe_intermediate_size
        for matrix, rows, columns in (("w1", inner, hidden), ("w2", hidden, inner), ("w3", inner, hidden)):
            if self.base:
                yield from self._fp8(f"{name}.{matrix}", rows, columns)
            else:
                yield from _fp4(f"{name}.{matrix}", rows, columns, self.seed, 1.0)

    def _shared_expert(self, name: str) -> Iterator[tuple[str, torch.Tensor]]:
        hidden, inner = self.g.hidden_size, self.g.moe_intermediate_size
        yield from self._fp8(f"{name}.w1", inner, hidden)
        yield from self._fp8(f"{name}.w2", hidden, inner)
        yield from self._fp8(f"{name}.w3", inner, hidden)

    def _projections(self, name: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Attention without what is compressed."""
        g = self.g
        yield self._normal(f"{name}.attn_sink", (g.num_attention_heads,), 1.0)
        yield self._norm(f"{name}.q_norm", g.q_lora_rank)
        yield self._norm(f"{name}.kv_norm", g.head_dim)
        yield from self._fp8(f"{name}.wq_a", g.q_lora_rank, g.hidden_size)
        yield from self._fp8(f"{name}.wq_b", g.num_attention_heads * g.head_dim, g.q_lora_rank)
        yield from self._fp8(f"{name}.wkv", g.head_dim, g.hidden_size)
        width = g.num_attention_heads * g.head_dim // g.o_groups
        yield from self._fp8(f"{name}.wo_a", g.o_groups * g.o_lora_rank, width, 1.5)
        yield from self._fp8(f"{name}.wo_b", g.hidden_size, g.o_groups * g.o_lora_rank)

    def _hyper_connection(self, name: str, rows: int, scales: int) -> Iterator[tuple[str, torch.Tensor]]:
        width = self.g.hc_mult * self.g.hidden_size
        yield self._normal(f"{name}_fn", (rows, width), 1.2 / math.sqrt(width))
        yield self._normal(f"{name}_base", (rows,), 0.8)
        yield self._normal(f"{name}_scale", (scales,), 0.15, 0.7)

    def _image_bias(self, name: str, experts: int) -> tuple[str, torch.Tensor]:
        """The router's bias for image tokens, far from the other one."""
        return self._normal(f"{name}.gate.bias_vl", (experts,), 3.0)

    def _image_vectors(self, *names: str) -> Iterator[tuple[str, torch.Tensor]]:
        for name in names:
            yield self._normal(f"image_{name}", (self.g.hidden_size,), 1.0, dtype=torch.bfloat16)

    def vision(self) -> Iterator[tuple[str, torch.Tensor]]:
        """One block of a vision tower, and the aligner."""
        width, hidden = VISION_WIDTH, self.g.hidden_size
        shapes = {
            "vision.patch_embed.proj": (width, 3 * VISION_PATCH**2),
            "vision.blocks.0.attn.wqkv": (3 * width, width),
            "vision.blocks.0.attn.wo": (width, width),
            "vision.blocks.0.mlp.w1": (4 * width, width),
            "vision.blocks.0.mlp.w2": (width, 2 * width),
            "aligner.w1": (hidden, width * VISION_DOWNSAMPLE**2),
            "aligner.w2": (hidden, hidden),
        }
        for name, (rows, columns) in shapes.items():
            yield self._bf16(name, rows, columns)
            if ".mlp." not in name:
                yield self._normal(f"{name}.bias", (rows,), 0.1, dtype=torch.bfloat16)
        for name in ("vision.blocks.0.norm1", "vision.blocks.0.norm2", "vision.norm"):
            yield self._norm(name, width)


class TensorSource(ModuleSource[Geometry]):
    """Draws the tensors of one V4 checkpoint, module by module."""

    def _compressor(self, name: str, ratio: int, width: int) -> Iterator[tuple[str, torch.Tensor]]:
        halves = 2 if ratio == 4 else 1
        yield self._normal(f"{name}.ape", (ratio, halves * width), 0.5)
        yield self._bf16(f"{name}.wkv", halves * width, self.g.hidden_size)
        yield self._bf16(f"{name}.wgate", halves * width, self.g.hidden_size, 1.2)
        yield self._norm(f"{name}.norm", width)

    def _indexer(self, name: str) -> Iterator[tuple[str, torch.Tensor]]:
        g = self.g
        yield from self._fp8(f"{name}.wq_b", g.index_n_heads * g.index_head_dim, g.q_lora_rank)
        yield self._bf16(f"{name}.weights_proj", g.index_n_heads, g.hidden_size)
        yield from self._compressor(f"{name}.compressor", 4, g.index_head_dim)

    def _attention(self, name: str, ratio: int) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._projections(name)
        if ratio:
            yield from self._compressor(f"{name}.compressor", ratio, self.g.head_dim)
        if ratio == 4:
            yield from self._indexer(f"{name}.indexer")

    def _token_to_experts(self, name: str) -> tuple[str, torch.Tensor]:
        g = self.g
        order = _random(self.seed, name).random((g.vocab_size, g.n_routed_experts)).argsort(axis=1)
        return name, torch.from_numpy(order[:, : g.num_experts_per_tok].astype(np.int64))

    def _experts(self, name: str, hashed: bool) -> Iterator[tuple[str, torch.Tensor]]:
        yield self._bf16(f"{name}.gate", self.g.n_routed_experts, self.g.hidden_size, 2.0)
        if hashed:
            yield self._token_to_experts(f"{name}.gate.tid2eid")
        if self.g.vision or not hashed:
            yield self._normal(f"{name}.gate.bias", (self.g.n_routed_experts,), 0.3)
        if self.g.vision:
            yield self._image_bias(name, self.g.n_routed_experts)
        yield from self._shared_expert(f"{name}.shared_experts")
        for expert in range(self.g.n_routed_experts):
            yield from self._expert(f"{name}.experts.{expert}")

    def _block(self, name: str, ratio: int, hashed: bool) -> Iterator[tuple[str, torch.Tensor]]:
        yield self._norm(f"{name}.attn_norm", self.g.hidden_size)
        yield self._norm(f"{name}.ffn_norm", self.g.hidden_size)
        rows = (2 + self.g.hc_mult) * self.g.hc_mult
        yield from self._hyper_connection(f"{name}.hc_attn", rows, 3)
        yield from self._hyper_connection(f"{name}.hc_ffn", rows, 3)
        yield from self._attention(f"{name}.attn", ratio)
        yield from self._experts(f"{name}.ffn", hashed)

    def embedding(self) -> Iterator[tuple[str, torch.Tensor]]:
        """`embed.weight`, unit variance, and the vision part, if there is one."""
        shape = (self.g.vocab_size, self.g.hidden_size)
        yield self._normal("embed.weight", shape, 1.0, dtype=torch.bfloat16)
        if self.g.vision:
            yield from self._image_vectors("start", "pad", "newline", "end")
            yield from self.vision()

    def layer(self, index: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of one layer of the main stack."""
        return self._block(f"layers.{index}", self.g.compress_ratios[index], index < self.g.num_hash_layers)

    def head(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Final norm, hyper-connection head and output matrix; logits have a standard deviation of about 3."""
        yield self._norm("norm", self.g.hidden_size)
        yield from self._hyper_connection("hc_head", self.g.hc_mult, 1)
        yield self._bf16("head", self.g.vocab_size, self.g.hidden_size, 3.0)

    def draft_stage(self, index: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of one draft stage, of the kind that the geometry says."""
        name = f"mtp.{index}"
        yield from self._block(name, self.g.compress_ratios[self.g.num_hidden_layers + index], False)
        yield from self._mtp(name) if self.g.dspark is None else self._dspark(name, index, self.g.dspark)

    def _mtp(self, name: str) -> Iterator[tuple[str, torch.Tensor]]:
        hidden = self.g.hidden_size
        for norm in ("enorm", "hnorm", "norm"):
            yield self._norm(f"{name}.{norm}", hidden)
        for projection in ("e_proj", "h_proj"):
            yield from self._fp8(f"{name}.{projection}", hidden, hidden)
        yield from self._hyper_connection(f"{name}.hc_head", self.g.hc_mult, 1)

    def _dspark(self, name: str, index: int, dspark: DSpark) -> Iterator[tuple[str, torch.Tensor]]:
        """The first stage reads the main model's layers, the last one chooses tokens."""
        hidden, rank = self.g.hidden_size, dspark.markov_rank
        if index == 0:
            yield self._norm(f"{name}.main_norm", hidden)
            yield from self._fp8(f"{name}.main_proj", hidden, len(dspark.target_layer_ids) * hidden)
        if index == dspark.stages - 1:
            yield self._norm(f"{name}.norm", hidden)
            yield from self._hyper_connection(f"{name}.hc_head", self.g.hc_mult, 1)
            yield self._bf16(f"{name}.confidence_head.proj", 1, hidden + rank)
            shape = (self.g.vocab_size, rank)
            yield self._normal(f"{name}.markov_head.markov_w1.weight", shape, 1.0, dtype=torch.bfloat16)
            yield self._bf16(f"{name}.markov_head.markov_w2", *shape, 2.0)
