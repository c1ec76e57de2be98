"""Loads a model from a folder: open, check, decide which weights stay in memory, read."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from dsv4.convert.checkpoint.foreign import refuse_foreign
from dsv4.convert.checkpoint.rank_files import open_checkpoint
from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.checkpoint.weights import Weight
from dsv4.errors import MachineError, UsageError
from dsv4.machine import parse_size
from dsv4.model.architectures.table import Architecture, architecture_of
from dsv4.model.kernels.table import select_kernels
from dsv4.model.layers.numerics import Numerics
from dsv4.progress import Reached

from .config import Config
from .parallel import SINGLE, TensorParallelGroup, check_divisible
from .transformer import Transformer
from .weight_store import WeightStore
from .weights import NO_STAGES, DraftStages, check_stages, draft_stages, required_weights


def devices() -> list[str]:
    """The devices of this machine that torch supports: `cpu`, and those of an accelerator by number."""
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = torch.accelerator.device_count() if kind is not None else 0
    return ["cpu", *(f"{kind}:{i}" if count > 1 else str(kind) for i in range(count))]


def find_device(name: str) -> torch.device:
    """A torch device by name, tried out. Raises MachineError, which lists the devices, for any other."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        there = devices()
        text = f"there is no device '{name}' here"
        if any(name.partition(":")[0] == device.partition(":")[0] for device in there):
            text += f" that works: {str(error).partition(chr(10))[0]}"
        raise MachineError(text, f"Devices that torch {torch.__version__} finds here: {', '.join(there)}.") from None
    return device


class Loadable(NamedTuple):
    """Facts from the headers of a checkpoint: architecture, config, draft stages, and every weight by name."""

    architecture: Architecture
    config: Config
    stages: DraftStages
    weights: dict[str, Weight]


def check_loadable(checkpoint: Checkpoint, group: TensorParallelGroup = SINGLE, draft: bool = True) -> Loadable:
    """Check a checkpoint by its headers alone; without `draft` the draft stages are left out.

    Raises InputError for a quantization that is not read and for tensors that do not fit the config, UsageError for
    ranks that cannot share them equally.
    """
    refuse_foreign(checkpoint.config, checkpoint.tensors)
    architecture = architecture_of(checkpoint)
    config = architecture.read_config(checkpoint.config)
    stages = draft_stages(checkpoint.tensors) if draft else NO_STAGES
    check_stages(stages, config)
    weights = required_weights(checkpoint, config, stages)
    check_divisible(config, group)
    return Loadable(architecture, config, stages, weights)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Loading makes small torch calls only; beside a busy process each would wait for a thread's turn."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def load(
    folder: str | Path | Checkpoint,
    device: str = "cpu",
    simulation: bool = True,
    max_memory: int | str | None = None,
    progress: Reached | None = None,
    group: TensorParallelGroup = SINGLE,
    released_index_keys: bool = False,
    draft: bool = True,
    on_demand: bool = False,
) -> Transformer:
    """Load a checkpoint in any stored format: a folder in the Hugging Face layout, or of rank files.

    simulation: bfloat16 activations and the release's simulated quantizations; False computes in float32 without.
    max_memory: bytes that weights may occupy, or text such as "16GB"; the rest is read from the files when needed.
    progress: called with bytes read and bytes to read. group: the ranks that load and run it together; each must then
    make the same calls. released_index_keys: of V4.1, let a layer whose group of tokens is not finished choose by the
    index keys that another layer has published, as the released code does at single steps; logits then depend on how
    the tokens were split into calls. draft: whether to load the draft stages, if there are any. on_demand: read experts
    and rows of the embedding when a token needs them although all would fit in memory.
    Raises InputError, UsageError, MachineError.
    """
    checkpoint = folder if isinstance(folder, Checkpoint) else open_checkpoint(folder)
    architecture, config, stages, weights = check_loadable(checkpoint, group, draft)
    if released_index_keys and not config.shares_index_keys:
        raise UsageError("the layers of this checkpoint share no index keys", "Run without --released-index-keys.")
    place = find_device(device)
    memory = parse_size(max_memory) if isinstance(max_memory, str) else max_memory
    store = WeightStore(checkpoint, config, weights, place, memory, group, on_demand)
    with _one_thread():
        store.load(progress)
    numerics = Numerics(simulation, select_kernels(place), group, released_index_keys=released_index_keys)
    return Transformer(config, architecture.build(config, stages, store, numerics), store, numerics)


def with_simulation(model: Transformer, simulation: bool) -> Transformer:
    """The same weights, computing with or without the simulated quantizations; without draft stages."""
    numerics = replace(model.numerics, simulation=simulation)
    stack = architecture_of(model.store.checkpoint).build(model.config, NO_STAGES, model.store, numerics)
    return Transformer(model.config, stack, model.store, numerics)
