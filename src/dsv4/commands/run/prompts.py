"""Where `dsv4 run` gets its prompts from: text, messages, a file of many, or token ids."""

import json
import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from dsv4.errors import InputError, UsageError, printable

from .options import RunOptions

if TYPE_CHECKING:
    from dsv4.model.chat.tokenizer import TextTokenizer

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Dialogue:
    """How messages become prompts: mode, system message and file of tools, or `raw` text without any of that."""

    mode: str
    system: str | None
    tools: str | None
    raw: bool

    @classmethod
    def of(cls, options: RunOptions) -> Self:
        """As the command line says."""
        return cls(options.mode.value, options.system, options.tools, options.raw)


@dataclass(frozen=True)
class Prompt:
    """One prompt as token ids; `messages` if it was made from messages, whose answer can be parsed."""

    tokens: list[int]
    messages: Messages | None = field(default=None)


def parse_tokens(text: str) -> list[int]:
    """Ids from `1,2,3`, or from a file of ids, separated by commas or white space, with or without brackets."""
    from dsv4.model.chat.messages import read_text

    inline = re.fullmatch(r"[\[\]\d\s,]*", text) is not None
    if not inline and not os.path.exists(text):
        raise InputError(
            f"'{printable(text)}' is neither a list of token ids nor a file", "Write --tokens 0,17,4 or name a file."
        )
    content = text if inline else read_text(text)
    words = re.split(r"[\s,\[\]]+", content)
    for word in filter(None, words):
        if not re.fullmatch(r"\d{1,18}", word):
            raise InputError(f"'{printable(word[:40])}' is not a token id", "Ids are whole numbers, such as 0,17,4.")
    return [int(word) for word in words if word]


def starting_messages(dialogue: Dialogue) -> Messages:
    """The system message with the tools, if any of that was asked for."""
    from dsv4.model.chat.messages import read_tools, with_additions

    messages: Messages = [] if dialogue.system is None else [{"role": "system", "content": dialogue.system}]
    return with_additions(messages, read_tools(dialogue.tools)) if dialogue.tools else messages


def completed(messages: Messages, dialogue: Dialogue) -> Messages:
    """Messages from a file with --system and --tools put in. Raises UsageError for a second system message."""
    from dsv4.model.chat.messages import read_tools, with_additions

    if dialogue.system is not None:
        if any(message.get("role") == "system" for message in messages):
            raise UsageError("the messages have a system message already", "Leave out --system.")
        messages = [{"role": "system", "content": dialogue.system}, *messages]
    return with_additions(messages, read_tools(dialogue.tools)) if dialogue.tools else messages


def encode(messages: Messages, dialogue: Dialogue) -> str:
    """The prompt text of messages in the dialogue's mode."""
    from dsv4.model.chat.encoding import encode_messages
    from dsv4.model.chat.protocol import MODES

    thinking_mode, effort = MODES[dialogue.mode]
    return encode_messages(messages, thinking_mode=thinking_mode, reasoning_effort=effort)


def _user(text: str) -> Messages:
    return [{"role": "user", "content": text}]


def _from_file(path: str, dialogue: Dialogue) -> list[str | Messages]:
    """Every prompt of --file: the lines of a text file, or a JSON list of message lists (or of texts)."""
    from dsv4.model.chat.messages import checked_messages, read_text

    text = read_text(path)
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, list):
        lines: list[str | Messages] = [line for line in text.splitlines() if line.strip()]
        if not lines:
            raise InputError(f"{printable(path)} holds no prompt")
        return lines
    if dialogue.raw and not all(isinstance(item, str) for item in value):
        raise InputError(f"{printable(path)} holds messages", "--raw needs texts.")
    return [
        item if isinstance(item, str) else checked_messages(item, f"{path}, prompt {number}")
        for number, item in enumerate(value)
    ]


def gather(options: RunOptions, dialogue: Dialogue, tokenizer: "TextTokenizer | None") -> list[Prompt]:
    """All prompts as token ids. `tokenizer` may be None for --tokens only."""
    from dsv4.model.chat.messages import read_messages

    if options.tokens is not None:
        return [Prompt(parse_tokens(options.tokens))]
    assert tokenizer is not None
    if options.messages is not None:
        items: list[str | Messages] = [read_messages(options.messages)]
    elif options.file is not None:
        items = _from_file(options.file, dialogue)
    else:
        items = [options.question or ""]
    if dialogue.raw:
        return [Prompt(tokenizer.encode(str(item))) for item in items]
    prompts = []
    for item in items:
        messages = completed(_user(item) if isinstance(item, str) else item, dialogue)
        prompts.append(Prompt(tokenizer.encode(encode(messages, dialogue)), messages))
    return prompts
