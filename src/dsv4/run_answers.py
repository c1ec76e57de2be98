"""`dsv4 run` with prompts: load, generate in batches, show the answers and what they took."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from dsv4.errors import EXIT_DONE, InputError, UsageError, printable
from dsv4.machine import MARGIN, peak_memory, usable_memory
from dsv4.output import Output, human_bytes, human_seconds
from dsv4.run_prompts import Dialogue, Prompt

if TYPE_CHECKING:
    from dsv4.model.answer import AnswerText
    from dsv4.model.generate import Answer, Statistics
    from dsv4.model.sampling import Sampling
    from dsv4.model.tokenizer import TextTokenizer
    from dsv4.model.trace import TraceWriter
    from dsv4.model.transformer import Transformer

BATCH = 8  # prompts of --file computed together


@dataclass(frozen=True)
class Loading:
    """How a checkpoint is loaded. `max_memory` None: what the machine has free, with a margin."""

    device: str = "cpu"
    simulation: bool = True
    max_memory: int | None = None


@dataclass(frozen=True)
class Generation:
    """How answers are made. Without a seed, one is drawn and reported."""

    temperature: float
    top_p: float
    seed: int | None
    max_new_tokens: int
    stop: tuple[str, ...]
    mtp: bool

    def sampling(self) -> "Sampling":
        """The rules for drawing tokens. Raises UsageError for numbers out of range."""
        from dsv4.model.sampling import Sampling

        return Sampling(self.temperature, self.top_p, secrets.randbits(32) if self.seed is None else self.seed)


def check_folder(folder: str) -> None:
    """Raise InputError unless `folder` is one."""
    if not Path(folder).is_dir():
        raise InputError(f"{printable(folder)} is not a folder", "Name the folder of a checkpoint.")


def memory_limit(loading: Loading) -> int | None:
    """Bytes that weights may occupy: as asked for, or what is free where they will be, with a margin."""
    if loading.max_memory is not None:
        return loading.max_memory
    kind = loading.device.partition(":")[0]
    if kind != "cpu":
        import torch

        backend = getattr(torch, kind, None)
        if hasattr(backend, "mem_get_info") and backend.is_available():
            return int(backend.mem_get_info()[0] * MARGIN)
    return usable_memory()


def load_model(folder: str, loading: Loading, out: Output) -> "Transformer":
    """The model in `folder`, with a progress bar while its weights are read."""
    from dsv4.model import load

    check_folder(folder)
    limit = memory_limit(loading)
    bar, done = None, 0

    def advance(read: int, total: int) -> None:
        nonlocal bar, done
        bar = bar or out.progress(total, "loading").__enter__()
        bar.advance(read - done)
        done = read

    try:
        model = load(folder, loading.device, loading.simulation, limit, advance)
    finally:
        if bar is not None:
            bar.__exit__(None, None, None)
    out.detail(f"weights in memory: {human_bytes(model.store.resident_bytes)}")
    return model


class TokenProgress:
    """A passing bar over tokens, told of shares of them. `close` may be called again."""

    def __init__(self, out: Output, tokens: int, what: str) -> None:
        self._bar, self._done, self._closed = out.progress(tokens, what, " tokens", passing=True), 0.0, False

    def advance(self, tokens: float) -> None:
        """So many more are done."""
        self._done += tokens
        self._bar.advance(round(self._done) - self._bar.done)

    def close(self) -> None:
        """Wipe the bar out: from here on the terminal belongs to the answer."""
        if not self._closed:
            self._closed = True
            self._bar.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def stop_ids(folder: str) -> frozenset[int]:
    """The ids that end an answer: `eos_token_id` of config.json, else of generation_config.json."""
    from dsv4.model.messages import read_json

    for name in ("config.json", "generation_config.json"):
        path = Path(folder) / name
        content = read_json(str(path)) if path.is_file() else {}
        if not isinstance(content, dict):
            raise InputError(f"{printable(str(path))}: a JSON object is expected")
        value = content.get("eos_token_id")
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            if not all(isinstance(i, int) for i in ids):
                raise InputError(f"{printable(str(path))}: eos_token_id must be a token id or a list of them")
            return frozenset(ids)
    return frozenset()


def rate(tokens: int, seconds: float) -> float:
    """Tokens per second, 0 if there was nothing to do."""
    return tokens / seconds if tokens and seconds else 0.0


def seconds_text(seconds: float) -> str:
    """`0.04 s`, `3.2 s`, `1:15`: the first token of a small model comes fast."""
    return f"{seconds:.2f} s" if seconds < 1 else human_seconds(seconds)


def statistics_json(statistics: "Statistics") -> dict[str, Any]:
    """What a run took, for `--json`."""
    drafted = statistics.drafted
    return {
        "prompt_tokens": statistics.prompt_tokens,
        "new_tokens": statistics.new_tokens,
        "prefill_tokens_per_second": rate(statistics.prompt_tokens, statistics.prefill_seconds),
        "decode_tokens_per_second": rate(statistics.decoded_tokens, statistics.decode_seconds),
        "first_token_seconds": statistics.first_token_seconds,
        "drafted_tokens": drafted,
        "accepted_tokens": statistics.accepted,
        "acceptance_rate": statistics.accepted / drafted if drafted else None,
        "peak_memory_bytes": peak_memory(),
    }


def tell_statistics(out: Output, statistics: "Statistics", mtp: bool) -> None:
    """The closing lines on stderr."""
    prefill = rate(statistics.prompt_tokens, statistics.prefill_seconds)
    decode = rate(statistics.decoded_tokens, statistics.decode_seconds)
    peak = peak_memory()
    out.say(
        f"prefill {statistics.prompt_tokens} tokens, {prefill:.1f} tokens/s; "
        f"decode {statistics.decoded_tokens} tokens, {decode:.1f} tokens/s; "
        f"first token after {seconds_text(statistics.first_token_seconds)}"
        + (f"; peak memory {human_bytes(peak)}" if peak else "")
    )
    if mtp:
        share = f" ({100 * statistics.accepted / statistics.drafted:.0f}%)" if statistics.drafted else ""
        out.say(f"drafts: {statistics.accepted} of {statistics.drafted} accepted{share}")


class Answers:
    """Generates the answers of many prompts, batch by batch."""

    def __init__(
        self, model: "Transformer", folder: str, generation: Generation, tokenizer: "TextTokenizer | None", out: Output
    ) -> None:
        from dsv4.model.generate import Statistics

        if generation.mtp and not model.has_mtp:
            raise UsageError("this checkpoint has no MTP block that can draft tokens", "Run without --mtp.")
        self.model, self.generation, self.tokenizer, self.out = model, generation, tokenizer, out
        self.stop_ids, self.sampling = stop_ids(folder), generation.sampling()
        self.statistics = Statistics()
        self.texts: list[AnswerText] = []

    def _new_texts(self, count: int) -> None:
        from dsv4.model.answer import AnswerText

        if self.tokenizer is not None:
            tokenizer, stop = self.tokenizer, self.generation.stop
            self.texts = [AnswerText(tokenizer, stop, self.stop_ids) for _ in range(count)]

    def run(
        self, prompts: list[Prompt], first: int, show: Callable[[str], None] | None, trace: "TraceWriter | None"
    ) -> list["Answer"]:
        """Answer one batch. `show` gets the text of a single answer as it grows."""
        from dsv4.model.generate import Limits, generate

        self._new_texts(len(prompts))

        def on_token(row: int, token: int) -> bool:
            if show is not None:
                bar.close()
            if not self.texts:
                return False
            piece = self.texts[row].add(token)
            if show is not None and piece:
                show(piece)
            return self.texts[row].stopped

        with TokenProgress(self.out, sum(len(prompt.tokens) for prompt in prompts), "prefill") as bar:
            answers, statistics, _ = generate(
                self.model,
                [prompt.tokens for prompt in prompts],
                Limits(self.generation.max_new_tokens, self.stop_ids),
                self.sampling,
                mtp=self.generation.mtp,
                first_row=first,
                on_token=on_token,
                on_progress=bar.advance,
                trace=trace,
            )
        if show is not None and self.texts:
            show(self.texts[0].rest())
        self.statistics.add(statistics)
        return answers


def answer_json(prompt: Prompt, answer: "Answer", text: str | None, mode: str) -> dict[str, Any]:
    """One answer for `--json`: tokens, text, and the parsed message if the prompt was made of messages."""
    from dsv4.model.answer import parse_answer

    result: dict[str, Any] = {"prompt_tokens": len(prompt.tokens), "tokens": answer.tokens, "finish": answer.finish}
    if text is not None:
        result["text"] = text
    if prompt.messages is not None and text is not None:
        result["message"], problem = parse_answer(text, mode)
        if problem:
            result["problem"] = problem
    return result


def _check_prompts(model: "Transformer", prompts: list[Prompt]) -> None:
    from dsv4.model.evaluate import check_tokens

    for prompt in prompts:
        check_tokens(prompt.tokens, model.config.vocab_size, model.config.max_position_embeddings)


def answer_prompts(answers: Answers, prompts: list[Prompt], dialogue: Dialogue, trace: "TraceWriter | None") -> int:
    """Answer all prompts and print the answers; the exit code. With a trace, one prompt at a time."""
    out, results = answers.out, []
    _check_prompts(answers.model, prompts)
    size = 1 if trace is not None else BATCH
    for first in range(0, len(prompts), size):
        batch = prompts[first : first + size]
        if trace is not None:
            trace.prompt = first
        show = (lambda piece: out.data(piece, end="")) if len(prompts) == 1 else None
        made = answers.run(batch, first, show, trace)
        for i, (prompt, answer) in enumerate(zip(batch, made, strict=True)):
            text = answers.texts[i].text if answers.texts else None
            results.append(answer_json(prompt, answer, text, dialogue.mode))
            if show is None and text is not None:
                out.say(f"[{first + i + 1}]")
                out.data(text)
            elif text is None:
                out.data(",".join(map(str, answer.tokens)))
            elif show is not None:
                out.data()
    tell_statistics(out, answers.statistics, answers.generation.mtp)
    statistics = statistics_json(answers.statistics)
    out.result({"answers": results, "seed": answers.sampling.seed, "statistics": statistics})
    return EXIT_DONE
