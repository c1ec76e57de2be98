"""Read a completion: reasoning, content and tool calls, or the place where it leaves the protocol."""

import re
from typing import Any, NoReturn

from dsv4.errors import InputError, printable

from .protocol import DSML, END_THINK, EOS, SPECIAL_TOKENS, check_modes, to_json


class _Reader:
    """A position in a completion that moves from one marker to the next."""

    def __init__(self, text: str) -> None:
        self.text, self.position = text, 0

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
        for token in SPECIAL_TOKENS:
            if token in text:
                self.fail(f"{token} inside the {where}", start + text.index(token))


_CALLS, _END_CALLS = f"\n\n<{DSML}tool_calls", f"</{DSML}tool_calls>"
_INVOKE, _END_INVOKE = f"<{DSML}invoke", f"</{DSML}invoke"
_PARAMETER, _END_PARAMETER = f"<{DSML}parameter", f"</{DSML}parameter"
_INVOKE_HEAD = re.compile(r'\s*name="(.*?)">\n\n?', re.DOTALL)
_PARAMETER_HEAD = re.compile(r' name="(.*?)" string="(true|false)">(.*)', re.DOTALL)


def _parse_parameters(reader: _Reader, marker: str) -> str:
    """The arguments of one call as a JSON object, its items in the order they were written."""
    arguments: dict[str, str] = {}
    while marker == _PARAMETER:
        start = reader.position
        text, end = reader.until(_END_PARAMETER)
        match = _PARAMETER_HEAD.fullmatch(text)
        if not match or not end:
            reader.fail('expected <｜DSML｜parameter name="…" string="true|false">…</｜DSML｜parameter>', start)
        name, is_text, value = match.groups()
        if name in arguments:
            reader.fail(f"parameter '{printable(name)}' is given twice", start)
        arguments[name] = to_json(value) if is_text == "true" else value
        start = reader.position
        between, marker = reader.until(_PARAMETER, _END_INVOKE)
        if between != ">\n":
            reader.fail("expected the parameter's tag to end its line", start)
    return "{" + ", ".join(f"{to_json(name)}: {value}" for name, value in arguments.items()) + "}"


def _parse_tool_calls(reader: _Reader) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    while True:
        start = reader.position
        between, marker = reader.until(_INVOKE, _END_CALLS)
        if between != ">\n" or not marker:
            reader.fail("expected <｜DSML｜invoke or </｜DSML｜tool_calls> on the next line", start)
        if marker == _END_CALLS:
            return calls
        start = reader.position
        head, marker = reader.until(_PARAMETER, _END_INVOKE)
        match = _INVOKE_HEAD.fullmatch(head)
        if not match or not marker:
            reader.fail('expected <｜DSML｜invoke name="…"> and parameters', start)
        function = {"name": match[1], "arguments": _parse_parameters(reader, marker)}
        calls.append({"type": "function", "function": function})


def parse_completion(text: str, thinking_mode: str) -> dict[str, Any]:
    """A completion, its EOS included, as an assistant message: role, content, reasoning_content and tool_calls.

    In thinking mode the completion starts inside the reasoning (the prompt ends with `<think>`). Raises InputError
    that names the character where the text leaves the protocol.
    """
    check_modes(thinking_mode)
    reader, reasoning = _Reader(text), ""
    if thinking_mode == "thinking":
        reasoning, marker = reader.until(END_THINK, _CALLS)
        if marker != END_THINK:
            reader.fail(f"expected {END_THINK} after the reasoning")
        reader.refuse_special_tokens(reasoning, marker, "reasoning")
    content, marker = reader.until(EOS, _CALLS)
    reader.refuse_special_tokens(content, marker, "content")
    calls: list[dict[str, Any]] = []
    if marker == _CALLS:
        calls = _parse_tool_calls(reader)
        start = reader.position
        between, marker = reader.until(EOS)
        if between:
            reader.fail("expected the end of the completion after the tool calls", start)
    if marker != EOS:
        reader.fail(f"expected {EOS} at the end")
    if reader.position != len(text):
        reader.fail(f"text after {EOS}")
    return {"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": calls}
