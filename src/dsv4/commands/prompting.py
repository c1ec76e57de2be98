"""How a prompt is made: decided by the options of `encode` and `run`, by a request, and by the checkpoint.

The command line has priority over a request, and a request over the edition's default.
"""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsv4.errors import UsageError
from dsv4.output import Output

if TYPE_CHECKING:
    from dsv4.model.chat.detection import PromptEdition
    from dsv4.model.chat.messages import MessageList, Request
    from dsv4.model.chat.protocol import Effort, ThinkingMode
    from dsv4.model.chat.tokenizer import TextTokenizer


class Mode(StrEnum):
    """The three modes of the releases."""

    chat = "chat"
    think = "think"
    think_max = "think-max"


ModeOption = Annotated[
    Mode | None,
    typer.Option(
        "--mode",
        help="chat: answer at once; think: reason first; think-max: reason at length. Default: chat, unless a request "
        "or --effort asks for reasoning.",
    ),
]
EffortOption = Annotated[
    str | None,
    typer.Option(
        "--effort",
        metavar="LEVEL",
        help="How hard to reason: low, high or max, as the edition has them; for V4.1 also 1 to 100.",
    ),
]
EditionOption = Annotated[
    str | None,
    typer.Option(
        "--edition",
        metavar="NAME",
        help="Edition whose prompts to write: preview, 0731 or v41. Default: detected from the checkpoint's files.",
    ),
]


@dataclass(frozen=True)
class Asked:
    """`--mode`, `--effort` and `--edition` as given; None where they were not."""

    mode: str | None = None
    effort: str | None = None
    edition: str | None = None

    def __post_init__(self) -> None:
        if self.mode == Mode.think_max and self.effort is not None:
            raise UsageError(
                "--mode think-max is --mode think --effort max", "Leave out --effort, or use --mode think."
            )


@dataclass(frozen=True)
class Style:
    """How one prompt is made. `reasoning_effort` None: the edition's default."""

    edition: str
    thinking_mode: "ThinkingMode"
    reasoning_effort: "Effort | None" = None

    @property
    def effort_that_counts(self) -> "Effort | None":
        """The effort, or the edition's default; None in chat mode, where none counts."""
        from dsv4.model.chat.editions import protocol_of

        efforts = protocol_of(self.edition).efforts
        return efforts.resolve(self.reasoning_effort) if self.thinking_mode == "thinking" else None

    def to_json(self) -> dict[str, Any]:
        """The same for `--json`."""
        effort = self.effort_that_counts
        return {"edition": self.edition, "thinking_mode": self.thinking_mode, "reasoning_effort": effort}


def choose_edition(asked: Asked, folder: str | Path | None, out: Output) -> "PromptEdition":
    """The edition of the prompts: as asked for, as the checkpoint in `folder` tells, or preview where there is none.

    With -v the choice is printed; an assumption is always printed.
    """
    from dsv4.model.chat.detection import PromptEdition, prompt_edition_of
    from dsv4.model.chat.editions import protocol_of

    if asked.edition is not None:
        edition = PromptEdition(protocol_of(asked.edition).edition, "as --edition says")
    elif folder is not None:
        edition = prompt_edition_of(folder)
    else:
        edition = PromptEdition("preview", "no checkpoint is named")
    for line in edition.warnings:
        out.warn(line)
    out.detail(f"prompts of edition {edition.name} ({edition.reason})")
    return edition


def warn_of_missing_tokens(tokenizer: "TextTokenizer", edition: "PromptEdition", out: Output) -> None:
    """A warning for special tokens of the edition that the tokenizer would cut into pieces, as no model was trained."""
    from dsv4.model.chat.tokenizer import missing_tokens

    missing = missing_tokens(tokenizer, edition.name)
    if missing:
        out.warn(
            f"tokenizer.json lacks tokens of edition {edition.name}, and cuts them to pieces: {', '.join(missing)}"
        )


def _thinking_mode(asked: Asked, request: "Request") -> "ThinkingMode":
    if asked.mode is not None:
        return "chat" if asked.mode == Mode.chat else "thinking"
    if asked.effort is not None:
        return "thinking"
    return request.thinking_mode or "chat"


def choose_style(asked: Asked, request: "Request", edition: str) -> Style:
    """How the prompt of a request is made. Raises UsageError for an effort that the edition does not have."""
    from dsv4.model.chat.editions import protocol_of

    efforts = protocol_of(edition).efforts
    effort: Effort | None = "max" if asked.mode == Mode.think_max else None
    if asked.effort is not None:
        effort = int(asked.effort) if asked.effort.isdecimal() else asked.effort
    elif effort is None and request.reasoning_effort is not None:
        effort = efforts.from_api(request.reasoning_effort)
    efforts.resolve(effort)
    return Style(edition, _thinking_mode(asked, request), effort)


@dataclass(frozen=True)
class Written:
    """A prompt as text. `remarks`: one line for each thing that it leaves out or cannot express.

    answer_mode: how the answer is parsed: "thinking" if it begins inside the reasoning. After a task's token, or behind
    an answer that the model continues, it does not, whatever the mode of the prompt.
    """

    text: str
    style: Style
    remarks: tuple[str, ...]
    answer_mode: "ThinkingMode"


def write_prompt(
    request: "Request",
    style: Style,
    out: Output,
    *,
    keep_thinking: bool = False,
    context: "MessageList | None" = None,
    bos: bool = True,
) -> Written:
    """The prompt of a request. Prints a note for what it leaves out, a warning for what the model sees otherwise."""
    from dsv4.model.chat.editions import protocol_of
    from dsv4.model.chat.encoding import encode_messages, starts_in_reasoning
    from dsv4.model.chat.preparation import prepare
    from dsv4.model.chat.remarks import notes, warnings

    how = (style.thinking_mode, not keep_thinking)
    text = encode_messages(
        request.messages, *how, style.reasoning_effort, context, add_default_bos_token=bos, edition=style.edition
    )
    effort = style.effort_that_counts
    out.detail(f"{style.thinking_mode} mode" + ("" if effort is None else f", effort {effort}"))
    noted = notes(request)
    warned = warnings(request.messages, *how, context, edition=style.edition)
    for line in noted:
        out.say(f"note: {line}")
    for line in warned:
        out.warn(line)
    conversation = prepare(
        request.messages,
        context or (),
        style.thinking_mode == "thinking",
        not keep_thinking,
        protocol_of(style.edition),
    )
    answer_mode: ThinkingMode = "thinking" if starts_in_reasoning(conversation) else "chat"
    return Written(text, style, (*noted, *warned), answer_mode)
