"""Decides which weights stay in memory and which are read from the files at each use.

A weight is kept as it is stored, packed, so a checkpoint needs about its own size. Below that, `max_memory` decides:

    always      norms, biases, tables, hyper-connections: a few MB per layer
    pinned      dense matrices in the order of use, as many as fit: every token needs every one of them
    the rest    of the dense matrices is read from the files at each use and dropped
    n-gram rows read at each use: the tables of V4.1 take 200 GB, of which a token needs 24 rows a table
    experts     only those that a token chose are read, ahead of their use; as many as fit stay (reading/streamed.py)

`on_demand` reads experts and rows of the embedding this way although all would fit: for a checkpoint whose files are
fetched as they are read.

Dense matrices are used in a cycle, for which an LRU cache would be useless: each entry would be dropped just before its
next use. Pinning a prefix of the cycle saves the reads of that prefix. The bits of a weight are the same either way.
The values of a weight are checked at its first read.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice

import torch

from dsv4.convert.checkpoint.names import is_expert_matrix
from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.checkpoint.weights import Weight
from dsv4.errors import InputError, MachineError
from dsv4.model.reading.arena import ALIGNMENT, Arena
from dsv4.model.reading.matrices import (
    Memory,
    fresh,
    into,
    memory_of,
    read_matrix,
    read_single_rows,
    read_vector,
    row_spans,
    spans_of,
)
from dsv4.model.reading.meter import ReadMeter, ReadStatistics
from dsv4.model.reading.streamed import READERS, Streamed
from dsv4.progress import Reached, bounded_map

from .config import Config
from .parallel import SINGLE, TensorParallelGroup
from .weights import EMBEDDING, Matrix

TABLE = re.compile(r"\.engram\.embed\.weight$")  # n-gram tables: rows are read when a token needs them
MATRIX = re.compile(r"\.weight$|hc_(attn|ffn|head)_fn$")


def stored_bytes(weight: Weight) -> int:
    """Bytes of a weight and its scale in the files, which is what it occupies in memory."""
    return weight.info.nbytes + (weight.scale.nbytes if weight.scale is not None else 0)


def is_matrix(shape: tuple[int, ...], name: str) -> bool:
    """Whether a tensor is used as a matrix; the others are norms, biases, tables and position biases."""
    return len(shape) == 2 and MATRIX.search(name) is not None and not is_table(name)


def is_table(name: str) -> bool:
    """Whether a tensor is an n-gram table, of which no more than the rows in use is ever in memory."""
    return TABLE.search(name) is not None


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes for a model's weights, or a rank's share. `whole` keeps every weight in memory; `least` is the minimum."""

    whole: int
    least: int


class TooLittleMemory(MachineError):
    """The weights that must always stay in memory, and the largest other one, do not fit. `least`: bytes of these."""

    def __init__(self, message: str, least: int) -> None:
        super().__init__(message, f"Allow at least {least} bytes.")
        self.least = least


class WeightStore:
    """All weights of a model by name, or a rank's share of them.

    Raises TooLittleMemory when the largest single weight does not fit.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: Config,
        weights: dict[str, Weight],
        device: torch.device,
        max_memory: int | None,
        group: TensorParallelGroup = SINGLE,
        on_demand: bool = False,
    ) -> None:
        self.checkpoint, self.config, self.device, self.group = checkpoint, config, device, group
        self._weights = held = {name: weight for name, weight in weights.items() if group.holds(name, config)}
        self._rows = {name: group.rows(name, weight.logical_shape) for name, weight in held.items()}
        matrices = [name for name, weight in held.items() if is_matrix(weight.logical_shape, name)]
        self._vector_names = [name for name in held if name not in set(matrices) and not is_table(name)]
        self._matrix_count = len(matrices)
        self._experts = {name for name in matrices if is_expert_matrix(name)}
        # Bytes in the files, scale included.
        self.sizes = {n: stored_bytes(held[n]) // (group.count if self._rows[n] else 1) for n in held}
        self._pinned: dict[str, Matrix] = {}
        self._vectors: dict[str, torch.Tensor] = {}
        self._exact_products: dict[str, bool] = {}  # of matrices that were read and found good
        self._meter = ReadMeter()
        fixed = sum(self.sizes[name] for name in self._vector_names)
        self._largest = max((n for n in matrices if n != EMBEDDING), key=lambda n: self.sizes[n])
        whole = fixed + sum(self.sizes[name] for name in matrices)
        self.need = MemoryNeed(whole, fixed + self.sizes[self._largest])
        self._plan(matrices, whole if on_demand and max_memory is None else max_memory, on_demand)

    def _plan(self, matrices: list[str], max_memory: int | None, on_demand: bool) -> None:
        """Decide what is pinned, and how many bytes are for experts and for the matrix in use."""
        self._passing: Arena | None = None
        self._streamed: Streamed | None = None
        self.foresees = False
        if max_memory is None or (self.need.whole <= max_memory and not on_demand):
            self._pinned_names = matrices
            return
        sizes, least = self.sizes, self.need.least
        if least > max_memory:
            largest = sizes[self._largest]
            raise TooLittleMemory(
                f"max_memory is {max_memory} bytes, but norms and tables take {least - largest} and "
                f"'{self._largest}' takes {largest}",
                least,
            )
        self._pinned_names, passing, left = self._choose_pinned(matrices, max_memory)
        on_cpu = self.device.type == "cpu"
        self._passing = Arena(passing + ALIGNMENT) if on_cpu else None  # values and scale are aligned one by one
        memory = {name: self._memory_of(name) for name in self._experts}
        self._streamed = Streamed(self._read_passing, memory, min(left, sum(memory.values())), on_cpu)
        # Otherwise the disk has dense matrices to read at that time, or files are fetched that no token may need.
        others = {*matrices} - {*self._pinned_names, *self._experts, EMBEDDING}
        self.foresees = bool(self._experts) and not others and not on_demand

    def _choose_pinned(self, matrices: list[str], max_memory: int) -> tuple[list[str], int, int]:
        """Dense matrices to pin, bytes for one that passes through, and bytes for experts: together all there are."""
        sizes = self.sizes
        # One layer's worth of chosen experts before anything is pinned, or each token would read them all again.
        expert = max((sizes[name] for name in self._experts), default=0)
        chosen = 3 * expert * self.config.num_experts_per_tok * self.config.num_hidden_layers
        left = max_memory - (self.need.least - sizes[self._largest])
        reserve = min((max_memory - self.need.least) // 2, chosen)
        dense = [name for name in matrices if name not in self._experts and name != EMBEDDING]
        passing = sorted(((sizes[name], name) for name in dense), reverse=True)
        pinned: list[str] = []
        for name in dense:
            largest = next((size for size, other in passing if other != name), expert)
            if sizes[name] + max(largest, expert) + reserve <= left:
                pinned.append(name)
                passing.remove((sizes[name], name))
                left -= sizes[name]
        largest = max([expert, *(size for size, _ in passing[:1])])
        return pinned, largest, left - largest

    def _memory_of(self, name: str) -> int:
        return memory_of(self._weights[name], self._rows[name])

    def load(self, progress: Reached | None = None) -> None:
        """Read what stays in memory. `progress` is called with bytes read and bytes to read, also while it waits."""
        kept, done = [*self._vector_names, *self._pinned_names], 0
        total = sum(self.sizes[name] for name in kept)

        def advance(nbytes: int = 0) -> None:
            nonlocal done
            done += nbytes
            if progress is not None:
                progress(done, total)

        self.checkpoint.expect(span for name in kept for span in spans_of(self._weights[name], self._rows[name]))
        for name in self._vector_names:
            vector = read_vector(self.checkpoint, self.config, self._weights[name], self._rows[name])
            self._vectors[name] = vector.to(self.device)
            advance(self.sizes[name])
        with ThreadPoolExecutor(READERS, thread_name_prefix="load") as pool:
            items = self._with_memory(self._pinned_names)
            for (name, _), matrix in bounded_map(pool, lambda item: self._read(*item), items, 2 * READERS, advance):
                self._pinned[name] = matrix
                advance(self.sizes[name])

    def _with_memory(self, names: list[str]) -> Iterator[tuple[str, Memory]]:
        """Each matrix and the memory to read it to; on a CPU that is where it stays."""
        if self.device.type != "cpu":
            yield from ((name, fresh) for name in names)
            return
        arena = Arena(sum(map(self._memory_of, names)))
        for name in names:
            part = arena.take(self._memory_of(name))
            assert part is not None, "the arena has room for all"
            yield name, into(part)

    def _read(self, name: str, memory: Memory) -> Matrix:
        exact = self._exact_products.get(name)
        try:
            matrix = read_matrix(self.checkpoint, self._weights[name], self._rows[name], memory, exact)
        except ValueError as error:
            raise InputError(f"'{name}': {error}") from None
        self._exact_products[name] = matrix.exact_products
        return matrix.to(self.device)

    def _read_passing(self, name: str, memory: Memory | None) -> Matrix:
        """Read while computing, by default to memory that is free again when the caller lets the matrix go.

        The scale is announced, and thereby requested from the disk: after the values its read would wait once more,
        behind those of other threads.
        """
        with self._meter.reading(self.sizes[name]):
            self.checkpoint.expect(islice(spans_of(self._weights[name], self._rows[name]), 1, None))
            return self._read(name, memory or self._passing_memory)

    def _passing_memory(self, nbytes: int) -> torch.Tensor:
        part = None if self._passing is None else self._passing.take(nbytes)
        return fresh(nbytes) if part is None else part

    def expect(self, experts: Sequence[Sequence[str]]) -> list[int]:
        """The matrices of the experts that are used next: those in the files are read from now on.

        Returns the order in which the experts will be in memory.
        """
        if self._streamed is None:
            return list(range(len(experts)))
        self.checkpoint.expect(span for names in experts for name in names for span in spans_of(self._weights[name]))
        return self._streamed.expect(experts)

    def foresee(self, names: Iterable[str]) -> None:
        """Expert matrices that are probably used next, the surest first; only where the store `foresees`."""
        if self._streamed is not None:
            self._streamed.foresee(names)

    def matrix(self, name: str) -> Matrix:
        """A matrix, from memory if it is there, otherwise from the files.

        One from the files is for use at once: its memory counts as free when the next but one is asked for.
        """
        if name in self._pinned:
            return self._pinned[name]
        self._meter.use()
        if self._streamed is not None and name in self._experts:
            return self._streamed.get(name)
        return self._read_passing(name, None)

    @property
    def statistics(self) -> ReadStatistics:
        """Of the matrices that are not pinned, since loading."""
        unneeded = 0 if self._streamed is None else self._streamed.unneeded
        return replace(self._meter.statistics(), unneeded=unneeded)

    @property
    def reads(self) -> int:
        """Matrices read from the files since loading."""
        return self.statistics.read

    def vector(self, name: str) -> torch.Tensor:
        """A norm, bias, sink (float32) or table of expert ids (int64)."""
        return self._vectors[name]

    def embedding(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding, float32 [n, hidden_size]."""
        held = self._rows[EMBEDDING]
        if held is None:
            return self.table_rows(EMBEDDING, token_ids)
        start, stop = held
        mine = ((token_ids >= start) & (token_ids < stop)).nonzero().squeeze(-1)
        result = torch.zeros(len(token_ids), self.config.hidden_size, dtype=torch.float32, device=self.device)
        result[mine] = self.table_rows(EMBEDDING, token_ids[mine] - start)
        return self.group.all_reduce_disjoint(result)

    def table_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Rows int64 [n] of a BF16 or float32 matrix, float32 [n, width]; read one by one if it is not in memory.

        Rows are counted from the first one that this rank holds.
        """
        if name in self._pinned:
            return self._pinned[name].values.index_select(0, rows).to(torch.float32)
        start, _ = self._rows[name] or (0, 0)
        self.checkpoint.expect(row_spans(self._weights[name], (start + rows).tolist()))
        read = [self.checkpoint.read_tensor(name, start + i, start + i + 1) for i in rows.tolist()]
        none = self.checkpoint.read_tensor(name, 0, 0)
        return torch.cat([none, *read]).to(self.device, torch.float32)

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Rows int64 [n] of an n-gram table -> float32 [n, width], from the files, each of them once."""
        needed, places = torch.unique(rows, return_inverse=True)
        found = read_single_rows(self.checkpoint, self._weights[name], needed.tolist())
        return found[places].to(self.device)

    @property
    def keeps_everything(self) -> bool:
        """Whether every matrix stays in memory, so that several can be used at once."""
        return len(self._pinned) == self._matrix_count

    @property
    def resident_bytes(self) -> int:
        """Bytes of weights in memory now."""
        streamed = 0 if self._streamed is None else self._streamed.nbytes
        pinned = sum(matrix.nbytes for matrix in self._pinned.values())
        return streamed + pinned + sum(vector.nbytes for vector in self._vectors.values())

    def view(self, prefix: str) -> "WeightView":
        """The weights whose names start with `prefix`."""
        return WeightView(self, prefix)


class WeightView:
    """Weights of one module, under their names within it."""

    def __init__(self, store: WeightStore, prefix: str) -> None:
        self._store, self._prefix = store, prefix

    def matrix(self, name: str) -> Matrix:
        """A matrix of the module, see WeightStore.matrix."""
        return self._store.matrix(self._prefix + name)

    @property
    def foresees(self) -> bool:
        """Whether the disk is free for what is probably used next: experts are in the files, all else is in memory."""
        return self._store.foresees

    def foresee(self, names: Iterable[str]) -> None:
        """Announce matrices of the module that are probably used next, see WeightStore.foresee."""
        self._store.foresee(self._prefix + name for name in names)

    def expect(self, experts: Sequence[Sequence[str]]) -> list[int]:
        """Announce the experts of the module that are used next, by their matrices, see WeightStore.expect."""
        return self._store.expect([[self._prefix + name for name in names] for names in experts])

    def vector(self, name: str) -> torch.Tensor:
        """A vector of the module, see WeightStore.vector."""
        return self._store.vector(self._prefix + name)

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Rows of a matrix of the module, see WeightStore.read_rows."""
        return self._store.read_rows(self._prefix + name, rows)

    @property
    def keep_everything(self) -> bool:
        """Whether all weights stay in memory, see WeightStore.keeps_everything."""
        return self._store.keeps_everything

    def view(self, prefix: str) -> "WeightView":
        """A module inside this one."""
        return WeightView(self._store, self._prefix + prefix)
