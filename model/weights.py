"""From tensor names to matrices: what a checkpoint must hold, and how each stored format decodes.

A `Matrix` keeps a weight as it is on disk (packed FP4, FP8 with E8M0 or float32 scales, BF16, float32) and knows how to
decode rows of it to float32. Every format decodes to the exact value before any product, so a checkpoint and its FP8
or BF16 conversion compute with the same numbers. Whether a layer quantizes its INPUT is a property of the layer's
name, never of the stored format: it is part of the model, and a BF16 conversion must not lose it.

Names are the release's. `tensor_shapes` lists them all from the config, `check` compares the list with the headers.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from dsv4.convert.checkpoint.reader import Checkpoint, TensorInfo
from dsv4.errors import InputError
from dsv4.quant.block_scales import FP4_BLOCK, Block, decode_scale, dequantize_fp4, dequantize_fp8, scale_shape
from dsv4.quant.e4m3 import is_nan

from .config import OVERLAP_RATIO, Config

FLOAT4_E2M1FN, FLOAT8_E4M3FN, BFLOAT16, FLOAT32 = "float4_e2m1fn", "float8_e4m3fn", "bfloat16", "float32"
FORMATS = {"I8": FLOAT4_E2M1FN, "F4": FLOAT4_E2M1FN, "F8_E4M3": FLOAT8_E4M3FN, "BF16": BFLOAT16, "F32": FLOAT32}
QUANTIZED = (FLOAT4_E2M1FN, FLOAT8_E4M3FN)
MODERATE_EXPONENT = 60
ROWS_PER_LOOK = 1024

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Matrix:
    """A weight [out, in] as stored. `values` holds codes or numbers, `scale` the block scales of codes."""

    name: str
    format: str
    shape: tuple[int, int]
    values: torch.Tensor
    scale: torch.Tensor | None = None
    block: Block = FP4_BLOCK
    exact_products: bool = True  # with bfloat16, in float32: few significant bits and no underflow

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        return self.values.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def decode(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows [start, stop) as float32. A start inside an FP8 block is allowed."""
        stop = self.shape[0] if stop is None else stop
        if self.scale is None:
            return self.values[start:stop].to(torch.float32)
        first = start // self.block.rows * self.block.rows
        scale = self.scale[first // self.block.rows : -(-stop // self.block.rows)]
        codes = self.values[first:stop]
        decoded = (
            dequantize_fp4(codes, scale) if self.format == FLOAT4_E2M1FN else dequantize_fp8(codes, scale, self.block)
        )
        return decoded[start - first :]

    def to(self, device: torch.device) -> "Matrix":
        """The same matrix with its tensors on `device`."""
        scale = None if self.scale is None else self.scale.to(device)
        return replace(self, values=self.values.to(device), scale=scale)


def _hyper_shapes(config: Config, prefix: str) -> dict[str, Shape]:
    mixes, flat = (2 + config.hc_mult) * config.hc_mult, config.hc_mult * config.hidden_size
    return {
        f"{prefix}hc_{part}_{name}": shape
        for part in ("attn", "ffn")
        for name, shape in (("fn", (mixes, flat)), ("base", (mixes,)), ("scale", (3,)))
    }


def _compressor_shapes(config: Config, prefix: str, ratio: int, head_dim: int) -> dict[str, Shape]:
    width = head_dim * (2 if ratio == OVERLAP_RATIO else 1)
    return {
        f"{prefix}ape": (ratio, width),
        f"{prefix}wkv.weight": (width, config.hidden_size),
        f"{prefix}wgate.weight": (width, config.hidden_size),
        f"{prefix}norm.weight": (head_dim,),
    }


def _attention_shapes(config: Config, prefix: str, ratio: int) -> dict[str, Shape]:
    wide = config.num_attention_heads * config.head_dim
    low = config.o_groups * config.o_lora_rank
    shapes: dict[str, Shape] = {
        f"{prefix}wq_a.weight": (config.q_lora_rank, config.hidden_size),
        f"{prefix}q_norm.weight": (config.q_lora_rank,),
        f"{prefix}wq_b.weight": (wide, config.q_lora_rank),
        f"{prefix}wkv.weight": (config.head_dim, config.hidden_size),
        f"{prefix}kv_norm.weight": (config.head_dim,),
        f"{prefix}wo_a.weight": (low, wide // config.o_groups),
        f"{prefix}wo_b.weight": (config.hidden_size, low),
        f"{prefix}attn_sink": (config.num_attention_heads,),
    }
    if ratio:
        shapes |= _compressor_shapes(config, f"{prefix}compressor.", ratio, config.head_dim)
    if ratio == OVERLAP_RATIO:
        heads, dim = config.index_n_heads, config.index_head_dim
        shapes[f"{prefix}indexer.wq_b.weight"] = (heads * dim, config.q_lora_rank)
        shapes[f"{prefix}indexer.weights_proj.weight"] = (heads, config.hidden_size)
        shapes |= _compressor_shapes(config, f"{prefix}indexer.compressor.", ratio, dim)
    return shapes


def expert_shapes(config: Config, prefix: str) -> dict[str, Shape]:
    """The three matrices of one expert."""
    wide, hidden = config.moe_intermediate_size, config.hidden_size
    return {
        f"{prefix}w1.weight": (wide, hidden),
        f"{prefix}w2.weight": (hidden, wide),
        f"{prefix}w3.weight": (wide, hidden),
    }


def block_shapes(config: Config, prefix: str, layer: int) -> dict[str, Shape]:
    """Every tensor of one layer (or of the block inside an MTP stage), scales left out."""
    shapes: dict[str, Shape] = {
        f"{prefix}attn_norm.weight": (config.hidden_size,),
        f"{prefix}ffn_norm.weight": (config.hidden_size,),
        f"{prefix}ffn.gate.weight": (config.n_routed_experts, config.hidden_size),
    }
    shapes |= _hyper_shapes(config, prefix)
    shapes |= _attention_shapes(config, f"{prefix}attn.", config.ratio(layer))
    if layer < config.num_hash_layers:
        shapes[f"{prefix}ffn.gate.tid2eid"] = (config.vocab_size, config.num_experts_per_tok)
    else:
        shapes[f"{prefix}ffn.gate.bias"] = (config.n_routed_experts,)
    shapes |= expert_shapes(config, f"{prefix}ffn.shared_experts.")
    for expert in range(config.n_routed_experts):
        shapes |= expert_shapes(config, f"{prefix}ffn.experts.{expert}.")
    return shapes


def head_shapes(config: Config, prefix: str) -> dict[str, Shape]:
    """The end of a stack: the collapse of the streams and the last norm."""
    return {
        f"{prefix}norm.weight": (config.hidden_size,),
        f"{prefix}hc_head_fn": (config.hc_mult, config.hc_mult * config.hidden_size),
        f"{prefix}hc_head_base": (config.hc_mult,),
        f"{prefix}hc_head_scale": (1,),
    }


def mtp_shapes(config: Config, stage: int) -> dict[str, Shape]:
    """Every tensor of one MTP stage of the Flash and Pro releases."""
    prefix, hidden = f"mtp.{stage}.", config.hidden_size
    shapes = block_shapes(config, prefix, config.num_hidden_layers + stage) | head_shapes(config, prefix)
    shapes |= {f"{prefix}{name}.weight": (hidden, hidden) for name in ("e_proj", "h_proj")}
    return shapes | {f"{prefix}{name}.weight": (hidden,) for name in ("enorm", "hnorm")}


def tensor_shapes(config: Config, stages: int) -> dict[str, Shape]:
    """Every tensor of the main stack and of `stages` MTP blocks, scales left out."""
    shapes: dict[str, Shape] = {
        "embed.weight": (config.vocab_size, config.hidden_size),
        "head.weight": (config.vocab_size, config.hidden_size),
    }
    shapes |= head_shapes(config, "")
    for layer in range(config.num_hidden_layers):
        shapes |= block_shapes(config, f"layers.{layer}.", layer)
    for stage in range(stages):
        shapes |= mtp_shapes(config, stage)
    return shapes


def mtp_stages(names: Mapping[str, object]) -> int:
    """How many MTP blocks of the Flash and Pro kind there are: those with an e_proj.

    The three stages of the DSpark releases are wired differently; they are left out, the main model runs without.
    """
    found = {int(m.group(1)) for m in (re.fullmatch(r"mtp\.(\d+)\.e_proj\.weight", name) for name in names) if m}
    return len(found)


def scale_name(weight: str) -> str:
    """Name of the block scale that belongs to a weight."""
    return f"{weight.removesuffix('.weight')}.scale"


def logical_shape(info: TensorInfo) -> Shape:
    """Shape in elements: a byte of a packed FP4 tensor holds two."""
    return (*info.shape[:-1], info.shape[-1] * 2) if info.dtype == "I8" and info.shape else info.shape


def check(config: Config, tensors: Mapping[str, TensorInfo], stages: int) -> None:
    """Compare the headers with what the config asks for. Raises InputError naming the first tensor that is wrong."""
    if len(config.compress_ratios) < config.num_hidden_layers + stages:
        raise InputError(f"config.json: compress_ratios has no entry for {stages} MTP block(s)")
    shapes = tensor_shapes(config, stages)
    missing = [name for name in shapes if name not in tensors]
    if missing:
        raise InputError(
            f"'{missing[0]}' is missing ({len(missing)} of the {len(shapes)} tensors that config.json asks for are)",
            "The checkpoint is incomplete, or the config belongs to another one.",
        )
    for name, shape in shapes.items():
        check_tensor(config, tensors, name, shape)


def check_tensor(config: Config, tensors: Mapping[str, TensorInfo], name: str, shape: Shape) -> None:
    """One weight and its scale: dtype known, shapes as the config says. Raises InputError."""
    info = tensors[name]
    if logical_shape(info) != shape:
        raise InputError(
            f"'{name}' is {info.dtype} {list(info.shape)}, config.json asks for {list(shape)}",
            "The config belongs to another checkpoint.",
        )
    if name.endswith("tid2eid"):
        if info.dtype not in ("I64", "I32"):
            raise InputError(f"'{name}' is {info.dtype}, a table of expert ids must be I64")
        return
    if info.dtype not in FORMATS:
        raise InputError(f"'{name}' is {info.dtype}, which this engine has no decoder for")
    if FORMATS[info.dtype] in QUANTIZED:
        _check_scale(config, tensors, info, shape)


def _check_scale(config: Config, tensors: Mapping[str, TensorInfo], info: TensorInfo, shape: Shape) -> None:
    scale = tensors.get(scale_name(info.name))
    if scale is None:
        raise InputError(
            f"'{info.name}' is {info.dtype}, but its block scale '{scale_name(info.name)}' is missing",
            "The conversion that wrote it did not finish, or dropped it.",
        )
    expected = scale_shape(shape, block_of(config, FORMATS[info.dtype]))
    if scale.dtype not in ("F8_E8M0", "F32") or scale.shape != expected:
        raise InputError(
            f"'{scale.name}' is {scale.dtype} {list(scale.shape)}, "
            f"a block scale F8_E8M0 or F32 {list(expected)} is expected"
        )


def block_of(config: Config, stored: str) -> Block:
    """Geometry of the block scales of a stored format."""
    return FP4_BLOCK if stored == FLOAT4_E2M1FN else Block(*config.weight_block_size)


def _check_scale_values(scale: torch.Tensor, name: str) -> None:
    try:
        decode_scale(scale)
    except ValueError:
        raise InputError(f"'{name}' holds a NaN or a value that is not positive and finite") from None


def _are_moderate_powers_of_two(scale: torch.Tensor) -> bool:
    """Whether codes times these scales have as few significant bits as the codes, far from the ends of float32."""
    bits = scale.view(torch.int32)
    exponent = (bits >> 23) - 127
    return bool(((bits & 0x7FFFFF) == 0).all() and (exponent.abs() <= MODERATE_EXPONENT).all())


def _has_tiny_values(values: torch.Tensor) -> bool:
    """Whether a bfloat16 matrix has values other than zero below 2**-MODERATE_EXPONENT."""
    smallest = (127 - MODERATE_EXPONENT) << 7
    for start in range(0, len(values), ROWS_PER_LOOK):
        magnitude = values[start : start + ROWS_PER_LOOK].view(torch.int16) & 0x7FFF
        if ((magnitude != 0) & (magnitude < smallest)).any():
            return True
    return False


def _read_scale(checkpoint: Checkpoint, name: str, block: Block, rows: tuple[int, int]) -> tuple[torch.Tensor, Block]:
    """Block scales of rows [start, stop). Rows that begin inside a block get lower blocks, so that they begin one."""
    start, stop = rows
    scale = checkpoint.read_tensor(name, start // block.rows, -(-stop // block.rows))
    _check_scale_values(scale, name)
    height = math.gcd(start, block.rows)
    if height == block.rows:
        return scale, block
    used = torch.arange(start, stop, height) // block.rows - start // block.rows
    as_bytes = scale.view(torch.uint8).view(len(scale), -1)
    return as_bytes[used].view(scale.dtype), block._replace(rows=height)


def read_matrix(checkpoint: Checkpoint, config: Config, name: str, rows: tuple[int, int] | None = None) -> Matrix:
    """A weight as stored, or rows [start, stop) of it, from the files. Raises InputError for a NaN or a bad scale."""
    info = checkpoint.tensors[name]
    stored, columns = FORMATS[info.dtype], logical_shape(info)[1]
    start, stop = (0, info.shape[0]) if rows is None else rows
    shape = stop - start, columns
    values = checkpoint.read_tensor(name, start, stop)
    if stored not in QUANTIZED:
        exact = stored == BFLOAT16 and not _has_tiny_values(values)
        return Matrix(name, stored, shape, values, exact_products=exact)
    if stored == FLOAT8_E4M3FN and is_nan(values).any():
        raise InputError(f"'{name}' holds a NaN", "The file is damaged, or the conversion that wrote it overflowed.")
    scale, block = _read_scale(checkpoint, scale_name(name), block_of(config, stored), (start, stop))
    return Matrix(name, stored, shape, values, scale, block, _are_moderate_powers_of_two(decode_scale(scale)))


def read_vector(checkpoint: Checkpoint, config: Config, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
    """A norm, bias, sink or other small tensor (or rows of it) as float32, or a table of expert ids as int64.

    Raises InputError if a table names an expert that does not exist.
    """
    tensor = checkpoint.read_tensor(name, *(rows or (0, None)))
    if tensor.is_floating_point():
        return tensor.to(torch.float32)
    wrong = tensor[(tensor < 0) | (tensor >= config.n_routed_experts)]
    if len(wrong):
        raise InputError(f"'{name}' names expert {int(wrong[0])}, there are {config.n_routed_experts}")
    return tensor.to(torch.int64)
