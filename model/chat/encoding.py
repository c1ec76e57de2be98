"""Builds the prompt of a DeepSeek-V4 model from OpenAI-style messages.

The releases have no chat template; rules build the prompt, and the models were trained on exactly these bytes.
`prepare` turns the messages into turns; this module renders the turns. Rules that differ between editions are in their
`Protocol`.

Fields that the releases' own encoders do not read have the meaning of OpenAI's and DeepSeek's APIs: content may be a
list of parts in every role, `reasoning` is another name for `reasoning_content`, a tool call may lack `arguments`, and
the model continues an answer with `prefix`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from .editions import protocol_of
from .preparation import TEXT_PARTS, Block, Conversation, Message, Turn, prepare, reasoning_of
from .protocol import (
    ASSISTANT,
    BOS,
    END_THINK,
    EOS,
    LATEST_REMINDER,
    RESPONSE_FORMAT,
    TASKS,
    THINK,
    USER,
    Effort,
    Protocol,
    check_thinking_mode,
    to_json,
)


def _part(turn: Turn, part: object) -> str:
    """One part of a list content: its text, or the text that stands for a part of another type."""
    if not isinstance(part, Mapping):
        turn.fail(f"expected content parts to be objects, found {type(part).__name__}")
    return _text(turn, part.get("text"), "text") if part.get("type") in TEXT_PARTS else unsupported(part)


def unsupported(part: Mapping[str, Any]) -> str:
    """The text that the prompt has in place of a part that is not text."""
    return f"[Unsupported {part.get('type')}]"


def _text(turn: Turn, value: object, what: str = "content") -> str:
    """`value` as text: None is empty, the parts of a list are joined by empty lines."""
    if value is None:
        return ""
    if isinstance(value, list):
        return "\n\n".join(_part(turn, part) for part in value)
    if not isinstance(value, str):
        turn.fail(f"expected {what} to be text, found {type(value).__name__}")
    return value


def _block(turn: Turn, block: Block) -> str:
    text = _text(turn, block.content)
    return f"<tool_result>{text}</tool_result>" if block.is_tool_result else text


def _additions(turn: Turn, protocol: Protocol) -> str:
    """Tools and response format, which follow the content of a system or developer message."""
    text = ""
    if tools := turn.message.get("tools"):
        try:
            schemas = "\n".join(to_json(tool["function"]) for tool in tools)
        except (TypeError, KeyError):
            turn.fail('expected tools to be a list of {"type": "function", "function": {...}}')
        text += "\n\n" + protocol.tools_text(schemas)
    if response_format := turn.message.get("response_format"):
        text += "\n\n" + RESPONSE_FORMAT.format(schema=to_json(response_format))
    return text


def _arguments(turn: Turn, function: Mapping[str, Any], protocol: Protocol) -> Mapping[str, Any]:
    """The named parameters of a tool call; {} if arguments are null or absent."""
    arguments = function.get("arguments")
    try:
        return {} if arguments is None else protocol.read_arguments(arguments)
    except ValueError as error:
        turn.fail(str(error))


def _parameter(name: str, value: object, protocol: Protocol) -> str:
    is_text = isinstance(value, str)
    written = value if is_text else to_json(value)
    return f'<{protocol.parameter} name="{name}" string="{to_json(is_text)}">{written}</{protocol.parameter}>'


def _invoke(turn: Turn, call: Mapping[str, Any], protocol: Protocol) -> str:
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        turn.fail('expected tool calls to be {"type": "function", "function": {"name", "arguments"}}')
    arguments = _arguments(turn, function, protocol)
    parameters = "\n".join(_parameter(name, value, protocol) for name, value in arguments.items())
    return f'<{protocol.invoke} name="{function["name"]}">\n{parameters}\n</{protocol.invoke}>'


def _tool_calls(turn: Turn, protocol: Protocol) -> str:
    calls = turn.message.get("tool_calls")
    if not calls:
        return ""
    invokes = "\n".join(_invoke(turn, call, protocol) for call in calls)
    return f"\n\n<{protocol.calls}>\n{invokes}\n</{protocol.calls}>"


def _answer(turn: Turn, index: int, how: Conversation) -> str:
    """An assistant message: reasoning, content, tool calls, and the end token unless it is to be continued."""
    is_prefix = bool(turn.message.get("prefix")) and index == len(how.turns) - 1
    answer = _text(turn, turn.message.get("content")) + _tool_calls(turn, how.protocol)
    thought = ""
    after_task = index > 0 and how.turns[index - 1].task is not None
    if how.shows_reasoning(index - 1) and not after_task:
        thought = _text(turn, *reasoning_of(turn.message))
        thought += "" if is_prefix and thought and not answer else END_THINK
    return thought + answer + ("" if is_prefix or turn.message.get("wo_eos") else EOS)


def _body(turn: Turn, index: int, how: Conversation) -> str:
    """One turn without the text that announces the answer to it."""
    if turn.role not in how.protocol.roles:
        turn.fail(f"unknown role '{turn.role}'", f"Roles are {', '.join(how.protocol.roles)}.")
    if turn.role == "user":
        return USER + "\n\n".join(_block(turn, block) for block in turn.blocks)
    if turn.role == "assistant":
        return _answer(turn, index, how)
    content = _text(turn, turn.message.get("content"))
    if turn.role == "latest_reminder":
        return LATEST_REMINDER + content
    if turn.role == "developer" and not turn.message.get("content"):
        turn.fail("expected content, found none")
    return (USER if turn.role == "developer" else "") + content + _additions(turn, how.protocol)


def announcement(index: int, how: Conversation) -> str:
    """The text before the answer to a turn; "" unless the model or an assistant message comes next."""
    turn = how.turns[index]
    following = how.turns[index + 1].role if index + 1 < len(how.turns) else "assistant"
    if following not in ("assistant", "latest_reminder"):
        return ""
    if turn.task is not None:
        before = ASSISTANT + (THINK if how.thinking else END_THINK) if turn.task == "action" else ""
        return before + TASKS[turn.task]
    if not how.protocol.is_question(index, turn.role):
        return ""
    return ASSISTANT + (THINK if how.shows_reasoning(index) else END_THINK)


def _render(index: int, how: Conversation, effort_text: str) -> str:
    turn = how.turns[index]
    effort = effort_text if index == 0 and how.thinking else ""
    system = how.protocol.system if effort or turn.role == "system" else ""
    return system + effort + _body(turn, index, how) + announcement(index, how)


def starts_in_reasoning(how: Conversation) -> bool:
    """Whether the model's answer to a prompt begins inside the reasoning, so that `</think>` is still to come.

    Not in chat mode, nor after a task's token, nor where the last message is an answer to be continued behind its
    reasoning.
    """
    index = len(how.turns) - 1
    while index > 0 and how.turns[index].role == "latest_reminder":
        index -= 1
    if index < 0 or not how.thinking:
        return False
    last = how.turns[index]
    if last.role != "assistant":
        return announcement(index, how).endswith(THINK)
    begun = bool(_text(last, last.message.get("content")) or last.message.get("tool_calls"))
    continued = bool(last.message.get("prefix") and _text(last, *reasoning_of(last.message)))
    after_task = index > 0 and how.turns[index - 1].task is not None
    return continued and not begun and not after_task and how.shows_reasoning(index - 1)


def encode_messages(
    messages: Sequence[Message],
    thinking_mode: str,
    drop_thinking: bool = True,
    reasoning_effort: Effort | None = None,
    context: Sequence[Message] | None = None,
    add_default_bos_token: bool = True,
    *,
    edition: str = "preview",
) -> str:
    """The prompt for `messages`, byte for byte as the release of that edition builds it.

    `edition` is "preview", "0731" or "v41". `thinking_mode` is "chat" or "thinking". `reasoning_effort` counts in
    thinking mode: None (the edition's default), "high" or "max" (preview), "low", "high" or "max" (0731), and in v41
    also a number from 1 to 100. `drop_thinking` removes the reasoning of answers before the last question, unless a
    message has tools. `context` are messages that were encoded before: they decide how `messages` are rendered but are
    not rendered again. The arguments are not modified. Raises UsageError for options that the edition does not have,
    InputError for messages that its protocol does not know.
    """
    protocol = protocol_of(edition)
    check_thinking_mode(thinking_mode)
    effort_text = protocol.efforts.text(reasoning_effort)
    how = prepare(messages, context or (), thinking_mode == "thinking", drop_thinking, protocol)
    bos = BOS if add_default_bos_token and not context else ""
    return bos + "".join(_render(index, how, effort_text) for index in range(how.start, len(how.turns)))
