"""Classifies tensors: how the elements are stored, and which scale belongs to a weight. All commands use this result.

Declared dtypes, names and shapes decide; no data is read. A quantized weight is `<stem>.weight` with its
block scale beside it, in the same shard or in another:

    FP8   F8_E4M3, with one scale per block: the config says which block, or the edition for a tensor by its name
    FP4   I8 as released, or F4, which counts elements; U8, as other tools write it, where the scale has the shape of
          one per 32 elements: two codes to a byte

Scales are F8_E8M0 or, of FP8 weights, F32; U8 of the right shape is read as F8_E8M0. Every other tensor is plain
and keeps its bytes, so checkpoints with unknown tensors convert too.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from typing import Any, NamedTuple

from dsv4.quant.blocks import FP4_BLOCK, Block, scale_shape

from .config import Config, weight_block
from .editions.table import block_by_name
from .header import KINDS
from .names import SCALE_SUFFIXES, WEIGHT_SUFFIX, is_draft, is_expert_matrix, is_wo_a, scale_name, without_expert
from .reader import TensorInfo

RELEASED_BLOCKS = (Block(128, 128), Block(32, 32))  # of FP8 weights, if the config does not name one
DAMAGED = "Download the checkpoint again, or convert it again from the release."
_FP4_DTYPES = ("I8", "F4")
_FP8_DTYPE = "F8_E4M3"
_E8M0 = "F8_E8M0"


class Format(Enum):
    """How the elements of a weight are stored."""

    FP4 = "fp4"
    FP8 = "fp8"
    PLAIN = "plain"


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a quantized weight cannot be read: the tensor at fault, the fault, and what to do."""

    tensor: str
    text: str
    hint: str = DAMAGED

    def __str__(self) -> str:
        """For a message."""
        return f"'{self.tensor}': {self.text}"


class Weight(NamedTuple):
    """A tensor that is not a scale, with its block scale and the block size.

    `info` and `scale` have the release's dtypes: I8 and F8_E8M0 where the file says U8. If there is a `fault`, the
    other fields are as if there were none.
    """

    info: TensorInfo
    format: Format
    scale: TensorInfo | None = None
    block: Block | None = None
    fault: Fault | None = None

    @property
    def name(self) -> str:
        """Name of the tensor."""
        return self.info.name

    @property
    def is_routed_expert(self) -> bool:
        """Whether it is a matrix of a routed expert, in the main stack or in a draft stage."""
        return is_expert_matrix(self.name)

    @property
    def is_draft(self) -> bool:
        """Whether it belongs to a draft stage."""
        return is_draft(self.name)

    @property
    def is_wo_a(self) -> bool:
        """Whether it is the grouped output projection, which some engines want in BF16."""
        return is_wo_a(self.name)

    @property
    def logical_shape(self) -> tuple[int, ...]:
        """Shape in elements: two FP4 elements share a byte of an I8 tensor; the dtype F4 already counts elements."""
        return _logical_shape(self.info) if self.format is Format.FP4 else self.info.shape

    @property
    def stored(self) -> str:
        """fp4, fp8, bf16, or the dtype of any other tensor, for messages."""
        if self.format is Format.PLAIN:
            return "bf16" if self.info.dtype == "BF16" else self.info.dtype
        return str(self.format.value)


def _logical_shape(info: TensorInfo) -> tuple[int, ...]:
    return info.shape if info.dtype == "F4" or not info.shape else (*info.shape[:-1], 2 * info.shape[-1])


@lru_cache(maxsize=KINDS)
def _fit(scale: tuple[int, ...], shape: tuple[int, ...], block: Block) -> bool:
    return len(shape) == 2 and scale == scale_shape(shape, block)


def _as_e8m0(scale: TensorInfo) -> TensorInfo:
    return scale._replace(dtype=_E8M0) if scale.dtype == "U8" else scale


def _scale_fault(weight: Weight, dtypes: tuple[str, ...]) -> Fault:
    """The fault in dtype or shape of a scale that is not right."""
    scale, block, shape = weight.scale, weight.block, weight.logical_shape
    assert scale is not None and block is not None
    if len(shape) != 2:
        return Fault(weight.name, f"shape {list(weight.info.shape)}; a quantized weight has two dimensions")
    if scale.dtype not in dtypes:
        return Fault(scale.name, f"block scale of dtype {scale.dtype}; {' or '.join(dtypes)} expected")
    text = f"block scale of shape {list(scale.shape)}; {list(scale_shape(shape, block))} expected"
    return Fault(scale.name, f"{text}, one per {block.rows} x {block.columns} of a weight {list(shape)}")


def _fp8(info: TensorInfo, scale: TensorInfo, config: Config) -> Weight:
    declared = block_by_name(info.name, config) or weight_block(config)
    blocks = [Block(*declared)] if declared else list(RELEASED_BLOCKS)
    block = next((block for block in blocks if _fit(scale.shape, info.shape, block)), blocks[0])
    scale, dtypes = _as_e8m0(scale), (_E8M0, "F32")
    weight = Weight(info, Format.FP8, scale, block)
    if scale.dtype in dtypes and _fit(scale.shape, info.shape, block):
        return weight
    return weight._replace(fault=_scale_fault(weight, dtypes))


def _fp4(info: TensorInfo, scale: TensorInfo) -> Weight:
    scale = _as_e8m0(scale)
    weight = Weight(info, Format.FP4, scale, FP4_BLOCK)
    if scale.dtype == _E8M0 and _fit(scale.shape, _logical_shape(info), FP4_BLOCK):
        return weight
    return weight._replace(fault=_scale_fault(weight, (_E8M0,)))


def _without_scale(info: TensorInfo) -> Weight:
    """A tensor without a scale: plain, or a fault if its dtype and name require one."""
    fp4 = info.dtype in _FP4_DTYPES and is_expert_matrix(info.name)
    if not info.name.endswith(WEIGHT_SUFFIX) or not (fp4 or info.dtype == _FP8_DTYPE):
        return Weight(info, Format.PLAIN)
    hint = f"'{scale_name(info.name)}' is missing: the checkpoint is incomplete, download it again."
    fault = Fault(info.name, f"{info.dtype} weight without a block scale", hint)
    return Weight(info, Format.FP4 if fp4 else Format.FP8, fault=fault)


def _weight(info: TensorInfo, scale: TensorInfo | None, config: Config) -> Weight:
    if scale is None:
        return _without_scale(info)
    if info.dtype in _FP4_DTYPES:
        return _fp4(info, scale)
    if info.dtype == _FP8_DTYPE:
        return _fp8(info, scale, config)
    if info.dtype == "U8" and _fit(scale.shape, _logical_shape(info), FP4_BLOCK):
        return _fp4(info._replace(dtype="I8"), scale)
    return Weight(info, Format.PLAIN, scale)


def _with_two_scales(weight: Weight, second: TensorInfo) -> Weight:
    assert weight.scale is not None
    names = " and ".join(scale.name.rpartition(".")[2] for scale in (weight.scale, second))
    return weight._replace(fault=Fault(weight.name, f"two scales, {names}"))


def find_weights(tensors: Mapping[str, TensorInfo], config: Config) -> dict[str, Weight]:
    """Every tensor that is not the scale of another, by name, in the order of `tensors`."""
    scales: dict[str, TensorInfo] = {}  # of each weight the first
    second: dict[str, TensorInfo] = {}
    owned: set[str] = set()
    for suffix in SCALE_SUFFIXES:
        for name in tensors:
            if name.endswith(suffix) and (weight := name[: -len(suffix)] + WEIGHT_SUFFIX) in tensors:
                (second if weight in scales else scales)[weight] = tensors[name]
                owned.add(name)
    found = {name: _weight(info, scales.get(name), config) for name, info in tensors.items() if name not in owned}
    return found | {name: _with_two_scales(found[name], scale) for name, scale in second.items()}


@dataclass(slots=True)
class Alike:
    """Tensors that differ only in the number of their expert, so that one stands for all: V4-Pro has 2640 of 145116.

    info: the first. weight: of the first, too; None for the scale of another tensor. experts: the number of each in the
    order of the tensors, "" outside of experts.
    """

    info: TensorInfo
    weight: Weight | None
    experts: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name of the first."""
        return self.info.name

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.experts)

    @property
    def numbers(self) -> set[int]:
        """The numbers of the experts."""
        return {int(number) for number in self.experts if number}


def _stored_as(weight: Weight) -> tuple[Any, ...]:
    """What a weight's tensor does not say of how it is stored."""
    scale = weight.scale
    return weight.format.name, scale and (scale.dtype, scale.shape), weight.fault is None


def find_alike(tensors: Mapping[str, TensorInfo], weights: Mapping[str, Weight]) -> list[Alike]:
    """All tensors, those that are alike together, in the order of the first of each. weights: from `find_weights`."""
    found: dict[tuple[Any, ...], Alike] = {}
    for name, info in tensors.items():
        module, inner, number = without_expert(name)
        weight = weights.get(name)
        key = module, inner, info.dtype, info.shape, info.released_dtype, weight and _stored_as(weight)
        one = found.get(key)
        if one is None:
            one = found[key] = Alike(info, weight)
        one.experts.append(number)
    return list(found.values())


class ExpertFormats(NamedTuple):
    """The `Weight.stored` values of the routed experts' matrices: in the main stack, in draft stages."""

    main: frozenset[str]
    drafts: frozenset[str]

    @property
    def every(self) -> frozenset[str]:
        """The formats of both."""
        return self.main | self.drafts

    @property
    def drafts_differ(self) -> bool:
        """Whether the draft stages have one format and the main stack has one other."""
        return len(self.main) == len(self.drafts) == 1 and self.main != self.drafts


def expert_formats(weights: Iterable[Weight]) -> ExpertFormats:
    """The formats of all routed experts among the weights."""
    experts = [weight for weight in weights if weight.is_routed_expert]
    return ExpertFormats(*(frozenset(w.stored for w in experts if w.is_draft is drafts) for drafts in (False, True)))
