"""`dsv4 encode`: the exact prompt that a list of messages becomes."""

import sys
from enum import StrEnum
from typing import Annotated

import typer

from dsv4 import output
from dsv4.errors import UsageError
from dsv4.options import Json, example, named


class Mode(StrEnum):
    """The release's three modes."""

    chat = "chat"
    think = "think"
    think_max = "think-max"


ModeOption = Annotated[
    Mode, typer.Option("--mode", help="chat: answer at once; think: reason first; think-max: reason at length.")
]


def encode(
    messages: Annotated[
        str, typer.Argument(parser=named, metavar="MESSAGES.json", help="OpenAI-style messages; - reads stdin.")
    ],
    mode: ModeOption = Mode.chat,
    context: Annotated[
        str | None, typer.Option("--context", metavar="FILE", help="Messages before these, encoded already.")
    ] = None,
    keep_thinking: Annotated[
        bool, typer.Option("--keep-thinking", help="Keep the reasoning of answers before the last question.")
    ] = False,
    no_bos: Annotated[bool, typer.Option("--no-bos", help="Leave out the begin-of-sentence token.")] = False,
    ids: Annotated[bool, typer.Option("--ids", help="Print token ids instead of text; needs --tokenizer.")] = False,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", metavar="CHECKPOINT", help="The folder with tokenizer.json.")
    ] = None,
    json: Json = False,
) -> None:
    """Print the exact prompt that a list of messages becomes."""
    out = output.configure(json)
    if ids and tokenizer is None:
        raise UsageError("--ids needs a tokenizer", "Add --tokenizer CHECKPOINT.")
    from dsv4.model.chat.encoding import encode_messages
    from dsv4.model.chat.messages import read_messages
    from dsv4.model.chat.protocol import MODES
    from dsv4.model.chat.tokenizer import load_tokenizer

    thinking_mode, effort = MODES[mode]
    prompt = encode_messages(
        read_messages(messages),
        thinking_mode=thinking_mode,
        drop_thinking=not keep_thinking,
        reasoning_effort=effort,
        context=read_messages(context) if context else None,
        add_default_bos_token=not no_bos,
    )
    if ids and tokenizer is not None:
        numbers = load_tokenizer(tokenizer).encode(prompt)
        out.text(",".join(map(str, numbers)))
        out.result({"prompt": prompt, "ids": numbers})
    else:
        # Byte for byte in a file or pipe; a terminal's own prompt wants a line of its own.
        out.text(prompt, end="\n" if sys.stdout.isatty() else "")
        out.result({"prompt": prompt})


EPILOG = example(
    "dsv4 encode messages.json",
    "dsv4 encode messages.json --mode think --ids --tokenizer ./DeepSeek-V4-Flash",
)
