"""Where `dsv4 run` computes: the device of this process, its rank, and how many bytes of weights may stay in memory.

This is decided once, when the prompts are known and before any weight is read. `--max-memory` bounds the whole
process, the engine bounds weights only. The bound for weights is the process's bound less

    what the process occupies already   the interpreter, torch, the headers of all shards
    activations, keys and logits        by the model's widths and the number of tokens, see `working_memory`

On another device than a CPU the bound is on that device's memory.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsv4.errors import MachineError
from dsv4.machine import MARGIN, peak_memory, usable_memory
from dsv4.output import Output
from dsv4.text import enough_bytes, human_bytes

from .source import Source

if TYPE_CHECKING:
    from dsv4.commands.distributed import Ranks
    from dsv4.model.config import Config
    from dsv4.model.parallel import TensorParallelGroup
    from dsv4.model.transformer import Transformer

WIDEST_TENSORS = 12  # float32 tensors of a piece's widest activation that are alive at once, as measured
ROTARY_TABLES = 4  # cosines and sines of half the dimensions, with and without YaRN, while they are made longer
FIRST_USE = 32 * 2**20  # threads' stacks and libraries that are loaded with the first layer
PROCESSES_DIFFER = 2 * 2**20  # bytes that one process occupies after its imports and another does not


@dataclass(frozen=True)
class Placement:
    """Where and how this process computes.

    device: as torch names it, of this process. simulation: whether the release's quantizations are simulated.
    weights_bytes: bytes of weights that may stay in memory.
    other_bytes: what the process needs besides weights. group: the ranks that hold the model together.
    released_index_keys: see `load`.
    """

    device: str
    simulation: bool
    weights_bytes: int
    other_bytes: int
    group: "TensorParallelGroup"
    released_index_keys: bool = False


def kind_of(device: str) -> str:
    """`cuda:1` -> `cuda`."""
    return device.partition(":")[0]


@dataclass(frozen=True)
class Work:
    """The size of the computation, for its memory.

    sequences: prompts computed together, the longest of which has `longest` tokens and grows to `context`.
    positions: those whose logits are kept; 0 for answers. rows: of logits at one position, the main model's and those
    of a draft.
    """

    sequences: int
    longest: int
    context: int
    positions: int = 0
    rows: int = 1


def working_memory(config: "Config", work: Work, simulation: bool) -> int:
    """Bytes at most of activations and logits of one piece of a call, and of the keys and tables of whole contexts."""
    from dsv4.model.cache import cache_bytes
    from dsv4.model.layers.indexer import BYTES_PER_SCORE, SCORES_AT_ONCE
    from dsv4.model.transformer import TOKENS_PER_PIECE

    widest = max(config.hc_mult * config.hidden_size, config.num_attention_heads * config.head_dim)
    tokens = work.sequences * min(work.longest, TOKENS_PER_PIECE)
    logits = max(2, work.rows) * (work.positions + tokens) if work.positions else work.sequences * work.rows
    keys = work.sequences * cache_bytes(config, work.context, TOKENS_PER_PIECE, 2 if simulation else 4)
    tables = ROTARY_TABLES * work.context * config.qk_rope_head_dim * 4
    scores = BYTES_PER_SCORE * max(SCORES_AT_ONCE, work.context // config.smallest_indexed_ratio)
    return FIRST_USE + 4 * (WIDEST_TENSORS * tokens * widest + logits * config.vocab_size) + keys + tables + scores


def device_of(device: str, ranks: "Ranks | None") -> str:
    """The device of this process: if a machine has several of a kind, each rank takes another one."""
    if ranks is None or device == "cpu" or ":" in device:
        return device
    import torch

    count = getattr(getattr(torch, device, None), "device_count", lambda: 1)()
    return f"{device}:{ranks.local_index}" if count > 1 else device


def group_of(device: str, ranks: "Ranks | None") -> "TensorParallelGroup":
    """The ranks for the engine: this one's number, and whether tensors are exchanged through the CPU."""
    from dsv4.commands.distributed import BACKENDS
    from dsv4.model.parallel import SINGLE, TensorParallelGroup

    if ranks is None:
        return SINGLE
    return TensorParallelGroup(ranks.index, ranks.count, by_way_of_cpu=kind_of(device) not in BACKENDS)


def _free_memory(device: str, ranks: "Ranks | None") -> int:
    """Bytes that this process may still take where no bound is given."""
    if kind_of(device) != "cpu":
        import torch

        backend: Any = getattr(torch, kind_of(device), None)
        if hasattr(backend, "mem_get_info") and backend.is_available():
            return int(backend.mem_get_info(device)[0] * MARGIN)
    return usable_memory() // (ranks.local_count if ranks else 1)


def memory_for_weights(max_memory: int | None, device: str, ranks: "Ranks | None", working: int) -> tuple[int, int]:
    """(bytes of weights that may stay in memory, bytes that the process needs besides); the first may be negative."""
    occupied = peak_memory() if kind_of(device) == "cpu" else 0
    free = _free_memory(device, ranks) if max_memory is None else max_memory - occupied
    return free - working, occupied + working


def place(device: str, simulation: bool, max_memory: int | None, ranks: "Ranks | None", working: int) -> Placement:
    """Decide where this process computes; `working`: bytes of activations and logits.

    Raises MachineError for a device that is not there.
    """
    from dsv4.model.loading import find_device

    own = device_of(device, ranks)
    find_device(own)
    weights, other = memory_for_weights(max_memory, own, ranks, working)
    return Placement(own, simulation, weights, other, group_of(device, ranks))


def _say_kernels(out: Output) -> None:
    """Print the form of the kernels with -v, and a warning if it is a slow one."""
    from dsv4 import compiled
    from dsv4.model.kernels import binding

    out.detail(f"kernels: {binding.form_name()}")
    if binding.is_slow():
        why = f" ({compiled.problem()}; install dsv4 again with a C compiler)" if compiled.problem() else ""
        out.warn(f"the kernels run as {binding.form_name()}{why}, without vector code: many times slower, same results")


def load_model(source: Source, placement: Placement, out: Output, draft: bool) -> "Transformer":
    """The model, with its draft stages if `draft`; a progress bar shows while its weights are read.

    Raises MachineError if memory does not suffice.
    """
    from dsv4.model import load
    from dsv4.model.weight_store import TooLittleMemory

    with out.progress(0, "loading", passing=True) as bar:
        try:
            model = load(
                source.checkpoint,
                placement.device,
                placement.simulation,
                placement.weights_bytes,
                bar.reach,
                placement.group,
                placement.released_index_keys,
                draft,
                on_demand=source.hub is not None,
            )
        except TooLittleMemory as error:
            needed = placement.other_bytes + error.least + PROCESSES_DIFFER
            raise MachineError(
                f"too little memory: the weights need {human_bytes(error.least)} at least, "
                f"everything else {human_bytes(placement.other_bytes)}",
                f"Allow at least {enough_bytes(needed)} (--max-memory), or free some memory.",
            ) from None
    out.detail(f"weights in memory: {human_bytes(model.store.resident_bytes)}")
    if kind_of(placement.device) == "cpu":
        _say_kernels(out)
    return model
