"""Parses a completion into reasoning, content and tool calls, or reports where it violates the protocol."""

import json
import re
from typing import Any, NoReturn

from dsv4.errors import InputError

from .editions import protocol_of
from .protocol import END_THINK, EOS, Protocol, check_thinking_mode, to_json

MOST_QUOTED = 60  # characters of a value in an error message


def _is_json(text: str) -> bool:
    """Whether `text` is one JSON value. NaN and Infinity are not, although Python's parser accepts them."""
    try:
        json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


class _Reader:
    """A position in a completion that moves from one marker to the next."""

    def __init__(self, text: str, protocol: Protocol) -> None:
        self.text, self.position, self.special_tokens = text, 0, protocol.special_tokens
        self.calls, self.end_calls = f"\n\n<{protocol.calls}", f"</{protocol.calls}>"
        self.invoke, self.end_invoke = f"<{protocol.invoke}", f"</{protocol.invoke}"
        self.parameter, self.end_parameter = f"<{protocol.parameter}", f"</{protocol.parameter}"

    def fail(self, problem: str, position: int | None = None) -> NoReturn:
        raise InputError(f"completion, character {self.position if position is None else position}: {problem}")

    def until(self, *markers: str) -> tuple[str, str]:
        """The text before the nearest marker, and that marker ("" at the end of the text). Moves behind it."""
        found = [(at, marker) for marker in markers if (at := self.text.find(marker, self.position)) >= 0]
        at, marker = min(found, default=(len(self.text), ""))
        before = self.text[self.position : at]
        self.position = at + len(marker)
        return before, marker

    def refuse_special_tokens(self, text: str, marker: str, where: str) -> None:
        """Fail if `text`, which ended at `marker` just before the position, contains a special token."""
        start = self.position - len(marker) - len(text)
        for token in self.special_tokens:
            if token in text:
                self.fail(f"{token} inside the {where}", start + text.index(token))


_INVOKE_HEAD = re.compile(r'\s*name="(.*?)">\n\n?', re.DOTALL)
_PARAMETER_HEAD = re.compile(r' name="(.*?)" string="(true|false)">(.*)', re.DOTALL)


def _parse_parameter(reader: _Reader) -> tuple[str, str]:
    """The name of a parameter and its value as JSON. A value with string="false" must be JSON."""
    start = reader.position
    text, end = reader.until(reader.end_parameter)
    match = _PARAMETER_HEAD.fullmatch(text)
    if not match or not end:
        reader.fail(f'expected {reader.parameter} name="…" string="true|false">…{reader.end_parameter}>', start)
    name, is_text, value = match.groups()
    if is_text == "true":
        return name, to_json(value)
    if not _is_json(value):
        quoted = value if len(value) <= MOST_QUOTED else value[:MOST_QUOTED] + "…"
        reader.fail(f"""parameter '{name}' has string="false", but its value is not JSON: {quoted}""", start)
    return name, value


def _parse_parameters(reader: _Reader, marker: str) -> str:
    """The arguments of one call as a JSON object, its items in the order they were written."""
    arguments: dict[str, str] = {}
    while marker == reader.parameter:
        start = reader.position
        name, value = _parse_parameter(reader)
        if name in arguments:
            reader.fail(f"parameter '{name}' is given twice", start)
        arguments[name] = value
        start = reader.position
        between, marker = reader.until(reader.parameter, reader.end_invoke)
        if between != ">\n":
            reader.fail("expected the parameter's tag to end its line", start)
    return "{" + ", ".join(f"{to_json(name)}: {value}" for name, value in arguments.items()) + "}"


def _parse_call(reader: _Reader) -> dict[str, Any]:
    start = reader.position
    head, marker = reader.until(reader.parameter, reader.end_invoke)
    match = _INVOKE_HEAD.fullmatch(head)
    if not match or not marker:
        reader.fail(f'expected {reader.invoke} name="…"> and parameters', start)
    return {"type": "function", "function": {"name": match[1], "arguments": _parse_parameters(reader, marker)}}


def _parse_calls(reader: _Reader) -> list[dict[str, Any]]:
    """The calls of a block, up to its end tag."""
    calls: list[dict[str, Any]] = []
    while True:
        start = reader.position
        between, marker = reader.until(reader.invoke, reader.end_calls)
        if between != ">\n" or not marker:
            reader.fail(f"expected {reader.invoke} or {reader.end_calls} on the next line", start)
        if marker == reader.end_calls:
            return calls
        calls.append(_parse_call(reader))


def _parse_reasoning(reader: _Reader) -> str:
    reasoning, marker = reader.until(END_THINK, reader.calls)
    if marker != END_THINK:
        reader.fail(f"expected {END_THINK} after the reasoning")
    reader.refuse_special_tokens(reasoning, marker, "reasoning")
    return reasoning


def _parse_end(reader: _Reader, marker: str) -> None:
    """Fail unless `marker` is the end token and nothing follows it."""
    if marker != EOS:
        reader.fail(f"expected {EOS} at the end")
    if reader.position != len(reader.text):
        reader.fail(f"text after {EOS}")


def parse_completion(text: str, thinking_mode: str, *, edition: str = "preview") -> dict[str, Any]:
    """A completion, its EOS included, as an assistant message: role, content, reasoning_content and tool_calls.

    In thinking mode the completion starts inside the reasoning (the prompt ends with `<think>`). `edition` is
    "preview", "0731" or "v41". The arguments of every call are valid JSON text. Raises InputError that names the
    character where the text violates the protocol, UsageError for an unknown mode or edition.
    """
    check_thinking_mode(thinking_mode)
    reader = _Reader(text, protocol_of(edition))
    reasoning = _parse_reasoning(reader) if thinking_mode == "thinking" else ""
    content, marker = reader.until(EOS, reader.calls)
    reader.refuse_special_tokens(content, marker, "content")
    calls: list[dict[str, Any]] = []
    if marker == reader.calls:
        calls = _parse_calls(reader)
        start = reader.position
        between, marker = reader.until(EOS)
        if between:
            reader.fail("expected the end of the completion after the tool calls", start)
    _parse_end(reader, marker)
    return {"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": calls}
