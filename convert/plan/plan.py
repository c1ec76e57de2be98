"""What will be written, as data: output shards, their tensors in file order, exact sizes. Nothing is read or written.

`make_plan` turns the headers of a checkpoint and the Settings into a Plan in seconds, however large the model. What
`--dry-run` prints, what disk space is asked for and what the workers do all come from it, so they cannot disagree.

Within a shard tensors lie as the safetensors library orders them, by dtype and then by name. Across shards they keep
the order of the source, so that a source that arrives shard by shard is consumed in order.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property

from dsv4.convert.checkpoint.foreign import refuse_foreign
from dsv4.convert.checkpoint.header import build_header, tensor_bytes
from dsv4.convert.checkpoint.names import is_wo_a, natural_order, rank_file_name
from dsv4.convert.checkpoint.rank_layout import (
    Slice,
    check_blocks,
    count_experts,
    mp_name,
    mp_slice,
    rank_of_expert,
    skipped,
)
from dsv4.convert.checkpoint.reader import Checkpoint, TensorInfo, row_count
from dsv4.errors import InputError, printable
from dsv4.quant.block_scales import FP4_BLOCK, Block, scale_shape

from .classify import Format, Weight, classify, fp8_block
from .engines import Layout
from .settings import DEFAULT_MAX_SHARD_BYTES, Settings

# The order of the safetensors library: alignment first, so that every tensor starts at a multiple of its element size.
DTYPE_ORDER = (
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16",
    "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "F6_E3M2", "F6_E2M3", "F4", "BOOL",
)  # fmt: skip

# Unless larger shards than usual are asked for, one draws on at most two source shards: a source that arrives shard by
# shard then needs room for two, whatever their sizes.
MAX_SOURCE_SHARDS = 2


class Op(Enum):
    """How the bytes of an output tensor come about."""

    COPY = "copy"  # byte for byte
    SCALE_TO_F32 = "scale to float32"  # E8M0 bytes to powers of two
    SCALE_TO_E8M0 = "scale to e8m0"  # float32 powers of two to bytes
    FP8_CODES = "fp4 to fp8"
    FP8_SCALE = "fp8 scale"
    FP4_CODES = "fp8 to fp4"
    FP4_SCALE = "fp4 scale"
    BF16 = "to bf16"


@dataclass(frozen=True)
class OutputTensor:
    """One tensor to write: what it is in the output and which source tensors it is made from.

    of_scale: a copy of the weight's scale rather than of the weight. part: the slice of one tensor-parallel rank.
    block: geometry of the FP8 blocks that codes are cast to, for FP8_CODES and FP8_SCALE.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    op: Op
    weight: Weight
    of_scale: bool = False
    part: Slice | None = None
    block: Block | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of data in the output."""
        return tensor_bytes(self.dtype, self.shape)

    @property
    def rows(self) -> int:
        """Rows that it is made by, see `row_count`."""
        return row_count(self.shape, self.nbytes)

    @property
    def source(self) -> TensorInfo:
        """The tensor whose rows the rows of this one correspond to."""
        if self.of_scale or self.op in (Op.SCALE_TO_F32, Op.SCALE_TO_E8M0):
            assert self.weight.scale is not None
            return self.weight.scale
        return self.weight.info

    @property
    def reads(self) -> tuple[TensorInfo, ...]:
        """All source tensors that are needed."""
        if self.op is Op.COPY or self.op in (Op.SCALE_TO_F32, Op.SCALE_TO_E8M0):
            return (self.source,)
        assert self.weight.scale is not None
        return (self.weight.info, self.weight.scale)


@dataclass(frozen=True)
class OutputShard:
    """One output file: its tensors in data order."""

    file: str
    tensors: tuple[OutputTensor, ...]

    @cached_property
    def header(self) -> bytes:
        """Everything before the data."""
        return build_header({t.name: (t.dtype, t.shape) for t in self.tensors})

    @property
    def data_bytes(self) -> int:
        """Bytes of data."""
        return sum(t.nbytes for t in self.tensors)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header) + self.data_bytes

    @property
    def source_shards(self) -> tuple[str, ...]:
        """The source shards that must be there to make this one, sorted."""
        return tuple(sorted({info.shard for t in self.tensors for info in t.reads}))


@dataclass(frozen=True)
class Plan:
    """All of a conversion."""

    settings: Settings
    shards: tuple[OutputShard, ...]
    source_bytes: int
    notes: tuple[str, ...]

    @property
    def output_bytes(self) -> int:
        """Bytes of all output shards, headers included."""
        return sum(shard.size for shard in self.shards)


def output_order(tensor: OutputTensor) -> tuple[int, str]:
    """Sort key of a tensor within its shard."""
    return DTYPE_ORDER.index(tensor.dtype), tensor.name


def _copy(weight: Weight) -> OutputTensor:
    return OutputTensor(weight.name, weight.info.dtype, weight.info.shape, Op.COPY, weight)


def _kept_scale(weight: Weight, scale_dtype: str | None) -> OutputTensor:
    """The scale of a weight that keeps its codes, in the dtype that is asked for."""
    scale = weight.scale
    assert scale is not None
    if scale.dtype == "F8_E8M0" and scale_dtype == "f32" and weight.format is Format.FP8:
        return OutputTensor(scale.name, "F32", scale.shape, Op.SCALE_TO_F32, weight)
    if scale.dtype == "F32" and scale_dtype == "e8m0":
        return OutputTensor(scale.name, "F8_E8M0", scale.shape, Op.SCALE_TO_E8M0, weight)
    return OutputTensor(scale.name, scale.dtype, scale.shape, Op.COPY, weight, of_scale=True)


def _kept(weight: Weight) -> list[OutputTensor]:
    """A weight and its scale as they are."""
    return [_copy(weight), _kept_scale(weight, None)]


def _to_fp8(weight: Weight, block: Block, scale_dtype: str | None) -> list[OutputTensor]:
    assert weight.scale is not None
    shape = weight.logical_shape
    tag = "F32" if scale_dtype == "f32" else "F8_E8M0"
    return [
        OutputTensor(weight.name, "F8_E4M3", shape, Op.FP8_CODES, weight, block=block),
        OutputTensor(weight.scale.name, tag, scale_shape(shape, block), Op.FP8_SCALE, weight, block=block),
    ]


def _to_fp4(weight: Weight) -> list[OutputTensor]:
    assert weight.scale is not None
    rows, columns = weight.logical_shape
    if columns % 2:
        raise InputError(f"'{weight.name}' has {columns} columns: FP4 packs two elements into a byte")
    return [
        OutputTensor(weight.name, "I8", (rows, columns // 2), Op.FP4_CODES, weight),
        OutputTensor(weight.scale.name, "F8_E8M0", scale_shape((rows, columns), FP4_BLOCK), Op.FP4_SCALE, weight),
    ]


def outputs_of(weight: Weight, settings: Settings, block: Block | None) -> list[OutputTensor]:
    """The tensors that one source weight (and its scale) becomes, before any slicing."""
    if weight.format is Format.PLAIN:
        return [_copy(weight)] if weight.scale is None else _kept(weight)
    decode = settings.to == "bf16" or (settings.wo_a == "bf16" and is_wo_a(weight.name))
    if decode:
        return [OutputTensor(weight.name, "BF16", weight.logical_shape, Op.BF16, weight)]
    if weight.is_routed_expert and weight.format is Format.FP4 and settings.to == "fp8":
        assert block is not None
        return _to_fp8(weight, block, "e8m0" if settings.layout == "mp" else settings.scale_dtype)
    if weight.is_routed_expert and weight.format is Format.FP8 and settings.to == "fp4":
        return _to_fp4(weight)
    return [_copy(weight), _kept_scale(weight, settings.scale_dtype)]


def _in_source_order(checkpoint: Checkpoint) -> list[Weight]:
    return sorted(classify(checkpoint), key=lambda w: (w.info.shard, natural_order(w.name)))


def _groups(weights: list[Weight], settings: Settings, block: Block | None) -> Iterator[list[OutputTensor]]:
    """Tensors of each shard of the Hugging Face layout, filled up to the limit; weight and scale stay together."""
    group: list[OutputTensor] = []
    filled, sources = 0, set[str]()
    merges = settings.max_shard_bytes > DEFAULT_MAX_SHARD_BYTES
    for weight in weights:
        outputs = outputs_of(weight, settings, block)
        size = sum(o.nbytes for o in outputs)
        needs = {info.shard for o in outputs for info in o.reads}
        crowded = not merges and len(sources | needs) > MAX_SOURCE_SHARDS
        if group and (filled + size > settings.max_shard_bytes or crowded):
            yield group
            group, filled, sources = [], 0, set()
        group += outputs
        filled += size
        sources |= needs
    if group:
        yield group


def _hf_shards(weights: list[Weight], settings: Settings, block: Block | None) -> list[OutputShard]:
    groups = list(_groups(weights, settings, block))
    return [
        OutputShard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", tuple(sorted(group, key=output_order)))
        for i, group in enumerate(groups, 1)
    ]


def _mp_tensor(output: OutputTensor, rank: int, ranks: int) -> OutputTensor:
    """One rank's part of a tensor, under the reference engine's name and dtype tag."""
    part = mp_slice(output.name, output.shape, rank, ranks)
    packed = output.op is Op.COPY and output.weight.format is Format.FP4 and not output.of_scale
    dtype = "F4" if packed else output.dtype
    shape = output.weight.logical_shape if packed else output.shape
    if part is not None:
        if output.weight.block is not None:
            check_blocks(output.weight.name, output.weight.logical_shape, part, output.weight.block)
        shape = part.apply_to(shape)
    return replace(output, name=mp_name(output.name), dtype=dtype, shape=shape, part=part)


def kept_instead_of(output: OutputTensor, layout: Layout) -> list[OutputTensor]:
    """What a weight without an exact form becomes under `--on-inexact keep`: itself, in the layout's dress."""
    if layout == "hf":
        return _kept(output.weight)
    rank, ranks = (output.part.index, output.part.count) if output.part else (0, 1)
    return [_mp_tensor(kept, rank, ranks) for kept in _kept(output.weight)]


def _check_names(outputs: list[OutputTensor]) -> None:
    """Raises InputError if two tensors would get one name, such as `model.norm.weight` and `norm.weight`."""
    seen: dict[str, str] = {}
    for output in outputs:
        twin = seen.setdefault(mp_name(output.name), output.name)
        if twin != output.name:
            raise InputError(
                f"'{printable(twin)}' and '{printable(output.name)}' are one name in the reference engine's layout",
                "Remove one of them, or use --layout hf.",
            )


def _mp_shards(weights: list[Weight], settings: Settings, block: Block | None) -> list[OutputShard]:
    ranks = settings.model_parallel
    outputs = [o for w in weights for o in outputs_of(w, settings, block) if not skipped(o.name)]
    _check_names(outputs)
    experts = count_experts([o.name for o in outputs])
    by_rank: list[list[OutputTensor]] = [[] for _ in range(ranks)]
    for output in outputs:
        owner = rank_of_expert(output.name, experts, ranks)
        for rank in range(ranks) if owner is None else (owner,):
            by_rank[rank].append(_mp_tensor(output, rank, ranks))
    return [
        OutputShard(rank_file_name(rank, ranks), tuple(sorted(tensors, key=output_order)))
        for rank, tensors in enumerate(by_rank)
    ]


def _check_experts(weights: list[Weight], settings: Settings) -> None:
    """Raises InputError if experts are neither FP4 nor FP8: they would stay, and the config would say otherwise."""
    for weight in weights:
        if settings.to in ("fp8", "fp4") and weight.is_routed_expert and weight.format is Format.PLAIN:
            raise InputError(
                f"'{printable(weight.name)}' is {weight.info.dtype}, neither FP4 nor FP8: "
                f"--to {settings.to} would be a new quantization",
                "--to same keeps it as it is.",
            )


def _notes(weights: list[Weight], settings: Settings) -> list[str]:
    """What a user should know about this source and these settings together."""
    notes = []
    experts = {w.format for w in weights if w.is_routed_expert}
    if settings.to == "fp8" and Format.FP4 not in experts:
        notes.append("no routed expert is FP4: only the layout changes")
    if settings.to == "fp4" and Format.FP8 not in experts:
        notes.append("no routed expert is FP8: only the layout changes")
    if settings.wo_a == "fp8" and any(is_wo_a(w.name) and w.format is Format.PLAIN for w in weights):
        notes.append("wo_a is BF16 in the source and stays so: FP8 would be a new quantization")
    return notes


def make_plan(checkpoint: Checkpoint, settings: Settings) -> Plan:
    """Plan a conversion. Raises InputError when the checkpoint cannot be converted as asked."""
    if settings.to != "same" or settings.layout == "mp":
        refuse_foreign(checkpoint.config, checkpoint.tensors)
    weights = _in_source_order(checkpoint)
    _check_experts(weights, settings)
    source_format = {"fp8": Format.FP4, "fp4": Format.FP8}.get(settings.to)
    casts = any(w.is_routed_expert and w.format is source_format for w in weights)
    block = fp8_block(checkpoint.config) if casts else None
    if block is not None and block.columns % FP4_BLOCK.columns:
        raise InputError(
            f"config.json: weight_block_size {list(block)}: its columns are not groups of {FP4_BLOCK.columns}"
        )
    layout = _hf_shards if settings.layout == "hf" else _mp_shards
    shards = layout(weights, settings, block)
    source_bytes = sum(shard.size for shard in checkpoint.shards.values())
    return Plan(settings, tuple(shards), source_bytes, tuple(_notes(weights, settings)))
