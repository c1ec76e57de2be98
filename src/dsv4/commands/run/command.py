"""`dsv4 run`: talk to a checkpoint, compute its logits, or compare it with another one.

A command line becomes a `RunOptions`, then engine values: a `Placement` (device, rank, memory), the prompts as token
ids, and for answers a `Generation`. Everything that can be wrong is checked before the weights are read.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import typer

from dsv4 import machine, output, signals
from dsv4.commands.prompting import warn_of_missing_tokens
from dsv4.errors import InputError, Interrupted, UsageError
from dsv4.files import check_writable, result_file
from dsv4.machine import parse_size
from dsv4.options import as_typed, command, example

from .answers import BATCH, Answers, Generation, answer_prompts
from .compare import compare_checkpoints, compare_with_logits
from .hub.costs import costs_of, print_costs
from .logits import save_logits
from .options import RunOptions
from .placement import Placement, Work, kind_of, load_model, place, working_memory
from .prompts import Dialogue, Prompt, check_tokens_argument, gather, suite_prompts
from .source import Source, open_source

if TYPE_CHECKING:
    from dsv4.commands.distributed import Ranks
    from dsv4.model.chat.tokenizer import TextTokenizer
    from dsv4.model.evaluate.trace import TraceWriter
    from dsv4.referee.servers import Identity

CHAT_CONTEXT = 65536  # tokens whose keys have room from the start; the keys of a longer chat come on top

EPILOG = example(
    "dsv4 run ./DeepSeek-V4-Flash",
    'dsv4 run ./DeepSeek-V4-Flash -p "Why is the sky blue?" --mode think',
    "dsv4 run ./DeepSeek-V4-Flash --tokens 0,17,4 --logits logits.safetensors",
    'dsv4 run ./DeepSeek-V4-Flash -p "Hello" --compare ./Flash-FP8',
    "dsv4 run ./DeepSeek-V4-Flash --suite --compare http://localhost:8000",
    'torchrun --nproc-per-node 8 -m dsv4 run ./DeepSeek-V4-Flash -p "Hello"',
)


def _check_ranks(options: RunOptions, ranks: "Ranks | None") -> None:
    """Raise UsageError for options that several processes do not support."""
    if ranks is not None and ":" in options.device:
        raise UsageError(f"ranks have a device each: --device {kind_of(options.device)}")
    if ranks is not None and options.is_chat:
        raise UsageError("a chat is for one process: several need a prompt")


def _check_outputs(options: RunOptions) -> None:
    """Raise before the work if an output file cannot be written."""
    for path in (options.logits, options.report, options.trace):
        if path is not None:
            check_writable(path)


@contextmanager
def _tracing(path: str | None) -> Iterator["TraceWriter | None"]:
    """The trace that is written to `path`, None without one."""
    if path is None:
        yield None
        return
    from dsv4.model.evaluate.trace import TraceWriter

    with result_file(path, output.current().warn_once) as file:
        yield TraceWriter(file)


@dataclass(frozen=True)
class _Run:
    """One command line, in one process or in one of several ranks, of which only the first writes."""

    options: RunOptions
    ranks: "Ranks | None"
    source: Source
    tokenizer: "TextTokenizer | None"
    dialogue: Dialogue
    out: output.Output

    def prompts(self) -> list[Prompt]:
        """All prompts, checked. Of several ranks the first reads them: the others have no stdin."""

        def read() -> list[Prompt]:
            if self.options.suite and self.tokenizer is not None:
                return suite_prompts(self.source.config, self.dialogue, self.tokenizer, self.out)
            return gather(self.options, self.dialogue, self.tokenizer, self.out)

        prompts = self.ranks.first(read) if self.ranks else read()
        for prompt in prompts:
            self.source.check_prompt(prompt.tokens)
        return prompts

    def placement(self, work: Work) -> Placement:
        """Where this process computes, with memory for this work beside the weights."""
        options = self.options
        working = working_memory(self.source.config, work, not options.no_simulation) + self.source.buffer_bytes
        size = None if options.max_memory is None else parse_size(options.max_memory)
        placement = place(options.device, not options.no_simulation, size, self.ranks, working)
        return replace(placement, released_index_keys=options.released_index_keys)

    def generation(self) -> Generation:
        """How answers are made. Without --seed one is drawn, the same for all ranks."""
        seed = self.options.seed
        if seed is None:
            seed = self.ranks.first(lambda: secrets.randbits(32)) if self.ranks else secrets.randbits(32)
        return Generation.of(self.options, self.source, seed)

    @property
    def trace(self) -> str | None:
        """The file for the trace. All ranks trace, so that all make the same calls, and the first one's is kept."""
        kept = self.options.trace is None or self.ranks is None or self.ranks.is_first
        return self.options.trace if kept else os.devnull

    @property
    def _answer_rows(self) -> int:
        """Rows of logits that a step of an answer computes: more than one with drafts."""
        return self.source.rows_per_step if self.options.draft else 1

    def chat(self, tokenizer: "TextTokenizer") -> int:
        """Talk to the user; the exit code."""
        from .chat import Chat, talk

        generation = self.generation()
        context = min(self.source.config.max_position_embeddings, CHAT_CONTEXT)
        placement = self.placement(Work(1, context, context, rows=self._answer_rows))
        model = load_model(self.source, placement, self.out, generation.draft)
        return talk(Chat(model, self.source, tokenizer, self.dialogue, generation, self.out))

    def answer(self, prompts: list[Prompt]) -> int:
        """Answer all prompts; the exit code."""
        generation, longest = self.generation(), max(len(prompt.tokens) for prompt in prompts)
        work = Work(min(len(prompts), BATCH), longest, longest + self.options.max_new_tokens, rows=self._answer_rows)
        model = load_model(self.source, self.placement(work), self.out, generation.draft)
        with _tracing(self.trace) as trace:
            return answer_prompts(Answers(model, generation, self.tokenizer, self.out), prompts, self.dialogue, trace)

    def logits(self, tokens: list[int], path: str) -> int:
        """Write the logits of the tokens; the exit code."""
        model = load_model(self.source, self._for_logits(tokens), self.out, draft=True)
        with _tracing(self.trace) as trace:
            return save_logits(model, tokens, self.options.prefill, path, trace, self.out)

    def compare(self, tokens: list[int], other: Source) -> int:
        """Compare the logits of two checkpoints; the exit code."""
        return compare_checkpoints((self.source, other), self._for_logits(tokens), tokens, self.options, self.out)

    def compare_with_server(self, prompts: list[Prompt], address: str) -> int:
        """Compare the log-probabilities of a running server; the exit code."""
        from dsv4.referee.client import SECONDS_TO_ANSWER, Client, api_key
        from dsv4.referee.command import ask, compare_with_server
        from dsv4.referee.servers import recognise
        from dsv4.referee.words import Comparison

        options = self.options
        client = Client(address, api_key(options.api_key), options.timeout or SECONDS_TO_ANSWER)
        server, identity = recognise(client, options.server)
        if options.suite:
            prompts = _within_context(prompts, identity, self.out)
        tokens = [prompt.tokens for prompt in prompts]
        names = [prompt.name or f"prompt {number}" for number, prompt in enumerate(prompts)]
        asked = ask(client, (server, identity), tokens, self.out)
        longest = max(map(len, tokens))
        model = load_model(self.source, self.placement(Work(1, longest, longest, 2 * longest)), self.out, draft=False)
        line = as_typed("dsv4 run", options)
        what = Comparison(options.checkpoint, address, names, tokens, line, options.report)
        return compare_with_server(what, asked, model, self.out)

    def compare_with_file(self, prompts: list[Prompt], path: str) -> int:
        """Compare with the logits that another run wrote; the exit code."""
        from dsv4.model.evaluate.logits import read_logits

        earlier = read_logits(path)
        if prompts and _single(prompts) != earlier.token_ids:
            raise InputError(f"{path} has the logits of other tokens", "Leave out the prompt: the file has its own.")
        self.source.check_prompt(earlier.token_ids)
        return compare_with_logits(self.source, self._for_logits(earlier.token_ids), earlier, self.options, self.out)

    def compute(self, prompts: list[Prompt], other: Source | None) -> int:
        """Do what the options ask for; the exit code. `other`: the checkpoint to compare with, if it is one."""
        options = self.options
        if other is not None:
            return self.compare(_single(prompts), other)
        if options.compare is not None and options.asks_a_server:
            return self.compare_with_server(prompts, options.compare)
        if options.compare is not None:
            return self.compare_with_file(prompts, options.compare)
        if options.logits is not None:
            return self.logits(_single(prompts), options.logits)
        return self.answer(prompts)

    def costs(self, sources: list[Source], prompts: list[Prompt]) -> int:
        """Print what the run would read and fetch; the exit code."""
        options = self.options
        rows = self.source.rows_per_position if options.teacher_forced else self._answer_rows
        new = 0 if options.teacher_forced else options.max_new_tokens
        tokens = sum(len(prompt.tokens) + new for prompt in prompts) * rows if prompts else None
        draft = options.draft or (options.teacher_forced and not options.asks_a_server)
        return print_costs([costs_of(source, tokens, draft) for source in sources], self.out)

    def _for_logits(self, tokens: list[int]) -> Placement:
        """With memory for the logits of every position, of both checkpoints where two are compared."""
        checkpoints = 1 if self.options.compare is None else 2
        work = Work(1, len(tokens), len(tokens), checkpoints * len(tokens), self.source.rows_per_position)
        return self.placement(work)


def _within_context(prompts: list[Prompt], identity: "Identity", out: output.Output) -> list[Prompt]:
    """The prompts that a server was started for."""
    from dsv4.referee.command import fits

    kept = [prompt for prompt in prompts if fits(prompt.tokens, identity)]
    if len(kept) < len(prompts):
        text = f"{len(prompts) - len(kept)} prompt(s) of the suite are left out: {identity.kind} was started for"
        out.warn(f"{text} {identity.context} tokens")
    return kept or prompts[:1]  # which is refused then


def _single(prompts: list[Prompt]) -> list[int]:
    if len(prompts) != 1:
        raise UsageError(f"--logits and --compare work on one prompt, there are {len(prompts)}")
    return prompts[0].tokens


def _check_inputs(options: RunOptions) -> None:
    """Raise, before torch is imported, for what does not exist and for a size that is none."""
    from dsv4.convert.hub.source import folder_or_repository

    folder_or_repository(options.checkpoint, options.revision)
    if options.compares_checkpoints and options.compare is not None:
        folder_or_repository(options.compare)
    for path in (options.file, options.messages, options.tools):
        if path not in (None, "-"):
            os.stat(path)
    if options.tokens is not None:
        check_tokens_argument(options.tokens)
    if options.max_memory is not None:
        parse_size(options.max_memory)


def _execute(options: RunOptions, ranks: "Ranks | None", stack: ExitStack, out: output.Output) -> int:
    """Run the command; returns the exit code. What is opened is closed by `stack`."""
    from dsv4.model.chat.tokenizer import load_tokenizer

    if out.mode != "silent":
        _check_outputs(options)
    _check_inputs(options)
    source = open_source(options.checkpoint, options, stack, out)
    without_text = options.tokens is not None or (options.compares_with_a_file and options.is_chat)
    tokenizer = None if without_text else load_tokenizer(source.files)
    dialogue = Dialogue.of(options, source.files, source.has_vision, out)
    if tokenizer is not None and dialogue.edition is not None:
        warn_of_missing_tokens(tokenizer, dialogue.edition, out)
    work = _Run(options, ranks, source, tokenizer, dialogue, out)
    is_chat = options.is_chat and not options.has_own_prompt
    if is_chat and tokenizer is not None and not options.dry_run:
        return work.chat(tokenizer)
    prompts = [] if is_chat or (options.compares_with_a_file and options.is_chat) else work.prompts()
    other = None
    if options.compares_checkpoints and options.compare is not None:
        other = open_source(options.compare, options, stack, out)
    if options.dry_run:
        return work.costs([source] if other is None else [source, other], prompts)
    return work.compute(prompts, other)


@command
def run(options: RunOptions) -> None:
    """Answer prompts, write logits, or compare two checkpoints, with dsv4's own engine."""
    machine.use_large_pages()  # before the next line imports torch
    from dsv4.commands.distributed import process_group, torchrun_rank

    ranks = torchrun_rank()
    out = output.configure(options.json, options.quiet, options.verbose, ranks)
    _check_ranks(options, ranks)
    signals.begin_work()
    try:
        with process_group(ranks, options.device) if ranks else nullcontext():
            with ExitStack() as stack:
                code = _execute(options, ranks, stack, out)
            if ranks:
                ranks.barrier()
    except Interrupted as error:
        if "is kept" not in error.hint:  # what was fetched from a hub
            error.hint = ""  # no result is kept
        raise
    if code:
        raise typer.Exit(code)
