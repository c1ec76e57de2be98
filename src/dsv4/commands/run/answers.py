"""`dsv4 run` with prompts: loads the model, generates in batches, prints the answers and statistics."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from dsv4.errors import EXIT_DONE
from dsv4.machine import peak_memory
from dsv4.output import Output
from dsv4.text import counted, human_bytes, human_seconds

from .options import RunOptions
from .prompts import Dialogue, Prompt
from .reads import reads_json, say_reads
from .source import Source

if TYPE_CHECKING:
    from dsv4.model.chat.answer import AnswerText
    from dsv4.model.chat.tokenizer import TextTokenizer
    from dsv4.model.evaluate.trace import TraceWriter
    from dsv4.model.generate import Answer, Limits, Statistics
    from dsv4.model.sampling import Sampling
    from dsv4.model.transformer import Transformer

BATCH = 8  # prompts of --file computed together


@dataclass(frozen=True)
class Generation:
    """How answers are made and when they end. stop: texts that end an answer. draft: whether the draft stages
    propose tokens.
    """

    sampling: "Sampling"
    limits: "Limits"
    stop: tuple[str, ...]
    draft: bool

    @classmethod
    def of(cls, options: RunOptions, source: Source, seed: int) -> Self:
        """From the command line, for one checkpoint. Raises UsageError for values out of range and missing features."""
        from dsv4.model.generate import Limits
        from dsv4.model.sampling import Sampling

        if options.draft:
            source.require_draft_stages()
        sampling = Sampling(options.temperature, options.top_p, seed)
        limits = Limits(options.max_new_tokens, source.stop_ids())
        return cls(sampling, limits, tuple(options.stop or ()), options.draft)


class TokenProgress:
    """A passing bar over tokens that takes fractions of them. `close` may be called again."""

    def __init__(self, out: Output, tokens: int, what: str) -> None:
        self._bar, self._done, self._closed = out.progress(tokens, what, " tokens", passing=True), 0.0, False

    def advance(self, tokens: float) -> None:
        """`tokens` more are done."""
        self._done += tokens
        self._bar.advance(round(self._done) - self._bar.done)

    def clear(self) -> None:
        """Wipe the bar out until the next advance, so that a line can be printed."""
        self._bar.clear()

    def close(self) -> None:
        """Remove the bar: the answer follows on the terminal."""
        if not self._closed:
            self._closed = True
            self._bar.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def rate(tokens: int, seconds: float) -> float:
    """Tokens per second, 0 if there was nothing to do."""
    return tokens / seconds if tokens and seconds else 0.0


def seconds_text(seconds: float) -> str:
    """`0.04 s`, `3.2 s`, `1:15`: the first token of a small model comes fast."""
    return f"{seconds:.2f} s" if seconds < 1 else human_seconds(seconds)


def statistics_json(statistics: "Statistics") -> dict[str, Any]:
    """Statistics of a run, for `--json`."""
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
        "decode_steps": statistics.steps,
        "tokens_per_step": statistics.decoded_tokens / statistics.steps if statistics.steps else None,
        "peak_memory_bytes": peak_memory(),
    }


def say_statistics(out: Output, statistics: "Statistics", draft: bool) -> None:
    """The closing lines on stderr."""
    prefill = rate(statistics.prompt_tokens, statistics.prefill_seconds)
    decode = rate(statistics.decoded_tokens, statistics.decode_seconds)
    decoded = f"; decode {counted(statistics.decoded_tokens, 'token')}, {decode:.1f} tokens/s"
    out.say(
        f"prefill {counted(statistics.prompt_tokens, 'token')}, {prefill:.1f} tokens/s"
        + (decoded if statistics.decoded_tokens else "")
    )
    first = seconds_text(statistics.first_token_seconds)
    out.say(f"first token after {first}, peak memory {human_bytes(peak_memory())}")
    if draft and statistics.decoded_tokens:
        share = f" ({100 * statistics.accepted / statistics.drafted:.0f}%)" if statistics.drafted else ""
        out.say(f"drafts: {statistics.accepted} of {statistics.drafted} accepted{share}")
        if statistics.steps:
            each = statistics.decoded_tokens / statistics.steps
            out.say(f"decode in {statistics.steps} steps, {each:.2f} tokens per step")


class Answers:
    """Generates the answers of many prompts, batch by batch."""

    def __init__(
        self, model: "Transformer", generation: Generation, tokenizer: "TextTokenizer | None", out: Output
    ) -> None:
        from dsv4.model.generate import Statistics

        self.model, self.generation, self.tokenizer, self.out = model, generation, tokenizer, out
        self.statistics = Statistics()
        self.texts: list[AnswerText] = []

    def _new_texts(self, count: int) -> None:
        from dsv4.model.chat.answer import AnswerText

        if self.tokenizer is not None:
            tokenizer, stop, ids = self.tokenizer, self.generation.stop, self.generation.limits.stop_ids
            self.texts = [AnswerText(tokenizer, stop, ids) for _ in range(count)]

    def run(
        self, prompts: list[Prompt], first: int, show: Callable[[str], None] | None, trace: "TraceWriter | None"
    ) -> list["Answer"]:
        """Answer one batch. `show` gets the text of a single answer as it grows."""
        from dsv4.model.generate import generate

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
                self.generation.limits,
                self.generation.sampling,
                draft=self.generation.draft,
                first_row=first,
                on_token=on_token,
                on_progress=bar.advance,
                trace=trace,
            )
        if show is not None and self.texts:
            show(self.texts[0].rest())
        self.statistics.add(statistics)
        return answers


def answer_json(prompt: Prompt, answer: "Answer", text: str | None) -> dict[str, Any]:
    """One answer for `--json`: tokens, text, and the parsed message if the prompt was made of messages."""
    from dsv4.model.chat.answer import parse_answer

    result: dict[str, Any] = {"prompt_tokens": len(prompt.tokens), "tokens": answer.tokens, "finish": answer.finish}
    if text is not None:
        result["text"] = text
    if prompt.written is not None and text is not None:
        style = prompt.written.style
        result |= {**style.to_json(), "remarks": prompt.written.remarks}
        result["message"], problem = parse_answer(text, prompt.written.answer_mode, style.edition)
        if problem:
            result["problem"] = problem
    return result


def answer_prompts(answers: Answers, prompts: list[Prompt], dialogue: Dialogue, trace: "TraceWriter | None") -> int:
    """Answer all prompts and print the answers; the exit code. With a trace, one prompt at a time."""
    out, results = answers.out, []
    size = 1 if trace is not None else BATCH
    for first in range(0, len(prompts), size):
        batch = prompts[first : first + size]
        if trace is not None:
            trace.prompt = first
        show = (lambda piece: out.data(piece, end="")) if len(prompts) == 1 else None
        made = answers.run(batch, first, show, trace)
        for i, (prompt, answer) in enumerate(zip(batch, made, strict=True)):
            text = answers.texts[i].text if answers.texts else None
            results.append(answer_json(prompt, answer, text))
            if show is None and text is not None:
                out.say(f"[{first + i + 1}]")
                out.data(text)
            elif text is None:
                out.data(",".join(map(str, answer.tokens)))
            elif show is not None:
                out.data()
    say_statistics(out, answers.statistics, answers.generation.draft)
    say_reads(answers.model, out)
    result = {"answers": results, "seed": answers.generation.sampling.seed}
    if dialogue.edition is not None:
        result["edition_reason"] = dialogue.edition.reason
    took = {**statistics_json(answers.statistics), **reads_json(answers.model)}
    out.result({**result, "statistics": took})
    return EXIT_DONE
