"""OpenAI-style messages to the prompt of DeepSeek-V4, and a completion back to a message.

The releases ship no chat template; the prompt is built by rules, and the models were trained on exactly these
bytes. `encode_messages` prepares the messages (tool results become user content, old reasoning is dropped) and then
renders one after the other; `parse_completion` reads what the model answered. Nothing here knows token ids: the
special tokens are text, and the tokenizer turns them into ids.

`direct_search_results` messages are kept by the preparation, as in the release, but no rule renders them: they are
an unknown role in the end.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from dsv4.errors import InputError, printable

from .completion import parse_completion
from .protocol import (
    ASSISTANT,
    BOS,
    DSML,
    EFFORT_MAX,
    END_THINK,
    EOS,
    LATEST_REMINDER,
    RESPONSE_FORMAT,
    TASKS,
    THINK,
    TOOLS,
    USER,
    check_modes,
    to_json,
)

__all__ = ["encode_messages", "parse_completion"]

Message = Mapping[str, Any]


class _Context(NamedTuple):
    """What rendering one message depends on besides the message."""

    messages: list[dict[str, Any]]
    thinking: bool
    drop_thinking: bool
    last_user: int
    effort: str | None


def _fail(index: int, message: Message, problem: str) -> NoReturn:
    role = printable(str(message.get("role")))
    raise InputError(f"message {index} ({role}): {problem}")


# --- preparation -----------------------------------------------------------------------------------------------


def _check(messages: Sequence[Message]) -> None:
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InputError(f"message {index}: expected an object, found {type(message).__name__}")
        if not isinstance(message.get("role"), str):
            raise InputError(f"message {index}: expected a role, found {printable(repr(message.get('role')))}")
        task = message.get("task")
        if task is not None and (not isinstance(task, str) or task not in TASKS):
            _fail(index, message, f"unknown task '{printable(str(task))}', expected one of {', '.join(TASKS)}")
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
            _fail(index, message, "expected tool_calls to be a list of objects")


def _block(message: Message) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"type": "tool_result", "id": message.get("tool_call_id"), "content": message.get("content")}
    return {"type": "text", "content": message.get("content")}


def _merge_tool_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """User and tool messages as user messages made of blocks; neighbours share one message."""
    merged: list[dict[str, Any]] = []
    for message in messages:
        role = message["role"]
        if role not in ("user", "tool"):
            merged.append(dict(message))
            continue
        previous = merged[-1] if merged and merged[-1]["role"] == "user" else None
        if previous is not None and (role == "tool" or previous.get("task") is None):
            previous["blocks"].append(_block(message))
        else:
            kept = {k: message[k] for k in ("task", "wo_eos", "mask") if k in message and role == "user"}
            merged.append({"role": "user", "blocks": [_block(message)], **kept})
    return merged


def _sort_tool_results(messages: list[dict[str, Any]]) -> None:
    """Tool results in the order in which the assistant asked for them; text blocks stay where they are."""
    order: dict[str, int] = {}
    for message in messages:
        if message["role"] == "assistant" and message.get("tool_calls"):
            order = {str(call["id"]): i for i, call in enumerate(message["tool_calls"]) if call.get("id")}
        elif message["role"] == "user":
            blocks = message["blocks"]
            results = [block for block in blocks if block["type"] == "tool_result"]
            results.sort(key=lambda block: order.get(str(block["id"]), 0))
            in_order = iter(results)
            message["blocks"] = [next(in_order) if block["type"] == "tool_result" else block for block in blocks]


def _last_user(messages: Sequence[Message]) -> int:
    return max((i for i, message in enumerate(messages) if message["role"] in ("user", "developer")), default=-1)


_KEPT_ROLES = ("system", "user", "tool", "latest_reminder", "direct_search_results")


def _drop_old_thinking(messages: list[dict[str, Any]], encoded: int) -> tuple[list[dict[str, Any]], int]:
    """What stays of `messages`, and how many of the first `encoded` ones are among that."""
    last_user = _last_user(messages)
    kept: list[dict[str, Any]] = []
    encoded_kept = 0
    for index, message in enumerate(messages):
        if index >= last_user or message["role"] in _KEPT_ROLES:
            kept.append(message)
        elif message["role"] == "assistant":
            kept.append({key: value for key, value in message.items() if key != "reasoning_content"})
        if index < encoded:
            encoded_kept = len(kept)
    return kept, encoded_kept


# --- rendering -------------------------------------------------------------------------------------------------


def _text(index: int, message: Message, key: str = "content") -> str:
    value = message.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        _fail(index, message, f"expected {key} to be text, found {type(value).__name__}")
    return value


def _part(index: int, message: Message, part: object) -> str:
    if not isinstance(part, Mapping):
        _fail(index, message, f"expected content parts to be objects, found {type(part).__name__}")
    if part.get("type") == "text":
        return _text(index, {**part, "role": message["role"]}, "text")
    return f"[Unsupported {part.get('type')}]"


def _render_block(index: int, message: Message, block: Mapping[str, Any]) -> str:
    content = block["content"]
    if isinstance(content, list):
        text = "\n\n".join(_part(index, message, part) for part in content)
    else:
        text = _text(index, {**block, "role": message["role"]})
    return f"<tool_result>{text}</tool_result>" if block["type"] == "tool_result" else text


def _additions(index: int, message: Message) -> str:
    """Tools and response format, behind the content of a system or developer message."""
    text = ""
    if tools := message.get("tools"):
        try:
            schemas = "\n".join(to_json(tool["function"]) for tool in tools)
        except (TypeError, KeyError):
            _fail(index, message, 'expected tools to be a list of {"type": "function", "function": {...}}')
        text += "\n\n" + TOOLS.format(schemas=schemas)
    if response_format := message.get("response_format"):
        text += "\n\n" + RESPONSE_FORMAT.format(schema=to_json(response_format))
    return text


def _arguments(index: int, message: Message, arguments: object) -> Mapping[str, Any]:
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return {"arguments": arguments}
    if not isinstance(arguments, Mapping):
        _fail(index, message, f"expected tool call arguments to be a JSON object, found {type(arguments).__name__}")
    return arguments


def _parameter(key: str, value: object) -> str:
    is_text = isinstance(value, str)
    written = value if is_text else to_json(value)
    return f'<{DSML}parameter name="{key}" string="{to_json(is_text)}">{written}</{DSML}parameter>'


def _tool_calls(index: int, message: Message) -> str:
    invokes = []
    for call in message["tool_calls"]:
        function = call.get("function")
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            _fail(index, message, 'expected tool calls to be {"type": "function", "function": {"name", "arguments"}}')
        arguments = _arguments(index, message, function.get("arguments"))
        parameters = "\n".join(_parameter(key, value) for key, value in arguments.items())
        invokes.append(f'<{DSML}invoke name="{function["name"]}">\n{parameters}\n</{DSML}invoke>')
    return f"\n\n<{DSML}tool_calls>\n" + "\n".join(invokes) + f"\n</{DSML}tool_calls>"


def _assistant(index: int, message: Message, context: _Context) -> str:
    text = ""
    after_task = index > 0 and context.messages[index - 1].get("task") is not None
    if context.thinking and not after_task and (not context.drop_thinking or index > context.last_user):
        text += _text(index, message, "reasoning_content") + END_THINK
    text += _text(index, message)
    if message.get("tool_calls"):
        text += _tool_calls(index, message)
    return text if message.get("wo_eos") else text + EOS


def _body(index: int, message: Message, context: _Context) -> str:
    """One message without what announces the answer to it."""
    role = message["role"]
    if role == "system":
        return _text(index, message) + _additions(index, message)
    if role == "developer":
        if not message.get("content"):
            _fail(index, message, "expected content, found none")
        return USER + _text(index, message) + _additions(index, message)
    if role == "user":
        return USER + "\n\n".join(_render_block(index, message, block) for block in message["blocks"])
    if role == "latest_reminder":
        return LATEST_REMINDER + _text(index, message)
    if role == "assistant":
        return _assistant(index, message, context)
    raise InputError(
        f"message {index}: unknown role '{printable(role)}'",
        "Roles are system, user, assistant, tool, developer and latest_reminder.",
    )


def _transition(index: int, message: Message, context: _Context) -> str:
    """What announces the answer, if the model (or an assistant message) speaks next."""
    following = context.messages[index + 1]["role"] if index + 1 < len(context.messages) else None
    if following not in (None, "assistant", "latest_reminder"):
        return ""
    task = message.get("task")
    if task is not None:
        before = ASSISTANT + (THINK if context.thinking else END_THINK) if task == "action" else ""
        return before + TASKS[task]
    if message["role"] not in ("user", "developer"):
        return ""
    think = context.thinking and (not context.drop_thinking or index >= context.last_user)
    return ASSISTANT + (THINK if think else END_THINK)


def _render(index: int, context: _Context) -> str:
    message = context.messages[index]
    prefix = EFFORT_MAX if index == 0 and context.thinking and context.effort == "max" else ""
    return prefix + _body(index, message, context) + _transition(index, message, context)


def encode_messages(
    messages: Sequence[Message],
    thinking_mode: str,
    drop_thinking: bool = True,
    reasoning_effort: str | None = None,
    context: Sequence[Message] | None = None,
    add_default_bos_token: bool = True,
) -> str:
    """The prompt for `messages`, byte for byte as the release builds it.

    `thinking_mode` is "chat" or "thinking", `reasoning_effort` None, "high" or "max" (only "max" changes the prompt).
    `drop_thinking` removes the reasoning of answers before the last question, unless a message has tools. `context`
    are messages that were encoded before: they decide how `messages` are rendered but are not rendered again.
    The arguments are not modified. Raises InputError for messages that the protocol does not know.
    """
    check_modes(thinking_mode, reasoning_effort)
    context = context or []
    _check([*context, *messages])
    earlier = _merge_tool_messages(context)
    prepared = [*earlier, *_merge_tool_messages(messages)]
    _sort_tool_results(prepared)
    drop = drop_thinking and not any(message.get("tools") for message in (*context, *messages))
    thinking, start = thinking_mode == "thinking", len(earlier)
    if thinking and drop:
        prepared, start = _drop_old_thinking(prepared, start)
    how = _Context(prepared, thinking, drop, _last_user(prepared), reasoning_effort)
    bos = BOS if add_default_bos_token and not context else ""
    return bos + "".join(_render(index, how) for index in range(start, len(prepared)))
