"""Output shards: which tensors go into which file, for each layout.

`hf`: one folder of shards. They are filled up to a limit in the order of the source, so that a source that is fetched
shard by shard is read in order. `mp`: one file for each rank of the reference engine, with its share of the experts,
its slices of the tensor parallel weights, and a copy of everything else.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

from dsv4.convert.checkpoint.names import rank_file_name
from dsv4.convert.checkpoint.rank_layout import check_blocks, count_experts, mp_name, mp_slice, rank_of_expert, skipped
from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.checkpoint.weights import Format, Weight
from dsv4.convert.plan.recipes.copy import kept
from dsv4.convert.plan.recipes.recipe import OutputTensor
from dsv4.convert.plan.recipes.registry import outputs_of
from dsv4.errors import InputError

from .container import Container
from .engines import Layout
from .settings import DEFAULT_MAX_SHARD_BYTES, Settings

# At the default size limit a shard reads at most two source shards: a source that is fetched shard by shard then needs
# disk for two.
MAX_SOURCE_SHARDS = 2
# Characters of recorded scales (forms/recorded_scales.py) in the manifest: one for so many bytes of a shard, and some
# for a small one. Of weights that a release rounded itself, routed experts need a tenth of that, blocks of 128 x 128 a
# sixth, and blocks of 32 x 32 twice as much: those lie beside many experts.
SHARD_BYTES_FOR_RECORD, LEAST_RECORD = 2**15, 2**16


@dataclass(frozen=True)
class OutputShard:
    """One output file: its tensors in data order."""

    file: str
    tensors: tuple[OutputTensor, ...]
    container: Container

    @classmethod
    def of(cls, file: str, tensors: Iterable[OutputTensor], container: Container) -> "OutputShard":
        """A shard of these tensors, in the container's order."""
        return cls(file, tuple(sorted(tensors, key=lambda t: container.order(t.dtype, t.name))), container)

    @property
    def header(self) -> bytes:
        """The bytes before the data. Made when it is asked for: a plan does not hold those of all shards."""
        return self.container.header({t.name: (t.dtype, t.shape) for t in self.tensors})

    @cached_property
    def data_bytes(self) -> int:
        """Bytes of data, padding included."""
        return sum(t.nbytes + self.container.padding(t.nbytes) for t in self.tensors)

    @cached_property
    def record_limit(self) -> int:
        """Most characters of recorded scales in the manifest's entries of its tensors."""
        drops = any(t.recipe.drops_scales for t in self.tensors)
        return max(LEAST_RECORD, self.data_bytes // SHARD_BYTES_FOR_RECORD) if drops else 0

    @cached_property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header) + self.data_bytes

    @cached_property
    def source_shards(self) -> tuple[str, ...]:
        """The source shards that this one is made from, sorted."""
        return tuple(sorted({info.shard for t in self.tensors for info in t.reads}))

    def keeping(self, names: set[str], layout: Layout) -> "OutputShard":
        """The shard with the weights in `names` (of the source) and their scales as the source has them."""
        others = [t for t in self.tensors if t.weight.name not in names]
        replaced = {t.weight.name: t for t in self.tensors if t.weight.name in names}
        back = [tensor for output in replaced.values() for tensor in _kept_instead_of(output, layout)]
        return OutputShard.of(self.file, [*others, *back], self.container)


@runtime_checkable
class Joins(Protocol):
    """A recipe that joins weights, or writes another container: it says itself what the shards are."""

    def shards(
        self, weights: list[Weight], settings: Settings, checkpoint: Checkpoint
    ) -> tuple[list[OutputShard], list[str]]:
        """The shards, and what a user should know. weights: in the order of the source. Raises InputError."""
        ...


def fill_shards(groups: Iterable[list[OutputTensor]], settings: Settings) -> Iterator[list[OutputTensor]]:
    """Tensors of each shard, filled up to the limit; those of a group stay together."""
    shard: list[OutputTensor] = []
    filled, sources = 0, set[str]()
    merges = settings.max_shard_bytes > DEFAULT_MAX_SHARD_BYTES
    for group in groups:
        size = sum(o.nbytes for o in group)
        needs = {info.shard for o in group for info in o.reads}
        crowded = not (merges or needs <= sources) and len(sources | needs) > MAX_SOURCE_SHARDS
        if shard and (filled + size > settings.max_shard_bytes or crowded):
            yield shard
            shard, filled, sources = [], 0, set()
        shard += group
        filled += size
        sources |= needs
    if shard:
        yield shard


def hf_shards(
    weights: list[Weight], settings: Settings, config: dict[str, Any], container: Container
) -> list[OutputShard]:
    """The shards of one folder, weight and scale together. weights: in the order of the source."""
    groups = list(fill_shards((outputs_of(weight, settings, config) for weight in weights), settings))
    return [OutputShard.of(container.file_name(i, len(groups)), group, container) for i, group in enumerate(groups, 1)]


def _rank_tensor(output: OutputTensor, rank: int, ranks: int) -> OutputTensor:
    """One rank's slice of a tensor, under the reference engine's name and dtype tag."""
    cut = mp_slice(output.name, output.shape, rank, ranks)
    packed = output.format is Format.FP4
    dtype = "F4" if packed else output.dtype
    shape = output.weight.logical_shape if packed else output.shape
    if cut is not None:
        if (block := output.weight.block or output.block) is not None:
            check_blocks(output.weight.name, output.weight.logical_shape, cut, block)
        shape = cut.apply_to(shape)
    return output._replace(name=mp_name(output.name), dtype=dtype, shape=shape, rank_slice=cut)


def _kept_instead_of(output: OutputTensor, layout: Layout) -> list[OutputTensor]:
    """The source tensors of a weight unchanged, under the layout's names and dtype tags, cut to the same slice."""
    if layout == "hf":
        return kept(output.weight)
    rank, ranks = (output.rank_slice.index, output.rank_slice.count) if output.rank_slice else (0, 1)
    return [_rank_tensor(tensor, rank, ranks) for tensor in kept(output.weight)]


def _check_names(outputs: list[OutputTensor]) -> None:
    """Raises InputError if two tensors would get one name, such as `model.norm.weight` and `norm.weight`."""
    seen: dict[str, str] = {}
    for output in outputs:
        twin = seen.setdefault(mp_name(output.name), output.name)
        if twin != output.name:
            raise InputError(
                f"'{twin}' and '{output.name}' are one name in the reference engine's layout",
                "Remove one of them, or use --layout hf.",
            )


def rank_shards(
    weights: list[Weight], settings: Settings, config: dict[str, Any], container: Container
) -> list[OutputShard]:
    """One file for each rank of the reference engine."""
    ranks = settings.model_parallel
    outputs = [o for w in weights for o in outputs_of(w, settings, config) if not skipped(o.name)]
    _check_names(outputs)
    experts = count_experts([o.name for o in outputs])
    by_rank: list[list[OutputTensor]] = [[] for _ in range(ranks)]
    for output in outputs:
        owner = rank_of_expert(output.name, experts, ranks)
        for rank in range(ranks) if owner is None else (owner,):
            by_rank[rank].append(_rank_tensor(output, rank, ranks))
    return [OutputShard.of(rank_file_name(rank, ranks), tensors, container) for rank, tensors in enumerate(by_rank)]
