"""Prompt files: OpenAI-style messages with their tools, read and checked.

A file holds either a list of messages or a whole request, `{"messages": [...], "tools": [...]}`. The protocol keeps
tools and response format in the system message; a request has them beside the messages, so they are moved.
"""

import json
import sys
from pathlib import Path
from typing import Any

from dsv4.errors import InputError, printable

MessageList = list[dict[str, Any]]


def read_text(path: str) -> str:
    """The text of a file, or of standard input for "-". Raises InputError if it is not UTF-8."""
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{printable(path)} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def read_json(path: str) -> Any:
    """The JSON value in a file, or on standard input for "-"."""
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        raise InputError(f"{printable(path)} is not JSON: {error}") from None
    except RecursionError:
        raise InputError(f"{printable(path)} is not JSON that can be read: it is nested too deeply") from None


def _system_message(messages: MessageList) -> tuple[MessageList, dict[str, Any]]:
    """A copy of the messages and the system message in it, a new one in front if there was none."""
    copied = [dict(message) for message in messages]
    for message in copied:
        if message.get("role") == "system":
            return copied, message
    system: dict[str, Any] = {"role": "system", "content": ""}
    return [system, *copied], system


def with_additions(messages: MessageList, tools: object = None, response_format: object = None) -> MessageList:
    """The messages with `tools` and `response_format` in their system message, made if there is none."""
    additions = {"tools": tools, "response_format": response_format}
    given = {key: value for key, value in additions.items() if value}
    if not given:
        return messages
    copied, system = _system_message(messages)
    system.update(given)
    return copied


def checked_messages(value: object, where: str) -> MessageList:
    """`value` as a list of messages; `where` names its origin in the error."""
    if isinstance(value, dict) and "messages" in value:
        messages = checked_messages(value["messages"], where)
        return with_additions(messages, value.get("tools"), value.get("response_format"))
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise InputError(
            f"{printable(where)}: expected a JSON list of messages",
            'Like [{"role": "user", "content": "Hello"}], or an object with "messages" and "tools".',
        )
    return value


def read_messages(path: str) -> MessageList:
    """The messages in a JSON file ("-" for standard input)."""
    return checked_messages(read_json(path), path)


def read_tools(path: str) -> list[Any]:
    """The tools in a JSON file: a list of `{"type": "function", "function": {...}}`."""
    value = read_json(path)
    if not isinstance(value, list):
        raise InputError(f"{printable(path)}: expected a JSON list of tools, found {type(value).__name__}")
    return value
