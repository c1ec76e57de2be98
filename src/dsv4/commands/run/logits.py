"""`dsv4 run --logits`: the logits of every position of given tokens, written to a file."""

from typing import TYPE_CHECKING, Any

from dsv4.errors import EXIT_DONE
from dsv4.files import result_file
from dsv4.machine import peak_memory
from dsv4.output import Output
from dsv4.text import human_bytes

from .answers import TokenProgress, rate, seconds_text
from .reads import reads_json, say_reads

if TYPE_CHECKING:
    from dsv4.model.evaluate.logits import Evaluation
    from dsv4.model.evaluate.trace import PositionedTrace
    from dsv4.model.transformer import Transformer


def timing(evaluation: "Evaluation") -> dict[str, Any]:
    """What an evaluation took, for `--json`."""
    decoded = len(evaluation.token_ids) - evaluation.prefill_tokens
    return {
        "tokens": len(evaluation.token_ids),
        "prefill_tokens": evaluation.prefill_tokens,
        "prefill_tokens_per_second": rate(evaluation.prefill_tokens, evaluation.prefill_seconds),
        "decode_tokens_per_second": rate(decoded, evaluation.decode_seconds),
        "first_token_seconds": evaluation.prefill_seconds,
        "peak_memory_bytes": peak_memory(),
    }


def say_timing(evaluation: "Evaluation", out: Output) -> None:
    """The same as two lines on stderr."""
    took = timing(evaluation)
    decoded = took["tokens"] - took["prefill_tokens"]
    line = f"prefill {took['prefill_tokens']} tokens, {took['prefill_tokens_per_second']:.1f} tokens/s"
    if decoded:
        line += f"; single steps {decoded} tokens, {took['decode_tokens_per_second']:.1f} tokens/s"
    out.say(line)
    first, peak = seconds_text(took["first_token_seconds"]), human_bytes(took["peak_memory_bytes"])
    out.say(f"first token after {first}, peak memory {peak}")


def save_logits(
    model: "Transformer",
    tokens: list[int],
    prefill: int | None,
    path: str,
    trace: "PositionedTrace | None",
    out: Output,
) -> int:
    """Write the logits of every position to `path`; the exit code. Of several ranks the first writes."""
    from dsv4.model.evaluate.logits import named_tensors, teacher_forced, write_logits

    with TokenProgress(out, len(tokens), "computing") as bar:
        evaluation = teacher_forced(model, tokens, prefill, trace=trace, on_progress=bar.advance)
    if out.mode == "silent":
        return EXIT_DONE
    with result_file(path, out.warn_once) as file:
        write_logits(evaluation, file)
    out.say(f"wrote logits of {len(tokens)} positions to {path}")
    say_timing(evaluation, out)
    say_reads(model, out)
    shapes = {name: list(t.shape) for name, t in named_tensors(evaluation).items() if name != "token_ids"}
    took = {**timing(evaluation), **reads_json(model)}
    out.result({"file": path, "shapes": shapes, "statistics": took})
    return EXIT_DONE
