"""Conversations with what a chat template has to handle: reasoning, calls of tools, their results in any order."""

from typing import Any

TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "b": 1, "a": ["ü<&'\"", 2]}}},
    {"type": "function", "function": {"name": "time", "description": "Wie spät?"}},
]


def call(name: str, identifier: str, **arguments: Any) -> dict[str, Any]:
    return {"id": identifier, "type": "function", "function": {"name": name, "arguments": arguments}}


ASKS = {"role": "assistant", "reasoning_content": "Hm.", "content": "Let me see.", "tool_calls": [
    call("weather", "a", city="Zürich", days=2, exact=True, more={"x": [1, None]}), call("time", "b"),
]}  # fmt: skip
UNKNOWN_PART = 2  # the conversation with a part of a kind that encoders show as unsupported
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello\n\n<b>&"}],
    [{"role": "user", "content": "1"}, {"role": "user", "content": [{"type": "text", "text": "2"}, {"type": "x"}]}],
    [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "reasoning_content": "thought", "content": "A"},
        {"role": "user", "content": "Q2"},
        {"role": "assistant", "reasoning": "more thought", "content": "A2"},
        {"role": "user", "content": "Q3"},
    ],
    [{"role": "user", "content": "Q"}, ASKS, {"role": "tool", "tool_call_id": "b", "content": "noon"},
     {"role": "tool", "tool_call_id": "a", "content": "rain"}],
    [{"role": "user", "content": "Q"}, ASKS, {"role": "tool", "tool_call_id": "b", "content": "noon"},
     {"role": "user", "content": "and?"}, {"role": "tool", "tool_call_id": "a", "content": "rain"},
     {"role": "assistant", "content": None, "tool_calls": [call("time", "c")]},
     {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "one"}]}],
    [{"role": "system", "content": ""}, {"role": "user", "content": "Q"}, {"role": "system", "content": "Now short."},
     {"role": "user", "content": "R"}],
]  # fmt: skip
