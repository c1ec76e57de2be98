"""`dsv4 run`: talk to a checkpoint, compute its logits, or compare it with another one."""

import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsv4 import output
from dsv4.commands.encode import Mode, ModeOption
from dsv4.errors import InputError, Interrupted, UsageError, printable
from dsv4.options import Json, Verbose, example, named, parse_size

from .answers import Answers, Generation, answer_prompts
from .compare import compare_checkpoints, save_logits
from .prompts import Dialogue, Prompt, Sources, gather
from .source import Loading, Source, load_model, open_source

if TYPE_CHECKING:
    from dsv4.distributed import Ranks
    from dsv4.model.chat.tokenizer import TextTokenizer
    from dsv4.model.evaluate.trace import TraceWriter

EPILOG = example(
    "dsv4 run ./DeepSeek-V4-Flash",
    'dsv4 run ./DeepSeek-V4-Flash -p "Why is the sky blue?" --mode think',
    "dsv4 run ./DeepSeek-V4-Flash --tokens 0,17,4 --logits logits.safetensors",
    'dsv4 run ./DeepSeek-V4-Flash -p "Hello" --compare ./Flash-FP8',
    'torchrun --nproc-per-node 8 -m dsv4 run ./DeepSeek-V4-Flash -p "Hello"',
)


@dataclass(frozen=True)
class _Request:
    """One command line, sorted by what the parts decide."""

    checkpoint: str
    sources: Sources
    dialogue: Dialogue
    loading: Loading
    generation: Generation
    logits: str | None
    compare: str | None
    prefill: int | None
    tolerance: float
    report: str | None
    trace: str | None
    ranks: "Ranks | None" = None

    def __post_init__(self) -> None:
        problems = [
            (self.logits and self.compare, "--logits and --compare cannot be used together"),
            (self.prefill and not (self.logits or self.compare), "--prefill belongs to --logits and --compare"),
            (self.report and not self.compare, "--report belongs to --compare"),
            (self.trace and self.compare, "--compare traces both by itself, leave out --trace"),
            (self.generation.mtp and (self.logits or self.compare), "--logits and --compare run the MTP block anyway"),
            (self.logits and self.sources.interactive, "--logits needs a prompt: a text, --messages or --tokens"),
            (self.compare and self.sources.interactive, "--compare needs a prompt: a text, --messages or --tokens"),
            (self.ranks and ":" in self.loading.device, f"ranks have a device each: --device {self.loading.kind}"),
            (self.ranks and self.sources.interactive, "a chat is for one process: several need a prompt"),
            (self.trace and self.sources.interactive, "--trace needs a prompt: a text, --messages or --tokens"),
        ]
        for wrong, text in problems:
            if wrong:
                raise UsageError(text)
        if self.sources.tokens is not None and (self.generation.stop or self.dialogue != Dialogue()):
            raise UsageError("--tokens needs no encoding", "Leave out --mode, --system, --tools, --raw and --stop.")


@contextmanager
def _tracing(path: str | None) -> Iterator["TraceWriter | None"]:
    """The trace file, if one was asked for, closed at the end."""
    if path is None:
        yield None
        return
    from dsv4.model.evaluate.trace import TraceWriter

    writer = TraceWriter(path)
    try:
        yield writer
    finally:
        writer.close()


def _check_outputs(paths: Iterable[str | None]) -> None:
    """Raise InputError for a file that cannot be written, before hours of computing and not after."""
    for path in paths:
        if path is not None and not Path(path).parent.is_dir():
            raise InputError(f"{printable(path)}: the folder does not exist", "Create it first.")
        if path is not None and Path(path).is_dir():
            raise InputError(f"{printable(path)} is a folder", "Name a file.")


def _single(prompts: list[Prompt]) -> list[int]:
    if len(prompts) != 1:
        raise UsageError(f"--logits and --compare work on one prompt, there are {len(prompts)}")
    return prompts[0].tokens


def _chat(request: _Request, source: Source, tokenizer: "TextTokenizer", out: output.Output) -> int:
    from .chat import Chat, talk

    if out.mode == "json":
        raise UsageError("--json needs a prompt", "A chat has no one result: add -p, --messages, --file or --tokens.")
    rules = request.generation.rules(source)
    model = load_model(source, request.loading, out)
    return talk(Chat(model, source, tokenizer, request.dialogue, rules, out))


def _answer(
    request: _Request, source: Source, prompts: list[Prompt], tokenizer: "TextTokenizer | None", out: output.Output
) -> int:
    rules = request.generation.rules(source)
    model = load_model(source, request.loading, out)
    with _tracing(request.trace) as writer:
        return answer_prompts(Answers(model, rules, tokenizer, out), prompts, request.dialogue, writer)


def _gather(request: _Request, tokenizer: "TextTokenizer | None") -> list[Prompt]:
    """All prompts. Of several ranks the first reads them: stdin is not there for all."""

    def read() -> list[Prompt]:
        return gather(request.sources, request.dialogue, tokenizer)

    return request.ranks.first(read) if request.ranks else read()


def _execute(request: _Request, out: output.Output) -> int:
    """Do what was asked for; the exit code."""
    from dsv4.model.chat.tokenizer import load_tokenizer

    source = open_source(request.checkpoint, out)
    if out.mode != "silent":
        _check_outputs((request.logits, request.report, request.trace))
    tokenizer = None if request.sources.tokens is not None else load_tokenizer(request.checkpoint)
    if request.sources.interactive and tokenizer is not None:
        return _chat(request, source, tokenizer, out)
    prompts = _gather(request, tokenizer)
    for prompt in prompts:
        source.check_prompt(prompt.tokens)
    if request.compare is not None:
        sources = (source, open_source(request.compare, out))
        tolerance, report = request.tolerance, request.report
        return compare_checkpoints(sources, request.loading, _single(prompts), request.prefill, tolerance, report, out)
    if request.logits is not None:
        tokens = _single(prompts)
        model = load_model(source, request.loading, out)
        with _tracing(request.trace) as writer:
            return save_logits(model, tokens, request.prefill, request.logits, out, writer)
    return _answer(request, source, prompts, tokenizer, out)


def _execute_as_rank(request: _Request, ranks: "Ranks", out: output.Output) -> int:
    """The same by all ranks together: each runs its share of the model, the first reads, speaks and writes."""
    from dsv4.distributed import joined

    with joined(ranks, request.loading.device):
        generation = request.generation
        if generation.seed is None:
            generation = replace(generation, seed=ranks.first(lambda: secrets.randbits(32)))
        request = replace(request, generation=generation)
        if not ranks.is_first:
            request = replace(request, report=None, trace=request.trace and os.devnull)
        code = _execute(request, out)
        ranks.leave()
    return code


def run(
    checkpoint: Annotated[
        str, typer.Argument(parser=named, metavar="CHECKPOINT", help="Folder of a checkpoint, in any format.")
    ],
    text: Annotated[str | None, typer.Argument(metavar="PROMPT", help="A question; none starts a chat.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="The same as PROMPT.")] = None,
    file: Annotated[
        str | None, typer.Option("--file", metavar="FILE", help="A prompt per line, or a JSON list of message lists.")
    ] = None,
    messages: Annotated[
        str | None, typer.Option("--messages", metavar="FILE", help="OpenAI-style messages; - reads stdin.")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option("--tokens", metavar="IDS", help="Token ids, 0,17,4 or a file; needs no tokenizer.")
    ] = None,
    mode: ModeOption = Mode.chat,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="The system message.")] = None,
    tools: Annotated[
        str | None, typer.Option("--tools", metavar="FILE", help="JSON list of tools that the model may call.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Send the text as it is, without the encoding.")] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", metavar="N", min=1, help="Longest answer.")] = 1024,
    temperature: Annotated[
        float, typer.Option("--temperature", metavar="X", min=0, help="0 takes the likeliest token.")
    ] = 1.0,
    top_p: Annotated[
        float,
        typer.Option(
            "--top-p", metavar="X", min=0, max=1, help="Draw from the likeliest tokens that reach this share."
        ),
    ] = 1.0,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", min=0, help="Draw the same tokens again.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="End the answer at this text; may be repeated.")
    ] = None,
    mtp: Annotated[bool, typer.Option("--mtp", help="Draft tokens with the MTP block; same answer.")] = False,
    logits: Annotated[
        str | None, typer.Option("--logits", metavar="FILE", help="Write the logits of every position (safetensors).")
    ] = None,
    prefill: Annotated[
        int | None, typer.Option("--prefill", metavar="K", min=1, help="Compute K tokens at once, the rest one by one.")
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            "--compare",
            parser=named,
            metavar="OTHER",
            help="Run another checkpoint on the same tokens and compare.",
        ),
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option("--tolerance", metavar="X", min=0, help="Largest difference of a logit that counts as the same."),
    ] = 0.0,
    report: Annotated[
        str | None, typer.Option("--report", metavar="FILE", help="Write the comparison as an HTML page.")
    ] = None,
    trace: Annotated[
        str | None, typer.Option("--trace", metavar="FILE", help="Write every module's statistics (JSON lines).")
    ] = None,
    no_simulation: Annotated[
        bool, typer.Option("--no-simulation", help="Compute in float32, without the simulated quantizations.")
    ] = False,
    max_memory: Annotated[
        str | None,
        typer.Option(
            "--max-memory",
            metavar="SIZE",
            help="Weights kept in memory; the rest is read when needed. Default: what is free, with a margin.",
        ),
    ] = None,
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="cpu, cuda, mps or any other torch device.")
    ] = "cpu",
    json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the answer and errors only.")] = False,
    verbose: Verbose = False,
) -> None:
    """Answer prompts, write logits, or compare two checkpoints, with dsv4's own engine."""
    from dsv4.distributed import launched

    ranks = launched()
    out = output.configure(json, quiet, verbose, ranks)
    if text is not None and prompt is not None:
        raise UsageError("the prompt is given twice", "Use either PROMPT or -p.")
    request = _Request(
        checkpoint=checkpoint,
        sources=Sources(text if prompt is None else prompt, file, messages, tokens),
        dialogue=Dialogue(mode.value, system, tools, raw),
        loading=Loading(device, not no_simulation, None if max_memory is None else parse_size(max_memory), ranks),
        generation=Generation(temperature, top_p, seed, max_new_tokens, tuple(stop or ()), mtp),
        logits=logits,
        compare=compare,
        prefill=prefill,
        tolerance=tolerance,
        report=report,
        trace=trace,
        ranks=ranks,
    )
    try:
        code = _execute_as_rank(request, ranks, out) if ranks else _execute(request, out)
    except Interrupted as error:
        error.hint = ""  # nothing is kept and there is nothing to continue
        raise
    if code:
        raise typer.Exit(code)
