"""Teacher forcing: the logits of every position of given tokens, from the main model and from the MTP block."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from dsv4.errors import InputError
from dsv4.model.transformer import Transformer

from .trace import PositionedTrace, counting, positioned, together

TOKENS_PER_CALL = 512  # of the prefill: how many tokens go through one layer before the next

OnProgress = Callable[[float], None]
"""Called with the number of tokens computed since the last call, a fraction of a token after each layer."""


@dataclass(frozen=True)
class Evaluation:
    """`logits` float32 [n, V]; `mtp_logits` float32 [n - 1, V], whose row p comes from position p and token p + 1."""

    token_ids: list[int]
    logits: torch.Tensor
    mtp_logits: torch.Tensor | None
    prefill_tokens: int
    prefill_seconds: float
    decode_seconds: float


def check_tokens(tokens: Sequence[int], vocabulary: int, context: int) -> None:
    """Raise InputError unless `tokens` is a prompt that the model can read."""
    if not tokens:
        raise InputError("the prompt is empty", "Give at least one token.")
    for position, token in enumerate(tokens):
        if not 0 <= token < vocabulary:
            raise InputError(f"token {position} is {token}, the vocabulary has ids 0 to {vocabulary - 1}")
    if len(tokens) > context:
        raise InputError(
            f"the prompt has {len(tokens)} tokens, the model's context {context}", "max_position_embeddings says so."
        )


def _spans(count: int, prefill: int) -> list[tuple[int, int]]:
    """Begin and end of each call: the prefill in large steps, the rest one by one."""
    large = [(begin, min(begin + TOKENS_PER_CALL, prefill)) for begin in range(0, prefill, TOKENS_PER_CALL)]
    return large + [(begin, begin + 1) for begin in range(prefill, count)]


@torch.inference_mode()
def teacher_forced(
    model: Transformer,
    tokens: Sequence[int],
    prefill: int | None = None,
    mtp: bool = True,
    trace: PositionedTrace | None = None,
    on_progress: OnProgress | None = None,
) -> Evaluation:
    """Feed `tokens` to the model, the first `prefill` (default all) at once and the others one by one.

    With `mtp` the MTP block, if there is one, computes its logits too. Raises InputError for tokens that the model
    cannot read.
    """
    check_tokens(tokens, model.config.vocab_size, model.config.max_position_embeddings)
    prefill = len(tokens) if prefill is None else min(prefill, len(tokens))
    ids = torch.tensor([list(tokens)], dtype=torch.int64)
    cache = model.new_cache(1)
    mtp_cache = model.new_mtp_cache(1) if mtp and model.has_mtp and len(tokens) > 1 else None
    logits = torch.empty(len(tokens), model.config.vocab_size)
    mtp_logits = torch.empty(len(tokens) - 1, model.config.vocab_size) if mtp_cache is not None else None
    progress = counting(on_progress, model.config.num_hidden_layers)
    started = prefilled = time.perf_counter()
    for begin, end in _spans(len(tokens), prefill):
        output = model.forward(ids[:, begin:end], cache, trace=together(positioned(trace, end), progress))
        assert output.logits is not None
        logits[begin:end] = output.logits[0]
        following = ids[:, begin + 1 : end + 1]
        count = following.shape[1]
        if mtp_cache is not None and mtp_logits is not None and count:
            report = positioned(trace, begin + count)
            drafted = model.mtp_logits(output.hidden[:, :count], following, mtp_cache, trace=report)
            assert drafted is not None
            mtp_logits[begin : begin + count] = drafted[0]
        if end <= prefill:
            prefilled = time.perf_counter()
    return Evaluation(
        token_ids=list(tokens),
        logits=logits,
        mtp_logits=mtp_logits,
        prefill_tokens=prefill,
        prefill_seconds=prefilled - started,
        decode_seconds=time.perf_counter() - prefilled,
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
    return Evaluation(tokens.tolist(), logits.float(), mtp, len(tokens), 0.0, 0.0)


_TAGS = {torch.int64: "I64", torch.float32: "F32"}


def write_logits(evaluation: Evaluation, file: BinaryIO) -> None:
    """Write `token_ids` [n] int64, `logits` [n, V] and, with an MTP block, `mtp_logits` [n - 1, V] float32.

    A safetensors file, written here and not by the library, which takes a path only and cannot write to a pipe.
    """
    tensors = {"token_ids": torch.tensor(evaluation.token_ids, dtype=torch.int64), "logits": evaluation.logits}
    if evaluation.mtp_logits is not None:
        tensors["mtp_logits"] = evaluation.mtp_logits
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
