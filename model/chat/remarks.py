"""Reports what a prompt leaves out, and what it contains in a form that no model was trained on.

The prompt itself keeps the release's bytes, even for a conversation that the protocol cannot express. `notes` lists the
fields and parts that are left out; `warnings` describes what the model sees instead of the message.
"""

from collections.abc import Iterator, Mapping, Sequence

from .editions import protocol_of
from .encoding import announcement, unsupported
from .messages import Request
from .preparation import TEXT_PARTS, TOOL_RESULT, Conversation, Message, Turn, prepare, reasoning_of
from .protocol import ASSISTANT, EOS, THINK

# The fields that have an effect, by role; `mask` is for training.
FIELDS_OF_ALL = {"role", "content", "task", "tools", "mask"}
FIELDS: dict[str, set[str]] = {
    "system": {"response_format"},
    "developer": {"response_format"},
    "assistant": {"tool_calls", "reasoning_content", "reasoning", "wo_eos", "prefix"},
    "tool": {"tool_call_id"},
}


def _ignored_fields(message: Message) -> list[str]:
    known = FIELDS_OF_ALL | FIELDS.get(str(message["role"]), set())
    return [key for key, value in message.items() if key not in known and value not in (None, "", [], {}, False)]


def _unsupported_parts(message: Message) -> list[str]:
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    shown = TEXT_PARTS if message["role"] == "tool" else (*TEXT_PARTS, TOOL_RESULT)  # a user's is a block, or refused
    return [unsupported(part) for part in parts if isinstance(part, Mapping) and part.get("type") not in shown]


def notes(request: Request) -> list[str]:
    """One line for each message that the prompt leaves something out of, and one for the request."""
    lines = []
    if request.ignored:
        lines.append(f"request: not in the prompt: {', '.join(request.ignored)}")
    for number, message in enumerate(request.messages):
        name = f"message {number} ({message['role']})"
        if ignored := _ignored_fields(message):
            lines.append(f"{name}: not in the prompt: {', '.join(ignored)}")
        if parts := _unsupported_parts(message):
            lines.append(f"{name}: the model sees {', '.join(parts)} in place of a part")
    return lines


def _name(turn: Turn) -> str:
    return f"{turn.name} ({turn.role})"


def _lost_tasks(how: Conversation) -> Iterator[str]:
    for turn in how.turns:
        for task in (block.lost_task for block in turn.blocks if block.lost_task):
            yield f"{_name(turn)}: a message with the task {task} joins it, and the task is lost"


def _dropped(how: Conversation) -> Iterator[str]:
    for turn in how.dropped:
        yield f"{_name(turn)} is not in the prompt: before the last question, thinking mode drops this role"


def _unmarked_system(how: Conversation) -> Iterator[str]:
    """Later system messages in a protocol that has no token for them."""
    for before, turn in zip(how.turns, how.turns[1:], strict=False):
        if turn.role == "system" and not how.protocol.system:
            yield f"{_name(turn)}: the model sees its text right behind {_name(before)}, without any mark"


def _asks(index: int, how: Conversation) -> bool:
    """Whether an answer is announced at `index` or before the reminders that end there."""
    while index >= 0 and how.turns[index].role == "latest_reminder":
        index -= 1
    return index >= 0 and bool(announcement(index, how))


def _unannounced_answers(how: Conversation) -> Iterator[str]:
    for index, turn in enumerate(how.turns):
        if turn.role != "assistant" or _asks(index - 1, how):
            continue
        behind = f"behind {_name(how.turns[index - 1])}" if index else "at the start"
        line = f"{_name(turn)}: the model sees this answer {behind}, without {ASSISTANT} in front of it"
        with_reasoning = how.shows_reasoning(index - 1) and reasoning_of(turn.message)[0]
        yield line + (f" and its reasoning without {THINK}" if with_reasoning else "")


def _ending(how: Conversation) -> Iterator[str]:
    if len(how.turns) == how.start:
        yield "there are no messages: the prompt asks for nothing"
        return
    last = how.turns[-1]
    if last.role == "assistant":
        if not last.message.get("wo_eos") and not last.message.get("prefix"):
            yield f'{_name(last)}: the prompt ends with this answer and {EOS}; "prefix": true has the model continue'
    elif last.role == "latest_reminder":
        yield f"{_name(last)}: the prompt ends with this reminder, behind what announces the answer"
    elif not announcement(len(how.turns) - 1, how):
        yield f"{_name(last)}: the prompt ends with this message, without {ASSISTANT}: nothing asks for an answer"


def warnings(
    messages: Sequence[Message],
    thinking_mode: str,
    drop_thinking: bool = True,
    context: Sequence[Message] | None = None,
    *,
    edition: str = "preview",
) -> list[str]:
    """One line for each place where the prompt has a form that no model was trained on.

    The arguments are those of `encode_messages`, which has accepted them.
    """
    how = prepare(messages, context or (), thinking_mode == "thinking", drop_thinking, protocol_of(edition))
    checks = (_dropped, _lost_tasks, _unmarked_system, _unannounced_answers, _ending)
    return [line for check in checks for line in check(how)]
