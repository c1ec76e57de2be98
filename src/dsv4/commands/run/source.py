"""The checkpoint that `dsv4 run` works on: opened and checked before its weights are read, then loaded.

Opening reads headers and config only, so whatever is wrong with the command line (a token out of range, a prompt that
does not fit, drafts without an MTP block) is said in a second, and not after minutes of loading.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4.errors import InputError, UsageError, printable
from dsv4.machine import MARGIN, usable_memory
from dsv4.opening import opening
from dsv4.output import Output, human_bytes

if TYPE_CHECKING:
    from dsv4.convert.checkpoint.reader import Checkpoint
    from dsv4.distributed import Ranks
    from dsv4.model.config import Config
    from dsv4.model.parallel import Group
    from dsv4.model.transformer import Transformer


@dataclass(frozen=True)
class Loading:
    """How a checkpoint is loaded. `max_memory` None: what the machine has free, with a margin.

    `ranks`: those that load and run it together.
    """

    device: str = "cpu"
    simulation: bool = True
    max_memory: int | None = None
    ranks: "Ranks | None" = None

    @property
    def kind(self) -> str:
        """The device without its number."""
        return self.device.partition(":")[0]

    @property
    def place(self) -> str:
        """The device of this process: of several ranks on a machine each has one of its own, if there are several."""
        if self.ranks is None or self.device == "cpu" or ":" in self.device:
            return self.device
        import torch

        count = getattr(getattr(torch, self.kind, None), "device_count", lambda: 1)()
        return f"{self.device}:{self.ranks.local_index}" if count > 1 else self.device


@dataclass(frozen=True)
class Source:
    """An opened checkpoint. `has_mtp`: it has an MTP block that can draft tokens."""

    folder: str
    checkpoint: "Checkpoint"
    config: "Config"
    has_mtp: bool

    def check_prompt(self, tokens: list[int]) -> None:
        """Raise InputError unless this model can read the tokens."""
        from dsv4.model.evaluate.logits import check_tokens

        check_tokens(tokens, self.config.vocab_size, self.config.max_position_embeddings)

    def require_mtp(self) -> None:
        """Raise UsageError unless there is an MTP block."""
        if not self.has_mtp:
            raise UsageError("this checkpoint has no MTP block that can draft tokens", "Run without --mtp.")

    def stop_ids(self) -> frozenset[int]:
        """The ids that end an answer: `eos_token_id` of config.json, else of generation_config.json."""
        from dsv4.model.chat.messages import read_json

        path = Path(self.folder) / "generation_config.json"
        value = self.checkpoint.config.get("eos_token_id")
        if value is None and path.is_file():
            content = read_json(str(path))
            if not isinstance(content, dict):
                raise InputError(f"{printable(str(path))}: a JSON object is expected")
            value = content.get("eos_token_id")
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) for i in ids):
            raise InputError(f"{printable(self.folder)}: eos_token_id must be a token id or a list of them")
        return frozenset(ids)


def open_source(folder: str, out: Output) -> Source:
    """Open a checkpoint folder, in the Hugging Face layout or rank files of the reference engine.

    Raises InputError for what is wrong with its headers or config.
    """
    if not Path(folder).is_dir():
        raise InputError(f"{printable(folder)} is not a folder", "Name the folder of a checkpoint.")
    from dsv4.convert.checkpoint.rank_files import open_checkpoint
    from dsv4.model.config import Config
    from dsv4.model.weights import mtp_stages

    with opening(out) as headers:
        checkpoint = open_checkpoint(folder, headers)
    return Source(folder, checkpoint, Config.from_json(checkpoint.config), mtp_stages(checkpoint.tensors) > 0)


def memory_limit(loading: Loading) -> int | None:
    """Bytes that weights may occupy: as asked for, or what is free where they will be, with a margin."""
    if loading.max_memory is not None:
        return loading.max_memory
    if loading.kind != "cpu":
        import torch

        backend: Any = getattr(torch, loading.kind, None)
        if hasattr(backend, "mem_get_info") and backend.is_available():
            return int(backend.mem_get_info(loading.place)[0] * MARGIN)
    usable = usable_memory()
    return usable if usable is None or loading.ranks is None else usable // loading.ranks.local_count


def _group(loading: Loading) -> "Group":
    from dsv4.distributed import BACKENDS
    from dsv4.model.parallel import ALONE, Group

    if loading.ranks is None:
        return ALONE
    return Group(loading.ranks.index, loading.ranks.count, by_way_of_cpu=loading.kind not in BACKENDS)


def check_loadable(source: Source, loading: Loading) -> None:
    """Raise InputError or UsageError for a checkpoint that cannot be loaded, before any weight is read."""
    from dsv4.model import loading as engine

    engine.check_loadable(source.checkpoint, _group(loading))


def load_model(source: Source, loading: Loading, out: Output) -> "Transformer":
    """The model, with a progress bar while its weights are read."""
    from dsv4.model import load

    bar, done = None, 0

    def advance(read: int, total: int) -> None:
        nonlocal bar, done
        bar = bar or out.progress(total, "loading").__enter__()
        bar.advance(read - done)
        done = read

    try:
        limit, group = memory_limit(loading), _group(loading)
        model = load(source.checkpoint, loading.place, loading.simulation, limit, advance, group)
    finally:
        if bar is not None:
            bar.__exit__(None, None, None)
    out.detail(f"weights in memory: {human_bytes(model.store.resident_bytes)}")
    return model
