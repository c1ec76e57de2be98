"""Teacher forcing: the logits of every position of given tokens, from the main model and from its draft stages."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from dsv4.errors import InputError
from dsv4.model.drafting.dspark import Drafts, DSpark
from dsv4.model.transformer import Transformer

from .trace import PositionedTrace, counting, positioned, together

TOKENS_PER_CALL = 512  # of the prefill: how many tokens go through one layer before the next

OnProgress = Callable[[float], None]
"""Called with the number of tokens computed since the last call, a fraction of a token after each layer."""


@dataclass(frozen=True)
class Evaluation:
    """`logits` float32 [n, V], and what the draft stages of one kind or the other make of every position.

    mtp_logits: float32 [n - 1, V], whose row p comes from position p and token p + 1.
    drafts: of DSpark, n drafts; row p comes from positions 0 .. p with token p + 1 as anchor, the last row with the
    token that the main model finds likeliest.
    """

    token_ids: list[int]
    logits: torch.Tensor
    mtp_logits: torch.Tensor | None
    prefill_tokens: int
    prefill_seconds: float
    decode_seconds: float
    drafts: Drafts | None = None

    @property
    def draft_logits(self) -> torch.Tensor | None:
        """The logits of the draft stages, whichever kind they are, float32 [rows, V]; None without any."""
        return self.mtp_logits if self.drafts is None else self.drafts.logits.flatten(0, 1)


def check_tokens(tokens: Sequence[int], vocabulary: int, context: int) -> None:
    """Raise InputError unless `tokens` is a prompt that the model can read."""
    if not tokens:
        raise InputError("the prompt is empty", "Give at least one token.")
    for position, token in enumerate(tokens):
        if not 0 <= token < vocabulary:
            text = f"token {position} is {token}, the vocabulary has ids 0 to {vocabulary - 1}"
            raise InputError(text, "Encode the prompt with this checkpoint's tokenizer.")
    if len(tokens) > context:
        raise InputError(
            f"the prompt has {len(tokens)} tokens, the model's context {context}", "max_position_embeddings says so."
        )


def _spans(count: int, prefill: int) -> list[tuple[int, int]]:
    """Begin and end of each call: the prefill in large steps, the rest one by one."""
    large = [(begin, min(begin + TOKENS_PER_CALL, prefill)) for begin in range(0, prefill, TOKENS_PER_CALL)]
    return large + [(begin, begin + 1) for begin in range(prefill, count)]


class _MtpRows:
    """The MTP block's logits, call by call."""

    def __init__(self, model: Transformer, ids: torch.Tensor, trace: PositionedTrace | None) -> None:
        self._model, self._ids, self._trace = model, ids, trace
        self._cache = model.new_mtp_cache(1)
        self.logits = torch.empty(ids.shape[1] - 1, model.config.vocab_size)

    def add(self, begin: int, end: int, hidden: torch.Tensor) -> None:
        """Positions begin .. end - 1, of which the last of all has no token after it."""
        following = self._ids[:, begin + 1 : end + 1]
        count = following.shape[1]
        if count:
            report = positioned(self._trace, begin + count)
            made = self._model.mtp_logits(hidden[:, :count], following, self._cache, trace=report)
            assert made is not None
            self.logits[begin : begin + count] = made[0]


class _DSparkRows:
    """A DSpark draft from every position, call by call."""

    def __init__(self, dspark: DSpark, tokens: Sequence[int], trace: PositionedTrace | None) -> None:
        self._dspark, self._tokens, self._trace = dspark, tokens, trace
        self._context = dspark.new_context()
        count, size = len(tokens), dspark.own.block_size
        self.drafts = Drafts(
            torch.empty(count, size, dtype=torch.int64),
            torch.empty(count, size, dspark.config.vocab_size),
            torch.empty(count, size),
        )

    def add(self, begin: int, hidden: torch.Tensor, likeliest: int) -> None:
        """Positions from `begin` on; `likeliest` stands in where the token after them is not given."""
        anchors = [*self._tokens[begin + 1 : begin + 1 + len(hidden)], likeliest][: len(hidden)]
        made = self._dspark.draft_everywhere(self._context, hidden, anchors, partial(positioned, self._trace))
        for first, drafts in made:
            for whole, part in zip(self.drafts, drafts, strict=True):
                whole[first : first + len(part)] = part


@torch.inference_mode()
def teacher_forced(
    model: Transformer,
    tokens: Sequence[int],
    prefill: int | None = None,
    draft: bool = True,
    trace: PositionedTrace | None = None,
    on_progress: OnProgress | None = None,
) -> Evaluation:
    """Feed `tokens` to the model, the first `prefill` (default all) at once and the others one by one.

    With `draft` the draft stages, if there are any, compute their logits too. Raises InputError for tokens that the
    model cannot read.
    """
    check_tokens(tokens, model.config.vocab_size, model.config.max_position_embeddings)
    prefill = len(tokens) if prefill is None else min(prefill, len(tokens))
    ids = torch.tensor([list(tokens)], dtype=torch.int64)
    cache = model.new_cache(1)
    logits = torch.empty(len(tokens), model.config.vocab_size)
    mtp = _MtpRows(model, ids, trace) if draft and model.has_mtp and len(tokens) > 1 else None
    dspark = _DSparkRows(model.dspark, tokens, trace) if draft and model.dspark is not None else None
    progress = counting(on_progress, model.config.num_hidden_layers)
    started = prefilled = time.perf_counter()
    for begin, end in _spans(len(tokens), prefill):
        output = model.forward(ids[:, begin:end], cache, trace=together(positioned(trace, end), progress))
        assert output.logits is not None
        logits[begin:end] = output.logits[0]
        if mtp is not None:
            mtp.add(begin, end, output.hidden)
        if dspark is not None:
            dspark.add(begin, output.hidden[0], int(output.logits[0, -1].argmax()))
        if end <= prefill:
            prefilled = time.perf_counter()
    return Evaluation(
        token_ids=list(tokens),
        logits=logits,
        mtp_logits=None if mtp is None else mtp.logits,
        prefill_tokens=prefill,
        prefill_seconds=prefilled - started,
        decode_seconds=time.perf_counter() - prefilled,
        drafts=None if dspark is None else dspark.drafts,
    )


def read_logits(path: str | Path) -> Evaluation:
    """What `write_logits` wrote. Raises InputError for a file that holds something else."""
    try:
        tensors = load_file(path)
    except (SafetensorError, ValueError) as error:
        raise InputError(f"{path} is not a file of logits: {error}", "`dsv4 run --logits FILE` writes one.") from None
    tokens, logits, mtp = tensors.get("token_ids"), tensors.get("logits"), tensors.get("mtp_logits")
    if tokens is None or logits is None or tokens.dim() != 1 or logits.dim() != 2 or len(logits) != len(tokens):
        raise InputError(f"{path} has no token_ids [n] and logits [n, V]", "`dsv4 run --logits FILE` writes both.")
    parts = [tensors.get(f"draft_{name}") for name in Drafts._fields]
    drafts = Drafts(*parts) if None not in parts else None  # type: ignore[arg-type]
    return Evaluation(tokens.tolist(), logits.float(), mtp, len(tokens), 0.0, 0.0, drafts)


def named_tensors(evaluation: Evaluation) -> dict[str, torch.Tensor]:
    """What an evaluation consists of, under the names of the file."""
    tensors = {"token_ids": torch.tensor(evaluation.token_ids, dtype=torch.int64), "logits": evaluation.logits}
    if evaluation.mtp_logits is not None:
        tensors["mtp_logits"] = evaluation.mtp_logits
    if evaluation.drafts is not None:
        tensors |= {f"draft_{name}": tensor for name, tensor in evaluation.drafts._asdict().items()}
    return tensors


_TAGS = {torch.int64: "I64", torch.float32: "F32"}


def write_logits(evaluation: Evaluation, file: BinaryIO) -> None:
    """Write `token_ids` [n] int64, `logits` [n, V] float32 and what the draft stages computed.

    With an MTP block that is `mtp_logits` [n - 1, V], with DSpark `draft_tokens` [n, B] int64, `draft_logits` [n, B, V]
    and `draft_confidence` [n, B].

    A safetensors file, written here and not by the library, which takes a path only and cannot write to a pipe.
    """
    tensors = named_tensors(evaluation)
    header, end = {}, 0
    for name, tensor in tensors.items():
        span = [end, end + tensor.nbytes]
        header[name] = {"dtype": _TAGS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        end = span[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        file.write(tensor.numpy().data.cast("B"))
