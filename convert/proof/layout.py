"""The whole tensors of a checkpoint from any program, under the release's names.

These layouts and names are read on both sides of a comparison:

- Hugging Face folders with an index, with several shards and no index, or with a single `model.safetensors`;
- the reference engine's `model{i}-mp{N}.safetensors`, one file per rank: slices are joined along the axis that the
  engine slices, experts are collected from all ranks, copies are compared with each other;
- a leading `model.`, and `self_attn`, `mlp`, `weight_scale_inv`, `e_score_correction_bias`, which other tools write
  for `attn`, `ffn`, `scale`, `bias`;
- `weight_packed` and `weight_scale` of compressed-tensors, for `weight` and `scale`;
- the stacks and names of MLX.

These rules are written for `verify` alone and share nothing with the converter. Where files break a rule (a rank lacks
a tensor, an expert is in the wrong rank, two names mean the same tensor), the result has a `Problem`.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from dsv4.convert.proof.forms import mlx
from dsv4.errors import InputError
from dsv4.text import counted, some_of

from .files import INDEX_NAME, Entry, Files, Problem, Severity, Shard, read_shard, refuse_other_weights, shard_names
from .index import Ignored, Index, follow, read_index

RANK_FILE = re.compile(r"model(\d+)-mp(\d+)\.safetensors")
_PARTS = {"self_attn": "attn", "mlp": "ffn", "weight_scale_inv": "scale", "e_score_correction_bias": "bias",
          "weight_packed": "weight", "weight_scale": "scale"}  # fmt: skip
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.*)")
# Tensors of which each rank holds a slice. Scales are sliced as their weights are.
_SLICED_ROWS = re.compile(
    r"(embed|head)\.weight"
    r"|.*\.(attn|indexer)\.wq_b\.(weight|scale)"
    r"|.*\.attn\.(wo_a\.(weight|scale)|attn_sink)"
    r"|.*\.indexer\.weights_proj\.(weight|scale)"
    r"|.*\.markov_head\.(markov_w[12]|embed|head)\.weight"
    r"|.*\.engram\.embed\.(weight|scale)"
)
_SLICED_COLUMNS = re.compile(r".*\.attn\.wo_b\.(weight|scale)")


@dataclass(frozen=True, slots=True)
class Tensor:
    """A whole tensor: `slices` follow each other along `axis`; `copies` are further copies of the whole tensor.

    factor: of a scale, one more float32 for all of the matrix, which is multiplied, or `divides`. filling: bytes of the
    files that belong to the ranks' slices and not to the tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    axis: int
    slices: tuple[Entry, ...]
    copies: tuple[Entry, ...] = ()
    factor: Entry | None = None
    divides: bool = False
    filling: tuple[Entry, ...] = ()

    @property
    def size(self) -> int:
        """Bytes, without copies."""
        return sum(entry.size for entry in self.slices)

    @property
    def shards(self) -> set[str]:
        """Every file that holds bytes of it."""
        return {entry.shard for entry in (*self.slices, *self.copies, *self.filling, *filter(None, (self.factor,)))}


@dataclass
class Checkpoint:
    """One side of a comparison, as described by its headers."""

    where: str  # "source" or "output"
    files: Files
    layout: str = "hf"
    ranks: int = 1
    shards: list[str] = field(default_factory=list)
    headers_sha256: str = ""  # over names, sizes and header hashes of all shards
    tensors: dict[str, Tensor] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    ignored: Ignored = field(default_factory=Ignored)
    repacked: bool = False  # the tensors are not those of the files: stacks are taken apart, words are codes
    keys: dict[str, Any] = field(default_factory=dict)  # of GGUF files; those of drafts after "drafts "

    def problem(self, area: str, text: str, severity: Severity = "difference") -> None:
        """Record a fault, once."""
        problem = Problem(area, self.where, text, severity)
        if problem not in self.problems:
            self.problems.append(problem)


def canonical(name: str) -> str:
    """The release's name of a tensor: `model.layers.0.mlp.gate.weight` -> `layers.0.ffn.gate.weight`."""
    name = name.removeprefix("model.")
    if name.startswith(("vision.", "aligner.")):  # their own modules keep their own names, `mlp` among them
        return name
    return ".".join(_PARTS.get(part, part) for part in name.split("."))


def _some(names: Iterable[str], limit: int = 5) -> str:
    """A few of the names, and how many more."""
    return some_of(sorted(names), limit)


def _read_shards(
    checkpoint: Checkpoint, sizes: dict[str, int], names: list[str], on_header: Callable[[], None]
) -> dict[str, Shard]:
    shards = {}
    for name in names:
        shards[name] = read_shard(checkpoint.files, name, sizes[name])
        on_header()
    checkpoint.shards = names
    described = "\n".join(f"{name} {sizes[name]} {shard.header_sha256}" for name, shard in shards.items())
    checkpoint.headers_sha256 = hashlib.sha256(described.encode("utf-8", "surrogatepass")).hexdigest()
    return shards


def _report_shards(checkpoint: Checkpoint, shards: dict[str, Shard]) -> None:
    """Record the faults of the shards' headers."""
    for name, shard in shards.items():
        if shard.broken:
            checkpoint.problem("shard", f"{name} cannot be read: {shard.broken}", "unreadable")
        for text in shard.problems:
            checkpoint.problem("shard", f"{name}: {text}")
        for tensor, reason in shard.unreadable.items():
            checkpoint.problem("shard", f"{name}: {tensor}: {reason}", "unreadable")
            checkpoint.unreadable[canonical(tensor)] = f"{name}: {reason}"


def _open_index(checkpoint: Checkpoint, sizes: dict[str, int], shards: int) -> Index | None:
    """The index; None, with a problem, if it cannot be used, and if there is none."""
    if INDEX_NAME not in sizes:
        if shards > 1:
            checkpoint.problem("index", f"there are {shards} shards and no {INDEX_NAME}", "note")
        return None
    index = read_index(checkpoint.files, sizes[INDEX_NAME])
    if not index.reason:
        return index
    checkpoint.problem("index", f"{INDEX_NAME} cannot be used: {index.reason}", "unreadable")
    return None


def _follow_index(checkpoint: Checkpoint, index: Index, shards: dict[str, Shard]) -> None:
    """Keep the tensors that the index chooses, and record those that it lists and no shard holds."""
    ignored, moved = follow(index, shards)
    checkpoint.ignored = replace(ignored, files=checkpoint.ignored.files)
    for name in sorted(index.shards - shards.keys()):
        checkpoint.problem("index", f"names the shard {name}, which is not there", "unreadable")
    for tensor, shard_name in index.weight_map.items():
        shard = shards.get(shard_name)
        if shard is None or shard.broken:
            reason = "is not there" if shard is None else "cannot be read"
            checkpoint.unreadable[canonical(tensor)] = f"{shard_name} {reason}"
    if moved := [name for name in moved if canonical(name) not in checkpoint.unreadable]:
        checkpoint.problem(
            "index", f"places {counted(len(moved), 'tensor')} in another shard than holds them: {_some(moved)}"
        )


def _note_metadata(checkpoint: Checkpoint, index: Index, shards: dict[str, Shard]) -> None:
    """No loader reads the index's other keys and its total size."""
    for text in index.notes:
        checkpoint.problem("index", text, "note")
    total = sum(entry.size for shard in shards.values() for entry in shard.entries.values())
    if index.total_size is None:
        checkpoint.problem("index", "has no total_size", "note")
    elif index.total_size != total and not checkpoint.unreadable:
        checkpoint.problem("index", f"total_size says {index.total_size!r} bytes, the tensors have {total}", "note")


def _open_whole(checkpoint: Checkpoint, sizes: dict[str, int], names: list[str], on_header: Callable[[], None]) -> None:
    """A Hugging Face folder: the shards that its index names, or all."""
    index = _open_index(checkpoint, sizes, len(names))
    if index is None:
        shards = _read_shards(checkpoint, sizes, names, on_header)
        _report_shards(checkpoint, shards)
    else:
        checkpoint.ignored.files = [name for name in names if name not in index.shards]
        for _ in checkpoint.ignored.files:
            on_header()
        shards = _read_shards(checkpoint, sizes, [name for name in names if name in index.shards], on_header)
        _follow_index(checkpoint, index, shards)
        _report_shards(checkpoint, shards)
        _note_metadata(checkpoint, index, shards)
    _collect_whole(checkpoint, shards)


def _stored(checkpoint: Checkpoint, shards: dict[str, Shard]) -> Iterator[tuple[str, Entry]]:
    """(the release's name, entry) of every tensor of the shards; what cannot be read is recorded."""
    entries = [entry for shard in shards.values() for entry in shard.entries.values()]
    if not mlx.holds(entries):
        yield from ((canonical(entry.name), entry) for entry in entries)
        return
    checkpoint.repacked = True
    for name, entry, fault in mlx.released(entries):
        if fault:
            checkpoint.problem("shard", f"{entry.shard}: {entry.name}: {fault}", "unreadable")
            checkpoint.unreadable[name] = fault
        else:
            yield name, entry


def _collect_whole(checkpoint: Checkpoint, shards: dict[str, Shard]) -> None:
    """Hugging Face: every entry is a whole tensor, but for the stacks of MLX."""
    for name, entry in _stored(checkpoint, shards):
        if name in checkpoint.tensors:
            first = checkpoint.tensors[name].slices[0]
            checkpoint.problem(
                "layout",
                f"{entry.name} in {entry.shard} and {first.name} in {first.shard} are the same tensor twice",
                "unreadable",
            )
            checkpoint.unreadable[name] = "the checkpoint holds it twice"
        else:
            checkpoint.tensors[name] = Tensor(name, entry.dtype, entry.shape, 0, (entry,))


def _ranks(names: list[str]) -> list[tuple[int, int, str]]:
    """(rank, number of ranks, file name) of the reference engine's files among `names`."""
    found = [(match, name) for name in names if (match := RANK_FILE.fullmatch(name))]
    return sorted((int(match[1]), int(match[2]), name) for match, name in found)


def _joined(name: str, entries: list[Entry], axis: int) -> Tensor | str:
    """The ranks' slices as one tensor, or why they do not fit together."""
    first = entries[0]
    rest = {(entry.dtype, len(entry.shape), entry.shape[:axis] + entry.shape[axis + 1 :]) for entry in entries}
    if len(rest) > 1 or len(first.shape) <= axis:
        return "the ranks' slices do not fit together: " + ", ".join(f"{e.dtype} {list(e.shape)}" for e in entries)
    shape = list(first.shape)
    shape[axis] = sum(entry.shape[axis] for entry in entries)
    return Tensor(name, first.dtype, tuple(shape), axis, tuple(entries))


def _replicated(name: str, entries: list[Entry]) -> Tensor | str:
    first = entries[0]
    if any((entry.dtype, entry.shape) != (first.dtype, first.shape) for entry in entries):
        return "the ranks' copies differ: " + ", ".join(f"{e.dtype} {list(e.shape)}" for e in entries)
    return Tensor(name, first.dtype, first.shape, 0, (first,), tuple(entries[1:]))


def _experts_per_rank(names: Iterable[str], ranks: int) -> dict[str, int]:
    """Module -> experts per rank: all of the module's experts, divided by the number of ranks."""
    count: dict[str, int] = defaultdict(int)
    for name in names:
        if match := _EXPERT.fullmatch(name):
            count[match[1]] = max(count[match[1]], int(match[2]) + 1)
    return {module: max(1, total // ranks) for module, total in count.items()}


def _place_expert(checkpoint: Checkpoint, name: str, held: dict[int, Entry], per_rank: dict[str, int]) -> None:
    """Record an expert that is in the wrong rank or in two ranks: the engine does not find it there."""
    match = _EXPERT.fullmatch(name)
    assert match is not None
    rank = int(match[2]) // per_rank[match[1]]
    if set(held) != {rank}:
        there = ", ".join(map(str, sorted(held)))
        checkpoint.problem("layout", f"{name} belongs to rank {rank}, it is in rank {there}")
    entries = [held[rank]] if rank in held else list(held.values())
    checkpoint.tensors[name] = Tensor(name, entries[0].dtype, entries[0].shape, 0, tuple(entries[:1]))


def _collect_ranks(checkpoint: Checkpoint, shards: dict[str, Shard], ranks: dict[str, int]) -> None:
    """The reference engine's layout: join the ranks' slices, collect the experts, keep the copies."""
    held: dict[str, dict[int, Entry]] = defaultdict(dict)
    for shard_name, shard in shards.items():
        for entry in shard.entries.values():
            held[canonical(entry.name)][ranks[shard_name]] = entry
    per_rank = _experts_per_rank(held, checkpoint.ranks)
    for name, by_rank in held.items():
        if _EXPERT.fullmatch(name):
            _place_expert(checkpoint, name, by_rank, per_rank)
            continue
        entries = [by_rank[rank] for rank in sorted(by_rank)]
        if len(entries) < checkpoint.ranks:
            absent = ", ".join(str(rank) for rank in range(checkpoint.ranks) if rank not in by_rank)
            checkpoint.problem("layout", f"{name} is not in rank {absent}")
        if checkpoint.ranks > 1 and _SLICED_ROWS.fullmatch(name):
            tensor = _joined(name, entries, 0)
        elif checkpoint.ranks > 1 and _SLICED_COLUMNS.fullmatch(name):
            tensor = _joined(name, entries, 1)
        else:
            tensor = _replicated(name, entries)
        if isinstance(tensor, str):
            checkpoint.problem("layout", f"{name}: {tensor}", "unreadable")
            checkpoint.unreadable[name] = tensor
        else:
            checkpoint.tensors[name] = tensor


def _open_ranks(
    checkpoint: Checkpoint, sizes: dict[str, int], found: list[tuple[int, int, str]], on_header: Callable[[], None]
) -> None:
    counts = {count for _, count, _ in found}
    if len(counts) > 1:
        raise InputError(
            f"{checkpoint.files.label} holds files of several conversions: " + ", ".join(name for _, _, name in found),
            "Keep the files of one model-parallel size in a folder.",
        )
    checkpoint.layout, checkpoint.ranks = "mp", counts.pop()
    present = {rank: name for rank, _, name in found}
    shards = _read_shards(checkpoint, sizes, [name for _, _, name in found], on_header)
    _report_shards(checkpoint, shards)
    for rank in range(checkpoint.ranks):
        if rank not in present:
            text = f"model{rank}-mp{checkpoint.ranks}.safetensors is not there"
            checkpoint.problem("layout", text, "unreadable")
    _collect_ranks(checkpoint, shards, {name: rank for rank, name in present.items()})


def open_checkpoint(files: Files, where: str, on_header: Callable[[], None] = lambda: None) -> Checkpoint:
    """Read all headers, and the index, of a checkpoint. `where` is "source" or "output".

    `on_header` is called for each shard. Raises InputError if there is no safetensors file at all, or if the folder
    holds files of several conversions.
    """
    checkpoint = Checkpoint(where, files)
    sizes = files.sizes()
    names = list(shard_names(files))
    if not names and INDEX_NAME not in sizes:
        refuse_other_weights(files, sizes)
        raise InputError(f"{files.label} holds no safetensors file", "Give the folder that holds the shards.")
    if INDEX_NAME not in sizes and (found := _ranks(names)):
        _open_ranks(checkpoint, sizes, found, on_header)
    else:
        _open_whole(checkpoint, sizes, names, on_header)
    for name in checkpoint.unreadable:
        checkpoint.tensors.pop(name, None)
    return checkpoint
