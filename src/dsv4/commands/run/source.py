"""The checkpoint that `dsv4 run` works on, opened and checked before its weights are read.

Opening reads headers and config only, so errors in the command line (a token out of range, a prompt that does not fit,
drafts without draft stages) are reported in a second and not after minutes of loading.
"""

from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from dsv4.errors import InputError, UsageError
from dsv4.output import Output

from .hub.fetches import FetchBar, keep_hint, open_repository
from .options import RunOptions

if TYPE_CHECKING:
    from dsv4.convert.checkpoint.reader import Checkpoint
    from dsv4.convert.hub.parts.storage import PartStorage
    from dsv4.model.config import Config
    from dsv4.model.weights import DraftStages


@dataclass(frozen=True)
class Source:
    """An opened checkpoint. `folder`: its name in messages. `stages`: the draft stages that it has.

    files: the folder with tokenizer.json and other small files. hub: where its weights are fetched from, if they are.
    """

    folder: str
    checkpoint: "Checkpoint"
    config: "Config"
    stages: "DraftStages"
    files: Path
    hub: "PartStorage | None" = None

    @property
    def has_vision(self) -> bool:
        """Whether there is a vision part, which this engine leaves alone."""
        return any(name.startswith("vision.") for name in self.checkpoint.tensors)

    @cached_property
    def image_token(self) -> int | None:
        """The id that stands for an image: config.json says it, or the tokenizer of a checkpoint with a vision part."""
        from dsv4.convert.checkpoint.config import config_count
        from dsv4.model.chat.editions import PROTOCOLS
        from dsv4.model.chat.tokenizer import load_tokenizer

        declared = config_count(self.checkpoint.config, "image_token_id")
        path = self.files / "tokenizer.json"
        if declared is not None or not self.has_vision or not path.is_file():
            return declared
        token = PROTOCOLS["v41"].image  # Vision-Exp has the same
        return None if token is None else load_tokenizer(self.files).token_id(token)

    @property
    def buffer_bytes(self) -> int:
        """Memory at most of what arrives from a hub."""
        from dsv4.convert.hub.parts.storage import BUFFER_BYTES

        return 0 if self.hub is None else BUFFER_BYTES

    def check_prompt(self, tokens: list[int]) -> None:
        """Raise InputError unless this model can read the tokens."""
        from dsv4.model.chat.preparation import TEXT_ONLY
        from dsv4.model.evaluate.logits import check_tokens

        check_tokens(tokens, self.config.vocab_size, self.config.max_position_embeddings)
        if self.image_token in tokens:
            place = tokens.index(self.image_token)
            raise InputError(f"token {place} of the prompt is {self.image_token}, which stands for an image", TEXT_ONLY)

    def require_draft_stages(self) -> None:
        """Raise UsageError unless there are some."""
        from dsv4.model.drafting.drafter import NO_DRAFTS

        if not self.stages.blocks:
            raise UsageError(NO_DRAFTS, "Run without --draft.")

    @property
    def rows_per_position(self) -> int:
        """Rows of logits that `--logits` computes for each position: the main model's, and those of a draft."""
        if not self.stages.blocks:
            return 1
        return 1 + (1 if self.config.dspark is None else self.config.dspark.block_size)

    @property
    def rows_per_step(self) -> int:
        """Rows of logits that a step with drafts computes: after the last certain token, and after each proposal."""
        from dsv4.model.drafting.mtp import WIDTH

        return 1 + (WIDTH if self.config.dspark is None else self.config.dspark.block_size)

    def stop_ids(self) -> frozenset[int]:
        """The ids that end an answer: `eos_token_id` of config.json, else of generation_config.json."""
        from dsv4.convert.checkpoint.header import strict_json

        path = self.files / "generation_config.json"
        value = self.checkpoint.config.get("eos_token_id")
        if value is None and path.is_file():
            content = strict_json(path.read_bytes(), str(path))
            if not isinstance(content, dict):
                raise InputError(f"{path}: a JSON object is expected")
            value = content.get("eos_token_id")
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) for i in ids):
            raise InputError(f"{self.folder}: eos_token_id must be a token id or a list of them")
        return frozenset(ids)


def _small_files() -> tuple[str, ...]:
    """What a run reads beside the weights and their index."""
    from dsv4.model.chat.detection import ENCODERS

    return ("config.json", "generation_config.json", "tokenizer.json", *ENCODERS)


def open_source(text: str, options: RunOptions, stack: ExitStack, out: Output) -> Source:
    """Open a checkpoint that a folder or a repository holds, in any form; `stack` closes it.

    Raises InputError for faults in its headers or config, and for a missing folder, NetworkError, MachineError.
    """
    from dsv4.convert.hub.source import folder_or_repository

    where = folder_or_repository(text, options.revision if text == options.checkpoint else None)
    from dsv4.convert.checkpoint.rank_files import open_checkpoint
    from dsv4.model.architectures.table import architecture_of  # imports torch: after what can be wrong
    from dsv4.model.weights import draft_stages

    bar = FetchBar(out)
    with out.opening() as headers:
        if isinstance(where, Path):
            hub, files, checkpoint = None, where, open_checkpoint(where, headers)
        else:
            stack.callback(bar.close)
            stack.push(keep_hint)
            hub = stack.enter_context(closing(open_repository(where, options, bar, out)))
            files, checkpoint = hub.small_files(_small_files()), open_checkpoint(hub, headers)
    stack.enter_context(closing(checkpoint))
    for note in checkpoint.notes:
        out.warn(note)
    config = architecture_of(checkpoint).read_config(checkpoint.config)
    return Source(text if hub is None else hub.label, checkpoint, config, draft_stages(checkpoint.tensors), files, hub)
