"""`dsv4 encode`: the exact prompt that a list of messages becomes."""

import sys
from dataclasses import dataclass
from typing import Annotated

import typer

from dsv4 import output
from dsv4.commands.prompting import (
    Asked,
    EditionOption,
    EffortOption,
    Mode,
    ModeOption,
    choose_edition,
    choose_style,
    warn_of_missing_tokens,
    write_prompt,
)
from dsv4.errors import UsageError
from dsv4.options import Json, Verbose, command, example, named

__all__ = ["Mode", "ModeOption"]


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """The command line of one `dsv4 encode`. Raises UsageError for options that contradict each other."""

    messages: Annotated[
        str,
        typer.Argument(
            parser=named, metavar="MESSAGES.json", help="OpenAI-style messages, or a request with tools; - reads stdin."
        ),
    ]
    mode: ModeOption = None
    effort: EffortOption = None
    edition: EditionOption = None
    context: Annotated[
        str | None, typer.Option("--context", metavar="FILE", help="Messages before these, encoded already.")
    ] = None
    keep_thinking: Annotated[
        bool, typer.Option("--keep-thinking", help="Keep the reasoning of answers before the last question.")
    ] = False
    no_bos: Annotated[bool, typer.Option("--no-bos", help="Leave out the begin-of-sentence token.")] = False
    ids: Annotated[bool, typer.Option("--ids", help="Print token ids instead of text; needs --tokenizer.")] = False
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", metavar="CHECKPOINT", help="The checkpoint: its tokenizer.json and its edition."),
    ] = None
    json: Json = False
    verbose: Verbose = False

    def __post_init__(self) -> None:
        if self.ids and self.tokenizer is None:
            raise UsageError("--ids needs a tokenizer", "Add --tokenizer CHECKPOINT.")

    @property
    def asked(self) -> Asked:
        """The options that decide how the prompt is made."""
        return Asked(self.mode, self.effort, self.edition)


@command
def encode(options: EncodeOptions) -> None:
    """Print the exact prompt that a list of messages becomes."""
    out = output.configure(options.json, verbose=options.verbose)
    from dsv4.model.chat.messages import read_request
    from dsv4.model.chat.tokenizer import load_tokenizer

    request = read_request(options.messages)
    edition = choose_edition(options.asked, options.tokenizer, out)
    style = choose_style(options.asked, request, edition.name)
    prompt = write_prompt(
        request,
        style,
        out,
        keep_thinking=options.keep_thinking,
        context=read_request(options.context).messages if options.context else None,
        bos=not options.no_bos,
    )
    result = {"prompt": prompt.text, **style.to_json(), "edition_reason": edition.reason, "remarks": prompt.remarks}
    if options.ids and options.tokenizer is not None:
        tokenizer = load_tokenizer(options.tokenizer)
        warn_of_missing_tokens(tokenizer, edition, out)
        ids = tokenizer.encode(prompt.text)
        out.text(",".join(map(str, ids)))
        out.result({**result, "ids": ids})
    else:
        # Byte for byte in a file or pipe; a terminal's own prompt wants a line of its own.
        out.data(prompt.text, end="\n" if sys.stdout.isatty() else "")
        out.result(result)


EPILOG = example(
    "dsv4 encode messages.json",
    "dsv4 encode messages.json --mode think --ids --tokenizer ./DeepSeek-V4-Flash",
    "dsv4 encode messages.json --edition v41 --effort 60",
)
