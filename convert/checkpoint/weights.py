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
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import NamedTuple

from dsv4.quant.blocks import FP4_BLOCK, Block, scale_shape

from .config import Config, weight_block
from .editions.table import block_by_name
from .header import KINDS
from .names import WEIGHT_SUFFIX, is_draft, is_expert_matrix, is_wo_a, scale_name, scales_of
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


def _fits(scale: TensorInfo, shape: tuple[int, ...], block: Block) -> bool:
    return _fit(scale.shape, shape, block)


def _as_e8m0(scale: TensorInfo) -> TensorInfo:
    return scale._replace(dtype=_E8M0) if scale.dtype == "U8" else scale


def _scale_fault(weight: Weight, dtypes: tuple[str, ...]) -> Fault | None:
    """The fault in dtype or shape of a scale; None if it is right."""
    scale, block, shape = weight.scale, weight.block, weight.logical_shape
    assert scale is not None and block is not None
    if scale.dtype in dtypes and _fits(scale, shape, block):
        return None
    if len(shape) != 2:
        return Fault(weight.name, f"shape {list(weight.info.shape)}; a quantized weight has two dimensions")
    if scale.dtype not in dtypes:
        return Fault(scale.name, f"block scale of dtype {scale.dtype}; {' or '.join(dtypes)} expected")
    text = f"block scale of shape {list(scale.shape)}; {list(scale_shape(shape, block))} expected"
    return Fault(scale.name, f"{text}, one per {block.rows} x {block.columns} of a weight {list(shape)}")


def _checked(weight: Weight, dtypes: tuple[str, ...]) -> Weight:
    fault = _scale_fault(weight, dtypes)
    return weight if fault is None else weight._replace(fault=fault)


def _fp8(info: TensorInfo, scale: TensorInfo, config: Config) -> Weight:
    declared = block_by_name(info.name, config) or weight_block(config)
    blocks = [Block(*declared)] if declared else list(RELEASED_BLOCKS)
    block = next((block for block in blocks if _fits(scale, info.shape, block)), blocks[0])
    return _checked(Weight(info, Format.FP8, _as_e8m0(scale), block), (_E8M0, "F32"))


def _fp4(info: TensorInfo, scale: TensorInfo) -> Weight:
    return _checked(Weight(info, Format.FP4, _as_e8m0(scale), FP4_BLOCK), (_E8M0,))


def _without_scale(info: TensorInfo) -> Weight:
    """A tensor without a scale: plain, or a fault if its dtype and name require one."""
    fp4 = info.dtype in _FP4_DTYPES and is_expert_matrix(info.name)
    if not info.name.endswith(WEIGHT_SUFFIX) or not (fp4 or info.dtype == _FP8_DTYPE):
        return Weight(info, Format.PLAIN)
    hint = f"'{scale_name(info.name)}' is missing: the checkpoint is incomplete, download it again."
    fault = Fault(info.name, f"{info.dtype} weight without a block scale", hint)
    return Weight(info, Format.FP4 if fp4 else Format.FP8, fault=fault)


def _weight(info: TensorInfo, scales: list[TensorInfo], config: Config) -> Weight:
    if not scales:
        return _without_scale(info)
    scale = scales[0]
    if info.dtype in _FP4_DTYPES:
        weight = _fp4(info, scale)
    elif info.dtype == _FP8_DTYPE:
        weight = _fp8(info, scale, config)
    elif info.dtype == "U8" and _fits(scale, _logical_shape(info), FP4_BLOCK):
        weight = _fp4(info._replace(dtype="I8"), scale)
    else:
        weight = Weight(info, Format.PLAIN, scale)
    if len(scales) > 1:
        names = " and ".join(s.name.rpartition(".")[2] for s in scales)
        return weight._replace(fault=Fault(info.name, f"two scales, {names}"))
    return weight


def find_weights(tensors: Mapping[str, TensorInfo], config: Config) -> dict[str, Weight]:
    """Every tensor that is not the scale of another, by name, in the order of `tensors`."""
    weights = (name for name in tensors if name.endswith(WEIGHT_SUFFIX))
    scales = {name: found for name in weights if (found := scales_of(name, tensors))}
    owned = {scale.name for found in scales.values() for scale in found}
    return {name: _weight(tensors[name], scales.get(name, []), config) for name in tensors if name not in owned}


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
