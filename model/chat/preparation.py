"""Turns a list of messages into turns, before they are rendered.

Tool results become user content, neighbouring user messages share one turn, tool results take the order in which the
assistant asked for them, and in thinking mode some old messages are dropped. Rendering is in encoding.py.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from dsv4.errors import InputError

from .protocol import TASKS, Protocol

Message = Mapping[str, Any]

TEXT_PARTS = ("text", "input_text", "output_text")  # the first is Chat Completions', the others are the Responses API's
IMAGE_PARTS = ("image", "image_url", "input_image")
TEXT_ONLY = "Send text only. The vision part is run by the release's own code, in its inference folder."
TOOL_RESULT = "tool_result"
# Parts of Anthropic's API that have another place in OpenAI's. A tool's own message may hold any part, as in the
# releases.
ELSEWHERE = {
    TOOL_RESULT: 'Send it as a message of its own, with the role "tool" and "tool_call_id".',
    "tool_use": 'Send it in "tool_calls" of an assistant message.',
}

# Roles whose messages before the last question stay in thinking mode; answers stay without their reasoning.
# `direct_search_results` is kept as in the releases, although no rule renders it.
KEPT_ROLES = ("system", "user", "assistant", "tool", "latest_reminder", "direct_search_results")


@dataclass(frozen=True)
class Block:
    """A part of a user turn: text, or the result of a tool call.

    `lost_task` is the task of a message that joined a turn; the turn keeps its own.
    """

    content: object
    is_tool_result: bool = False
    call_id: object = None
    lost_task: str | None = None


@dataclass(frozen=True)
class Turn:
    """One message to render, or several that share a user turn. `name` is its name in errors: `message 3`."""

    name: str
    role: str
    message: Message
    blocks: list[Block] = field(default_factory=list)

    @property
    def task(self) -> str | None:
        """The task that the turn asks for instead of an answer."""
        task: str | None = self.message.get("task")
        return task

    def fail(self, problem: str, hint: str = "") -> NoReturn:
        """Raise InputError with the turn's name in front."""
        raise InputError(f"{self.name} ({self.role}): {problem}", hint)


@dataclass(frozen=True)
class Conversation:
    """The input of rendering.

    The turns before `start` were encoded earlier. `last_question` is the index of the last turn that the assistant
    answers, -1 if there is none. `dropped` are turns before it that the prompt leaves out.
    """

    protocol: Protocol
    turns: Sequence[Turn]
    start: int
    thinking: bool
    drop_thinking: bool
    last_question: int
    dropped: Sequence[Turn] = ()

    def shows_reasoning(self, index: int) -> bool:
        """Whether an answer to the turn at `index` has its reasoning in the prompt."""
        return self.thinking and (not self.drop_thinking or index >= self.last_question)


def _last_question(turns: Sequence[Turn], protocol: Protocol) -> int:
    return max((i for i, turn in enumerate(turns) if protocol.is_question(i, turn.role)), default=-1)


def reasoning_of(message: Message) -> tuple[object, str]:
    """The reasoning of an assistant message, and the field that holds it: `reasoning_content` or `reasoning`."""
    name = "reasoning" if message.get("reasoning_content") is None else "reasoning_content"
    return message.get(name), name


def _parts(content: object) -> list[Mapping[str, Any]]:
    """The parts of a content that is a list, and those inside its tool results."""
    parts = [part for part in content if isinstance(part, Mapping)] if isinstance(content, list) else []
    return parts + [inner for part in parts if part.get("type") == TOOL_RESULT for inner in _parts(part.get("content"))]


def refuse_image_parts(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raise InputError for a message with an image, for a model that would see one and an engine that cannot."""
    for index, message in enumerate(messages):
        turn = Turn(f"message {index}", str(message.get("role")), message)
        if any(part.get("type") in IMAGE_PARTS for part in _parts(message.get("content"))):
            turn.fail("images cannot be encoded", TEXT_ONLY)


def _refuse_images(turn: Turn, image: str) -> None:
    """Raise InputError if a message has an image, or the token of one in its text."""
    content = turn.message.get("content")
    parts = _parts(content)
    if any(part.get("type") in IMAGE_PARTS for part in parts):
        turn.fail("images cannot be encoded", TEXT_ONLY)
    texts = (part.get(key) for part in parts for key in ("text", "content"))
    for text in (content, reasoning_of(turn.message)[0], *texts):
        if isinstance(text, str) and image in text:
            turn.fail(f"the text contains {image}, which stands for an image", "Take it out of the text.")


def _refuse_parts_from_elsewhere(turn: Turn, protocol: Protocol) -> None:
    """Raise InputError for a part that belongs in another field: the prompt would leave it out."""
    content = turn.message.get("content")
    for part in content if isinstance(content, list) and turn.role != "tool" else ():
        kind = part.get("type") if isinstance(part, Mapping) else None
        is_block = protocol.parts_are_blocks and turn.role == "user" and kind == TOOL_RESULT
        if isinstance(kind, str) and kind in ELSEWHERE and not is_block:
            turn.fail(f"a content part of type {kind} has no place here", ELSEWHERE[kind])


def _turn(name: str, message: object, protocol: Protocol) -> Turn:
    """A checked message. Raises InputError unless role, task, tool calls and parts are valid."""
    if not isinstance(message, Mapping):
        raise InputError(f"{name}: expected an object, found {type(message).__name__}")
    role = message.get("role")
    if not isinstance(role, str):
        raise InputError(f"{name}: expected a role, found {role!r}")
    turn = Turn(name, role, message)
    task = message.get("task")
    if task is not None and (not isinstance(task, str) or task not in TASKS):
        turn.fail(f"unknown task '{task}', expected one of {', '.join(TASKS)}")
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        turn.fail("expected tool_calls to be a list of objects")
    _refuse_parts_from_elsewhere(turn, protocol)
    if protocol.image is not None:
        _refuse_images(turn, protocol.image)
    return turn


def _part_block(part: object) -> Block:
    """A part of a user message as a block. `tool_use_id` is the id of the call in Anthropic's API."""
    if isinstance(part, Mapping) and part.get("type") == TOOL_RESULT:
        return Block(part.get("content"), True, part.get("tool_call_id") or part.get("tool_use_id"))
    return Block([part])


def _blocks(turn: Turn, protocol: Protocol, lost_task: str | None = None) -> list[Block]:
    """The blocks that a user or tool message adds to a user turn."""
    content = turn.message.get("content")
    if turn.role == "user" and protocol.parts_are_blocks and isinstance(content, list) and content:
        blocks = [_part_block(part) for part in content]
    else:
        blocks = [Block(content, turn.role == "tool", turn.message.get("tool_call_id"))]
    return [replace(blocks[0], lost_task=lost_task), *blocks[1:]]


def _merge(turns: Iterable[Turn], protocol: Protocol) -> list[Turn]:
    """User and tool messages as user turns made of blocks; neighbours share one turn."""
    merged: list[Turn] = []
    for turn in turns:
        previous = merged[-1] if merged and merged[-1].role == "user" else None
        if turn.role not in ("user", "tool"):
            merged.append(turn)
        elif previous is not None and (turn.role == "tool" or previous.task is None):
            previous.blocks.extend(_blocks(turn, protocol, turn.task))
        else:
            message = turn.message if turn.role == "user" else {}
            merged.append(Turn(turn.name, "user", message, _blocks(turn, protocol)))
    return merged


def _sort_tool_results(turns: Iterable[Turn]) -> None:
    """Put tool results into the order of the calls that they answer. Text blocks keep their places."""
    order: dict[str, int] = {}
    for turn in turns:
        if turn.role == "assistant" and turn.message.get("tool_calls"):
            order = {str(call["id"]): i for i, call in enumerate(turn.message["tool_calls"]) if call.get("id")}
        results = [block for block in turn.blocks if block.is_tool_result]
        in_order = iter(sorted(results, key=lambda block: order.get(str(block.call_id), 0)))
        turn.blocks[:] = [next(in_order) if block.is_tool_result else block for block in turn.blocks]


def _without_old(conversation: Conversation) -> Conversation:
    """The conversation without the messages before the last question whose role is not kept."""
    turns, last = conversation.turns, conversation.last_question
    kept = [i for i, turn in enumerate(turns) if i >= last or turn.role in KEPT_ROLES]
    left = [turns[i] for i in kept]
    return replace(
        conversation,
        turns=left,
        start=sum(i < conversation.start for i in kept),
        last_question=_last_question(left, conversation.protocol),
        dropped=[turn for i, turn in enumerate(turns) if i not in kept],
    )


def prepare(
    messages: Sequence[Message], context: Sequence[Message], thinking: bool, drop_thinking: bool, protocol: Protocol
) -> Conversation:
    """`messages` after `context` as turns. `drop_thinking` has no effect if a message has tools.

    Raises InputError for a message that has no role, an unknown task, tool calls that are no list, or a part that
    belongs in another field.
    """
    earlier = [_turn(f"context message {i}", message, protocol) for i, message in enumerate(context)]
    new = [_turn(f"message {i}", message, protocol) for i, message in enumerate(messages)]
    drop = thinking and drop_thinking and not any(turn.message.get("tools") for turn in (*earlier, *new))
    encoded = _merge(earlier, protocol)
    turns = [*encoded, *_merge(new, protocol)]
    _sort_tool_results(turns)
    last = _last_question(turns, protocol)
    conversation = Conversation(protocol, turns, len(encoded), thinking, drop, last)
    return _without_old(conversation) if drop else conversation
