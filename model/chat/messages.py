"""Message files: a list of OpenAI-style messages, or a whole request as the APIs of OpenAI and DeepSeek take it.

In a request, `tools`, `response_format` and `task` stand beside the messages. The protocols have them inside: the first
two are moved into the system message, `task` into the last user message. `thinking` and `reasoning_effort` decide how
to answer. Other fields do not change the prompt and are listed in `Request.ignored`.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4.convert.checkpoint.header import strict_json
from dsv4.errors import InputError

from .protocol import TASKS, Effort, ThinkingMode

MessageList = list[dict[str, Any]]

FIELDS = ("messages", "tools", "response_format", "task", "thinking", "reasoning_effort")
THINKING_TYPES: dict[str, ThinkingMode] = {"enabled": "thinking", "adaptive": "thinking", "disabled": "chat"}
API_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra")


@dataclass(frozen=True)
class Request:
    """The contents of a message file. `thinking_mode` and `reasoning_effort` are None if it has none."""

    messages: MessageList
    thinking_mode: ThinkingMode | None = None
    reasoning_effort: Effort | None = None
    ignored: tuple[str, ...] = ()


def read_text(path: str) -> str:
    """The text of a file, or of standard input for "-". Raises InputError if it is not UTF-8."""
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def read_json(path: str) -> Any:
    """The JSON value in a file, or on standard input for "-". Raises InputError if it is not JSON."""
    return strict_json(read_text(path), path, "Mend the file: it must hold one JSON value.")


def _system_message(messages: MessageList) -> tuple[MessageList, dict[str, Any]]:
    """A copy of the messages, and the system message in it; an empty one is put first if there is none."""
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


def _with_task(messages: MessageList, task: object, where: str) -> MessageList:
    """The messages with `task` in the last user message."""
    if task is None:
        return messages
    asking = [i for i, message in enumerate(messages) if message.get("role") == "user"]
    if not asking or not isinstance(task, str) or task not in TASKS:
        problem = f"unknown task {task!r}" if asking else "a task needs a user message"
        raise InputError(f"{where}: {problem}", f"Tasks are {', '.join(TASKS)}.")
    last = asking[-1]
    return [{**message, "task": task} if i == last else message for i, message in enumerate(messages)]


def _thinking_mode(request: dict[str, Any], where: str) -> ThinkingMode | None:
    """The mode in `thinking`, else the one that `reasoning_effort` implies."""
    thinking, effort = request.get("thinking"), request.get("reasoning_effort")
    kind = str(thinking.get("type")) if isinstance(thinking, dict) else ""
    if thinking is not None and kind not in THINKING_TYPES:
        raise InputError(f"{where}: thinking is {repr(thinking)[:60]}", 'Expected {"type": "enabled"} or "disabled".')
    if kind:
        return THINKING_TYPES[kind]
    return None if effort is None else "chat" if effort == "none" else "thinking"


def _reasoning_effort(request: dict[str, Any], where: str) -> Effort | None:
    """`reasoning_effort` as a word of the API or a whole number; None if it is absent or "none"."""
    effort = request.get("reasoning_effort")
    if effort is not None and effort not in API_EFFORTS and type(effort) is not int:
        problem = f"{where}: reasoning_effort is {repr(effort)[:60]}"
        raise InputError(problem, f"Expected {', '.join(API_EFFORTS)} or, for V4.1, a whole number from 1 to 100.")
    return None if effort == "none" else effort


def _message_list(value: object, where: str) -> MessageList:
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise InputError(
            f"{where}: expected a JSON list of messages",
            'Like [{"role": "user", "content": "Hello"}], or an object with "messages" and "tools".',
        )
    return value


def _response_format(value: object) -> object:
    """The format that the prompt must ask for; None for `{"type": "text"}`."""
    return None if isinstance(value, dict) and value.get("type") == "text" else value


def as_request(value: object, where: str) -> Request:
    """A request, or a list of messages, from the JSON value of a file that `where` names. Raises InputError."""
    if not isinstance(value, dict) or "messages" not in value:
        return Request(_message_list(value, where))
    messages = _with_task(_message_list(value["messages"], where), value.get("task"), where)
    return Request(
        with_additions(messages, value.get("tools"), _response_format(value.get("response_format"))),
        _thinking_mode(value, where),
        _reasoning_effort(value, where),
        tuple(key for key, given in value.items() if key not in FIELDS and given is not None),
    )


def read_request(path: str) -> Request:
    """The request or the messages in a JSON file ("-" for standard input)."""
    return as_request(read_json(path), path)


def read_tools(path: str) -> list[Any]:
    """The tools in a JSON file: a list of `{"type": "function", "function": {...}}`."""
    value = read_json(path)
    if not isinstance(value, list):
        raise InputError(f"{path}: expected a JSON list of tools, found {type(value).__name__}")
    return value
