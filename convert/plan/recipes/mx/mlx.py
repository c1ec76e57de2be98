"""`--to mlx`: FP4 and FP8 weights as MLX stores them, modes `mxfp4` and `mxfp8`.

MLX packs codes into 32-bit words in the order of the release's bytes, so no code moves: experts keep their bytes, FP8
weights too, with each block's scale repeated. The matrices of all experts of a layer become one tensor.

mlx-lm reads every file whose name begins with `model`, and stops at a tensor that its text model does not have. Draft
blocks, vision and n-gram tables are therefore in files of their own, which the index names and mlx-lm does not open.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsv4.convert.checkpoint.forms.mlx import QUANTIZATION, RELEASED_KEY, SCALE_SUFFIX, WORD, quantization_of
from dsv4.convert.checkpoint.forms.mlx_names import KEPT, mlx_name
from dsv4.convert.checkpoint.names import WEIGHT_SUFFIX, expert_of, is_wo_a, scale_name
from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.checkpoint.weights import Format, Weight
from dsv4.convert.plan.container import SAFETENSORS
from dsv4.convert.plan.recipes.copy import kept
from dsv4.convert.plan.recipes.recipe import Counts, Joining, OutputTensor, Piece, PieceResult, Recipe, Scan
from dsv4.convert.plan.settings import Settings
from dsv4.convert.plan.shards import OutputShard, fill_shards
from dsv4.errors import InputError

from .mxfp4 import RECIPE as MXFP4

BESIDE = "beside-model"  # begins the names of the files that mlx-lm does not open
BESIDE_NAMES = re.compile(rf"{KEPT.pattern}|.*\.engram\..*|.*\.gate\.bias_vl")
BITS = {Format.FP4: 4, Format.FP8: 8}
Group = list[OutputTensor]


@dataclass(frozen=True)
class Folded(Recipe):
    """Matrices one after the other, as one tensor with another first dimension: experts, or groups of rows of one."""

    parts: tuple[OutputTensor, ...]

    def takes(self, weight: Weight) -> bool:
        """None by itself: `_folded` makes the tensor."""
        return False

    def outputs(self, weight: Weight, settings: Settings, config: dict[str, Any]) -> list[OutputTensor]:
        """None by itself."""
        raise NotImplementedError("the parts are computed")

    def _pieces(self, piece: Piece) -> Iterator[Piece]:
        """The pieces of the parts that a piece consists of."""
        if len(self.parts) > 1:
            yield from (Piece(part, 0, part.rows) for part in self.parts[piece.start : piece.stop])
            return
        rows = self.parts[0].rows // piece.tensor.rows
        yield Piece(self.parts[0], piece.start * rows, piece.stop * rows)

    def scan(self, checkpoint: Checkpoint, piece: Piece) -> Scan:
        """Each of the parts."""
        counts = Counts()
        for one in self._pieces(piece):
            counts.add(one.tensor.recipe.scan(checkpoint, one).counts)
        return Scan(counts)

    def describe_inexact(self, checkpoint: Checkpoint, tensor: OutputTensor, scan: Scan) -> str:
        """As for one part."""
        return self.parts[0].recipe.describe_inexact(checkpoint, self.parts[0], scan)

    def compute(self, checkpoint: Checkpoint, piece: Piece, scan: Scan | None) -> PieceResult:
        """The bytes of some parts, or of some rows of one."""
        found = [one.tensor.recipe.compute(checkpoint, one, scan) for one in self._pieces(piece)]
        counts = Counts()
        for result in found:
            counts.add(result.counts)
        return PieceResult(np.concatenate([result.data for result in found]), counts)

    def entry(self, tensor: OutputTensor, counts: Counts, scan: Scan | None) -> dict[str, Any]:
        """As for one part."""
        return self.parts[0].recipe.entry(self.parts[0], counts, scan)


def _words(part: OutputTensor) -> tuple[str, tuple[int, ...]]:
    """Dtype and shape of a matrix in MLX: codes are words."""
    if part.is_scale or part.format is Format.PLAIN:
        return part.dtype, part.shape
    return "U32", (part.shape[0], part.nbytes // part.shape[0] // WORD)


def _folded(parts: Sequence[OutputTensor], name: str, first: int | None) -> OutputTensor:
    """Matrices of one kind as one tensor of MLX. first: the size of its first dimension, None where it stays one."""
    part, (dtype, shape) = parts[0], _words(parts[0])
    if first is None:
        return part._replace(name=name, dtype=dtype, shape=shape)
    rows = shape[0] * len(parts)
    shape = first, rows // first, *shape[1:]
    if len(parts) == 1 and part.bytewise:
        return part._replace(name=name, dtype=dtype, shape=shape)
    by_rows = tuple(one._replace(bytewise=False) for one in parts)
    unit = part.row_unit // math.gcd(part.row_unit, shape[1]) if len(parts) == 1 else 1
    reads = tuple(info for one in parts for info in one.reads)
    return part._replace(
        name=name, dtype=dtype, shape=shape, recipe=Folded(by_rows), reads=reads, bytewise=False, row_unit=unit
    )


class _Blocks:
    """The groups of tensors that some weights become; a stack is one group, in the place of its first."""

    def __init__(self, weights: Iterable[Weight], settings: Settings, config: dict[str, Any]) -> None:
        self._settings, self._config = settings, config
        self._weights = {weight.name: weight for weight in weights}
        self._done: set[str] = set()
        self._counts: dict[str, int] = {}  # module -> experts, as the names say
        for expert in filter(None, map(expert_of, self._weights)):
            self._counts[expert.module] = max(self._counts.get(expert.module, 0), expert.number + 1)

    def _experts(self, weight: Weight) -> list[Weight]:
        """The same matrix of every expert. Raises InputError naming one that is missing or differs."""
        expert = expert_of(weight.name)
        assert expert is not None
        count = self._counts[expert.module] if weight.is_draft else self._config["n_routed_experts"]
        names = [f"{expert.module}.experts.{number}.{expert.inner}" for number in range(count)]
        for name in names:
            found = self._weights.get(name)
            if found is None:
                raise InputError(f"'{name}' is missing: a stack needs all {len(names)} experts")
            if (found.stored, found.logical_shape) != (weight.stored, weight.logical_shape):
                raise InputError(
                    f"'{name}' is {found.stored} {list(found.logical_shape)}; "
                    f"{weight.stored} {list(weight.logical_shape)} expected: experts are stacked"
                )
        if weight.name not in names:
            raise InputError(f"'{weight.name}': config.json says n_routed_experts {len(names)}")
        self._done.update(names)
        return [self._weights[name] for name in names]

    def _parts(self, weight: Weight) -> list[OutputTensor]:
        if weight.format is Format.PLAIN:
            return kept(weight)
        return MXFP4.outputs(weight, self._settings, self._config)

    def _group(self, weight: Weight) -> Group:
        members, first = [weight], None
        if weight.is_routed_expert:
            members = self._experts(weight)
            first = len(members)
        elif is_wo_a(weight.name) and len(weight.logical_shape) == 2:
            first = self._config["o_groups"]
            if weight.logical_shape[0] % first:
                raise InputError(f"'{weight.name}' has {weight.logical_shape[0]} rows, which are not {first} groups")
        name = mlx_name(weight.name)
        plain = weight.format is Format.PLAIN
        names = name, scale_name(name) if plain else name.removesuffix(WEIGHT_SUFFIX) + SCALE_SUFFIX
        kinds = zip(*map(self._parts, members), strict=True)
        return [_folded(parts, new, first) for parts, new in zip(kinds, names, strict=False)]

    def groups(self) -> Iterator[Group]:
        """One group for each weight of MLX, with its scales."""
        for weight in self._weights.values():
            if weight.name not in self._done:
                yield self._group(weight)


def _is_beside(weight: Weight) -> bool:
    """Whether mlx-lm's text model does not have it."""
    return weight.is_draft or BESIDE_NAMES.fullmatch(weight.name) is not None


def _check_names(shards: Iterable[OutputShard]) -> None:
    """Raises InputError if two weights would get one name."""
    seen: dict[str, str] = {}
    for tensor in (tensor for shard in shards for tensor in shard.tensors):
        twin = seen.setdefault(tensor.name, tensor.source.name)
        if twin != tensor.source.name:
            raise InputError(f"'{twin}' and '{tensor.source.name}' are both '{tensor.name}' in MLX", "Remove one.")


class ToMlx(Joining):
    """MXFP4 and MXFP8 of MLX."""

    alone = MXFP4

    def shards(
        self, weights: list[Weight], settings: Settings, checkpoint: Checkpoint
    ) -> tuple[list[OutputShard], list[str]]:
        """The files of mlx-lm's text model, and those of everything else. Raises InputError naming a tensor or key."""
        config = checkpoint.released
        for key in ("n_routed_experts", "o_groups"):
            if type(config.get(key)) is not int or config[key] < 1:
                raise InputError(f"config.json: {key} is {config.get(key)!r}; a count expected")

        def files(some: list[Weight], stem: str) -> list[OutputShard]:
            groups = list(fill_shards(_Blocks(some, settings, config).groups(), settings))
            names = (SAFETENSORS.file_name(i, len(groups)).replace("model", stem) for i in range(1, len(groups) + 1))
            return [OutputShard.of(name, group, SAFETENSORS) for name, group in zip(names, groups, strict=True)]

        beside = [weight for weight in weights if _is_beside(weight)]
        found = files([weight for weight in weights if not _is_beside(weight)], "model") + files(beside, BESIDE)
        _check_names(found)
        notes = [f"{len(beside)} tensors that mlx-lm's text model does not have are in {BESIDE}-*.safetensors"]
        return found, notes if beside else []

    def describe_storage(self, config: dict[str, Any], tensors: Sequence[OutputTensor]) -> dict[str, Any]:
        """`quantization`: the experts' mode, and of every other module its own."""
        bits = {
            t.name.removesuffix(WEIGHT_SUFFIX): BITS[t.format]
            for t in tensors
            if not t.is_scale and t.format is not Format.PLAIN
        }
        usual = min(bits.values(), default=BITS[Format.FP8])
        modules = {module: quantization_of(some) for module, some in bits.items() if some != usual}
        keys = ("quantization_config", "expert_dtype")
        released = {key: config[key] for key in keys if key in config}
        edited = {key: value for key, value in config.items() if key != "quantization_config"}
        return {**edited, QUANTIZATION: {**quantization_of(usual), **modules}, RELEASED_KEY: released}


RECIPE = ToMlx()
