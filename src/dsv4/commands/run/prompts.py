"""Where `dsv4 run` gets its prompts from: text, messages, a file of many, or token ids."""

import json
import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dsv4.errors import InputError, UsageError, printable

if TYPE_CHECKING:
    from dsv4.model.chat.tokenizer import TextTokenizer

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Sources:
    """The options that can carry a prompt. At most one of them is given."""

    prompt: str | None = None
    file: str | None = None
    messages: str | None = None
    tokens: str | None = None

    def __post_init__(self) -> None:
        given = [name for name, value in vars(self).items() if value is not None]
        if len(given) > 1:
            raise UsageError(
                f"the prompt is given {len(given)} times: as {' and as '.join(given)}",
                "Use one of a prompt, --file, --messages and --tokens.",
            )

    @property
    def interactive(self) -> bool:
        """Nothing given: the user talks."""
        return all(value is None for value in vars(self).values())


@dataclass(frozen=True)
class Dialogue:
    """How messages become prompts: mode, system message and tools, or `raw` text without any of that."""

    mode: str = "chat"
    system: str | None = None
    tools: str | None = None
    raw: bool = False

    def __post_init__(self) -> None:
        if self.raw and (self.system is not None or self.tools is not None or self.mode != "chat"):
            raise UsageError("--raw sends the text as it is", "Leave out --mode, --system and --tools.")


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


def gather(sources: Sources, dialogue: Dialogue, tokenizer: "TextTokenizer | None") -> list[Prompt]:
    """All prompts as token ids. `tokenizer` may be None for --tokens only."""
    from dsv4.model.chat.messages import read_messages

    if sources.tokens is not None:
        return [Prompt(parse_tokens(sources.tokens))]
    assert tokenizer is not None
    if sources.messages is not None:
        items: list[str | Messages] = [read_messages(sources.messages)]
    elif sources.file is not None:
        items = _from_file(sources.file, dialogue)
    else:
        items = [sources.prompt or ""]
    if dialogue.raw:
        return [Prompt(tokenizer.encode(str(item))) for item in items]
    prompts = []
    for item in items:
        messages = completed(_user(item) if isinstance(item, str) else item, dialogue)
        prompts.append(Prompt(tokenizer.encode(encode(messages, dialogue)), messages))
    return prompts
