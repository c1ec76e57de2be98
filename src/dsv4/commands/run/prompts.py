"""The prompts of `dsv4 run`: text, messages, a file of many, or token ids."""

import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from dsv4.commands.prompting import Asked, Style, Written, choose_edition, choose_style, write_prompt
from dsv4.errors import InputError, UsageError
from dsv4.output import Output

from .options import RunOptions

if TYPE_CHECKING:
    from dsv4.model.chat.detection import PromptEdition
    from dsv4.model.chat.messages import Request
    from dsv4.model.chat.tokenizer import TextTokenizer
    from dsv4.model.config import Config

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Dialogue:
    """How messages become prompts: mode, effort, edition, system message and file of tools.

    Raw text has none of these.
    """

    asked: Asked
    system: str | None
    tools: str | None
    edition: "PromptEdition | None"
    has_vision: bool = False  # the model could see images, so a prompt that leaves them out is another question

    @classmethod
    def of(cls, options: RunOptions, files: Path, has_vision: bool, out: Output) -> Self:
        """As the command line says; the edition, where it does not, as the checkpoint's `files` tell."""
        is_encoded = options.tokens is None and not options.raw
        edition = choose_edition(options.asked, files, out) if is_encoded else None
        return cls(options.asked, options.system, options.tools, edition, has_vision)

    @property
    def raw(self) -> bool:
        """Whether texts are sent as they are."""
        return self.edition is None

    def style(self, request: "Request") -> Style:
        """How the prompt of a request is made. Raises UsageError for an effort that the edition does not have."""
        assert self.edition is not None
        return choose_style(self.asked, request, self.edition.name)


@dataclass(frozen=True)
class Prompt:
    """One prompt as token ids; `written` if it was made from messages, whose answer can be parsed."""

    tokens: list[int]
    written: Written | None = None
    name: str | None = None  # of the suite's prompts


def check_tokens_argument(text: str) -> bool:
    """Whether --tokens is a list of ids rather than a file of them. Raises InputError if it is neither."""
    inline = re.fullmatch(r"[\[\]\d\s,]*", text) is not None
    if not inline and not os.path.exists(text):
        raise InputError(f"'{text}' is neither a list of token ids nor a file", "Write --tokens 0,17,4 or name a file.")
    return inline


def parse_tokens(text: str) -> list[int]:
    """Ids from `1,2,3`, or from a file of ids, separated by commas or white space, with or without brackets."""
    from dsv4.model.chat.messages import read_text

    content = text if check_tokens_argument(text) else read_text(text)
    words = re.split(r"[\s,\[\]]+", content)
    for word in filter(None, words):
        if not re.fullmatch(r"\d{1,18}", word):
            raise InputError(f"'{word[:40]}' is not a token id", "Ids are whole numbers, such as 0,17,4.")
    return [int(word) for word in words if word]


def starting_messages(dialogue: Dialogue) -> Messages:
    """The system message with --system and --tools; [] without these options."""
    from dsv4.model.chat.messages import read_tools, with_additions

    messages: Messages = [] if dialogue.system is None else [{"role": "system", "content": dialogue.system}]
    return with_additions(messages, read_tools(dialogue.tools)) if dialogue.tools else messages


def completed(request: "Request", dialogue: Dialogue) -> "Request":
    """A request with --system and --tools put in.

    Raises UsageError for a second system message, InputError for an image that the model would see.
    """
    from dsv4.model.chat.messages import read_tools, with_additions
    from dsv4.model.chat.preparation import refuse_image_parts

    if dialogue.has_vision:
        refuse_image_parts(request.messages)
    messages = request.messages
    if dialogue.system is not None:
        if any(message.get("role") == "system" for message in messages):
            raise UsageError("the messages have a system message already", "Leave out --system.")
        messages = [{"role": "system", "content": dialogue.system}, *messages]
    if dialogue.tools is not None:
        messages = with_additions(messages, read_tools(dialogue.tools))
    return replace(request, messages=messages)


def _question(text: str) -> "Request":
    from dsv4.model.chat.messages import Request

    return Request([{"role": "user", "content": text}])


def _from_file(path: str, dialogue: Dialogue) -> "list[str | Request]":
    """Every prompt of --file: the lines of a text file, or a JSON list of message lists (or of texts)."""
    from dsv4.model.chat.messages import as_request, read_text

    text = read_text(path)
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, list):
        lines: list[str | Request] = [line for line in text.splitlines() if line.strip()]
        if not lines:
            raise InputError(f"{path} holds no prompt")
        return lines
    if dialogue.raw and not all(isinstance(item, str) for item in value):
        raise InputError(f"{path} holds messages", "--raw needs texts.")
    return [
        item if isinstance(item, str) else as_request(item, f"{path}, prompt {number}")
        for number, item in enumerate(value)
    ]


def suite_prompts(config: "Config", dialogue: Dialogue, tokenizer: "TextTokenizer", out: Output) -> list[Prompt]:
    """The prompts of --suite, as the checkpoint's edition and tokenizer make them, those that the model can read."""
    from dsv4.model.chat.messages import Request
    from dsv4.referee.suite import suite

    def encode(messages: Messages) -> list[int]:
        request = completed(Request(messages), dialogue)
        return tokenizer.encode(write_prompt(request, dialogue.style(request), out).text)

    longest = config.max_position_embeddings
    prompts = suite(encode, tokenizer.encode, config.vocab_size, longest)
    return [Prompt(prompt.tokens, name=prompt.name) for prompt in prompts if 2 <= len(prompt.tokens) <= longest]


def gather(options: RunOptions, dialogue: Dialogue, tokenizer: "TextTokenizer | None", out: Output) -> list[Prompt]:
    """All prompts as token ids. `tokenizer` may be None for --tokens only."""
    from dsv4.model.chat.messages import read_request

    if options.tokens is not None:
        return [Prompt(parse_tokens(options.tokens))]
    assert tokenizer is not None
    if options.messages is not None:
        items: list[str | Request] = [read_request(options.messages)]
    elif options.file is not None:
        items = _from_file(options.file, dialogue)
    else:
        items = [options.question or ""]
    if dialogue.raw:
        return [Prompt(tokenizer.encode(str(item))) for item in items]
    prompts = []
    for item in items:
        request = completed(_question(item) if isinstance(item, str) else item, dialogue)
        written = write_prompt(request, dialogue.style(request), out)
        prompts.append(Prompt(tokenizer.encode(written.text), written))
    return prompts
