"""`--to nvfp4`: FP4 experts as NVIDIA's ModelOpt stores NVFP4. Everything else stays as it is, draft blocks too.

    X.weight          U8       [out, in/2]   the release's bytes
    X.weight_scale    F8_E4M3  [out, in/16]  each E8M0 scale 2^k twice, as 2^(k - m)
    X.weight_scale_2  F32      []            2^m, the same for w1 and w3 of an expert, which engines compute as one
    X.input_scale     F32      []            from --input-scale

A value is code * weight_scale * weight_scale_2. E4M3 has the powers 2^-9 to 2^8: with m = largest k - 8 the form is
exact where the exponents of an expert span at most 17. A group of zeros only may have any scale, and does not count
where the others need the room.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsv4 import quant
from dsv4.convert.checkpoint.forms.nvfp4 import (
    CONFIG_FILE,
    INPUT_SUFFIX,
    LARGEST,
    SCALE_SUFFIX,
    SECOND_SUFFIX,
    SMALLEST,
    file_config,
    quantization_of,
)
from dsv4.convert.checkpoint.names import WEIGHT_SUFFIX, expert_of
from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.checkpoint.weights import Format, Weight
from dsv4.convert.plan.container import SAFETENSORS
from dsv4.convert.plan.input_scale import InputScale
from dsv4.convert.plan.settings import Settings
from dsv4.convert.plan.shards import OutputShard, fill_shards
from dsv4.errors import InputError
from dsv4.quant.blocks import GROUP_SIZE
from dsv4.text import counted

from .copy import kept
from .recipe import Array, Counts, OutputTensor, Piece, PieceResult, Recipe, Scan, with_error
from .rows import check_scale, read_rows

SPAN = LARGEST - SMALLEST
LEAST_SECOND = -126  # the smallest normal exponent of float32
TWINS = {"w1.weight": "w3.weight", "w3.weight": "w1.weight"}


def _exponents(checkpoint: Checkpoint, weight: Weight) -> Array:
    """k of every group of 32: int16 [rows, columns / 32]. Raises InputError for NaN."""
    assert weight.scale is not None
    raw = read_rows(checkpoint, weight.scale, 0, weight.scale.shape[0])
    check_scale(raw, weight.scale)
    return raw.astype(np.int16) - quant.e8m0.BIAS


def _is_zero(checkpoint: Checkpoint, weight: Weight) -> Array:
    """Which groups have zeros only: bool [rows, columns / 32]."""
    packed = read_rows(checkpoint, weight.info, 0, weight.info.shape[0])
    magnitudes = packed & 0b0_111_0_111
    zero: Array = np.logical_not(magnitudes.reshape(len(packed), -1, 16).any(axis=2))
    return zero


@dataclass(frozen=True)
class _OfMatrix(Recipe):
    """A tensor of one matrix. members: the matrices that share an m, this one first."""

    members: tuple[Weight, ...]

    def takes(self, weight: Weight) -> bool:
        """None by itself: ToNvfp4 makes it."""
        return False

    def outputs(self, weight: Weight, settings: Settings, config: dict[str, Any]) -> list[OutputTensor]:
        """None by itself."""
        raise NotImplementedError("ToNvfp4 makes it")

    def second(self, checkpoint: Checkpoint) -> int:
        """m: of all groups if they span at most SPAN, else of those that are not zero."""
        exponents = [_exponents(checkpoint, weight) for weight in self.members]
        largest, smallest = max(int(e.max()) for e in exponents), min(int(e.min()) for e in exponents)
        if largest - smallest > SPAN:
            some = [e[~_is_zero(checkpoint, weight)] for e, weight in zip(exponents, self.members, strict=True)]
            largest = max((int(e.max()) for e in some if e.size), default=0)
        return max(largest - LARGEST, LEAST_SECOND)


class _Codes(_OfMatrix):
    """The codes: bytes as they are, or rounded under --on-inexact round."""

    def scan(self, checkpoint: Checkpoint, piece: Piece) -> Scan:
        """Count the elements of some rows that change."""
        exponents = _exponents(checkpoint, self.members[0])[piece.start : piece.stop] - self.second(checkpoint)
        if exponents.min(initial=0) >= SMALLEST:
            return Scan()
        return Scan(self._rounded(checkpoint, piece).counts)

    def describe_inexact(self, checkpoint: Checkpoint, tensor: OutputTensor, scan: Scan) -> str:
        """The span of the exponents, and the number of elements that change."""
        some = [_exponents(checkpoint, w)[~_is_zero(checkpoint, w)] for w in self.members]
        span = max(int(e.max()) for e in some if e.size) - min(int(e.min()) for e in some if e.size)
        others = [weight.name for weight in self.members if weight.name != tensor.weight.name]
        shared = f"scale exponents, with those of {others[0]}," if others else "scale exponents"
        return f"{shared} span {span}, NVFP4 has room for {SPAN}: {counted(scan.counts.changed, 'element')} changed"

    def _rounded(self, checkpoint: Checkpoint, piece: Piece) -> PieceResult:
        """Groups below the smallest scale get that, and the nearest codes."""
        import torch

        weight = self.members[0]
        packed = read_rows(checkpoint, weight.info, piece.start, piece.stop)
        exponents = _exponents(checkpoint, weight)[piece.start : piece.stop] - self.second(checkpoint)
        below = np.minimum(exponents - SMALLEST, 0).repeat(GROUP_SIZE, axis=1)
        exact = quant.e2m1.decode(quant.e2m1.unpack(torch.from_numpy(packed))).double()
        scaled = torch.ldexp(exact, torch.from_numpy(below))
        codes = quant.e2m1.encode(scaled.float())
        error = quant.e2m1.decode(codes).double() - scaled
        unit = torch.ldexp(torch.ones((), dtype=torch.float64), torch.tensor(self.second(checkpoint) + SMALLEST))
        codes = torch.where(torch.from_numpy(below < 0), codes, quant.e2m1.unpack(torch.from_numpy(packed)))
        counts = Counts(
            changed=int(torch.count_nonzero(error)), squared_error=float((error**2).sum() * unit**2),
            squared_value=float((scaled**2).sum() * unit**2), max_error=float(error.abs().max() * unit),
        )  # fmt: skip
        return PieceResult(quant.e2m1.pack(codes).numpy(), counts)

    def compute(self, checkpoint: Checkpoint, piece: Piece, scan: Scan | None) -> PieceResult:
        """Some rows."""
        assert scan is not None
        if not scan.is_exact:
            return self._rounded(checkpoint, piece)
        return PieceResult(read_rows(checkpoint, self.members[0].info, piece.start, piece.stop))

    def entry(self, tensor: OutputTensor, counts: Counts, scan: Scan | None) -> dict[str, Any]:
        """The error, where elements changed."""
        return with_error(super().entry(tensor, counts, scan), counts)


def _powers() -> Array:
    """E4M3 codes of 2^SMALLEST .. 2^LARGEST."""
    import torch

    values = torch.ldexp(torch.ones(SPAN + 1), torch.arange(SMALLEST, LARGEST + 1))
    return quant.e4m3.encode(values).numpy()


class _GroupScales(_OfMatrix):
    """The scales of 16 elements."""

    def compute(self, checkpoint: Checkpoint, piece: Piece, scan: Scan | None) -> PieceResult:
        """Some rows."""
        exponents = _exponents(checkpoint, self.members[0])[piece.start : piece.stop] - self.second(checkpoint)
        codes = _powers()[np.clip(exponents, SMALLEST, LARGEST) - SMALLEST]
        return PieceResult(codes.repeat(2, axis=1))


class _SecondScale(_OfMatrix):
    """2^m."""

    def compute(self, checkpoint: Checkpoint, piece: Piece, scan: Scan | None) -> PieceResult:
        """The number."""
        return PieceResult(np.array([2.0 ** self.second(checkpoint)], np.float32))


@dataclass(frozen=True)
class _InputScale(_OfMatrix):
    """The number that the user gave."""

    number: float

    def compute(self, checkpoint: Checkpoint, piece: Piece, scan: Scan | None) -> PieceResult:
        """The number."""
        return PieceResult(np.array([self.number], np.float32))


def _members(weight: Weight, weights: dict[str, Weight]) -> tuple[Weight, ...]:
    """The weight and the one with which it shares an m. Raises InputError if that is missing."""
    expert = expert_of(weight.name)
    assert expert is not None
    if expert.inner not in TWINS:
        return (weight,)
    name = weight.name.removesuffix(expert.inner) + TWINS[expert.inner]
    if name not in weights or weights[name].format is not Format.FP4:
        raise InputError(f"'{name}' is missing or not FP4: w1 and w3 of an expert share a scale in NVFP4")
    return weight, weights[name]


def _tensors(members: tuple[Weight, ...], given: InputScale) -> list[OutputTensor]:
    """The four tensors of a matrix."""
    weight = members[0]
    (rows, columns), scale = weight.logical_shape, weight.scale
    assert scale is not None
    if columns % GROUP_SIZE:
        raise InputError(f"'{weight.name}' has {columns} columns, which are not groups of {GROUP_SIZE}")
    stem = weight.name.removesuffix(WEIGHT_SUFFIX)
    scales = tuple(member.scale for member in members if member.scale is not None)
    number = given.of(stem + INPUT_SUFFIX)
    return [
        OutputTensor(
            weight.name, "U8", (rows, columns // 2), _Codes(members), weight, (weight.info, *scales), Format.FP4,
            scanned=True,
        ),
        OutputTensor(
            stem + SCALE_SUFFIX, "F8_E4M3", (rows, columns // 16), _GroupScales(members), weight, scales, is_scale=True
        ),
        OutputTensor(stem + SECOND_SUFFIX, "F32", (), _SecondScale(members), weight, scales, is_scale=True),
        OutputTensor(stem + INPUT_SUFFIX, "F32", (), _InputScale(members, number), weight, scales, is_scale=True),
    ]  # fmt: skip


class ToNvfp4(Recipe):
    """Routed experts of the main layers to NVFP4; every other tensor as it is."""

    cast_format = Format.FP4

    def takes(self, weight: Weight) -> bool:
        """FP4 matrices of experts, but for those of draft blocks, which ModelOpt leaves."""
        return weight.is_routed_expert and weight.format is Format.FP4 and not weight.is_draft

    def outputs(self, weight: Weight, settings: Settings, config: dict[str, Any]) -> list[OutputTensor]:
        """Of a weight that stays as it is."""
        return kept(weight)

    def compute(self, checkpoint: Checkpoint, piece: Piece, scan: Scan | None) -> PieceResult:
        """Its tensors have recipes of their own."""
        raise NotImplementedError

    def _groups(
        self, weights: list[Weight], settings: Settings, config: dict[str, Any]
    ) -> Iterator[list[OutputTensor]]:
        by_name = {weight.name: weight for weight in weights}
        assert settings.input_scale is not None
        for weight in weights:
            if weight.is_routed_expert and weight.format is Format.FP8 and not weight.is_draft:
                hint = "FP8 experts go back to FP4 with --to fp4, where that is exact."
                raise InputError(f"'{weight.name}' is fp8; NVFP4 is made of FP4 experts", hint)
            if self.takes(weight):
                yield _tensors(_members(weight, by_name), settings.input_scale)
            else:
                yield self.outputs(weight, settings, config)

    def shards(
        self, weights: list[Weight], settings: Settings, checkpoint: Checkpoint
    ) -> tuple[list[OutputShard], list[str]]:
        """The shards of one folder."""
        groups = list(fill_shards(self._groups(weights, settings, checkpoint.released), settings))
        names = (SAFETENSORS.file_name(number, len(groups)) for number in range(1, len(groups) + 1))
        return [OutputShard.of(n, group, SAFETENSORS) for n, group in zip(names, groups, strict=True)], []

    def describe_storage(self, config: dict[str, Any], tensors: Sequence[OutputTensor]) -> dict[str, Any]:
        """The release's `quantization_config`, and beside its keys those that name the experts."""
        experts = (expert_of(t.name) for t in tensors if isinstance(t.recipe, _Codes))
        modules = dict.fromkeys(f"{expert.module}.experts" for expert in experts if expert is not None)
        inner = {"quant_method": "fp8", **config.get("quantization_config", {})}
        return {**config, "quantization_config": {**inner, **quantization_of(list(modules))}}

    def side_files(self, config: dict[str, Any]) -> dict[str, bytes]:
        """hf_quant_config.json, in which ModelOpt says the same as in config.json."""
        content = json.dumps(file_config(config["quantization_config"]), indent=2, ensure_ascii=False) + "\n"
        return {CONFIG_FILE: content.encode()}


RECIPE = ToNvfp4()
