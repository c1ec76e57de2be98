"""Message files: what a request says beside its messages, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from dsv4.errors import InputError
from dsv4.model.chat.messages import as_request, read_request, read_tools

QUESTION = {"role": "user", "content": "q"}
SYSTEM = {"role": "system", "content": "s"}
TOOL = {"type": "function", "function": {"name": "f"}}


def request(**more: Any) -> Any:
    return as_request({"messages": [SYSTEM, QUESTION], **more}, "request.json")


def test_a_list_says_nothing_but_its_messages() -> None:
    found = as_request([QUESTION], "list.json")
    assert (found.messages, found.thinking_mode, found.reasoning_effort, found.ignored) == ([QUESTION], None, None, ())


def test_tools_and_format_go_into_the_system_message() -> None:
    schema = {"type": "json_object"}
    assert request(tools=[TOOL], response_format=schema).messages == [
        {**SYSTEM, "tools": [TOOL], "response_format": schema},
        QUESTION,
    ]
    made = as_request({"messages": [QUESTION], "tools": [TOOL]}, "x").messages
    assert made == [{"role": "system", "content": "", "tools": [TOOL]}, QUESTION]
    assert request(response_format={"type": "text"}, tools=[]).messages == [SYSTEM, QUESTION]


def test_the_task_goes_into_the_last_user_message() -> None:
    answer, again = {"role": "assistant", "content": "a"}, {"role": "user", "content": "again"}
    found = as_request({"messages": [QUESTION, answer, again], "task": "title"}, "x").messages
    assert found == [QUESTION, answer, {**again, "task": "title"}]
    assert again == {"role": "user", "content": "again"}


@pytest.mark.parametrize(
    ("given", "mode", "effort"),
    [
        ({}, None, None),
        ({"thinking": None, "reasoning_effort": None}, None, None),
        ({"thinking": {"type": "enabled"}}, "thinking", None),
        ({"thinking": {"type": "adaptive"}}, "thinking", None),
        ({"thinking": {"type": "disabled"}}, "chat", None),
        ({"reasoning_effort": "none"}, "chat", None),
        ({"reasoning_effort": "medium"}, "thinking", "medium"),
        ({"reasoning_effort": 60}, "thinking", 60),
        ({"thinking": {"type": "disabled"}, "reasoning_effort": "max"}, "chat", "max"),
        ({"thinking": {"type": "enabled"}, "reasoning_effort": "none"}, "thinking", None),
    ],
)
def test_how_to_answer(given: dict[str, Any], mode: str | None, effort: Any) -> None:
    found = request(**given)
    assert (found.thinking_mode, found.reasoning_effort, found.ignored) == (mode, effort, ())


def test_what_does_not_change_the_prompt_is_listed() -> None:
    assert request(model="x", temperature=0, stop=None, tool_choice="auto").ignored == (
        "model",
        "temperature",
        "tool_choice",
    )


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"messages": {"messages": [QUESTION]}}, "expected a JSON list of messages"),
        ({"messages": [QUESTION], "thinking": True}, "thinking is True"),
        ({"messages": [QUESTION], "thinking": {"type": ["enabled"]}}, "thinking is"),
        ({"messages": [QUESTION], "thinking": {"type": "on"}}, "thinking is"),
        ({"messages": [QUESTION], "reasoning_effort": "much"}, "reasoning_effort is 'much'"),
        ({"messages": [QUESTION], "reasoning_effort": True}, "reasoning_effort is True"),
        ({"messages": [QUESTION], "reasoning_effort": {"effort": "high"}}, "reasoning_effort is"),
        ({"messages": [QUESTION], "task": "sing"}, "unknown task 'sing'"),
        ({"messages": [QUESTION], "task": ["title"]}, "unknown task"),
        ({"messages": [SYSTEM], "task": "title"}, "a task needs a user message"),
        ({"message": [QUESTION]}, "expected a JSON list of messages"),
        ("hello", "expected a JSON list of messages"),
        ([["user", "q"]], "expected a JSON list of messages"),
    ],
)
def test_what_is_no_request_is_named(value: Any, problem: str) -> None:
    with pytest.raises(InputError, match=r"request\.json: .*") as caught:
        as_request(value, "request.json")
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    "text", ['[{"role": "user", "role": "system"}]', '[{"content": NaN}]', "[1", "", "[" * 100_000]
)
def test_files_are_strict_json(tmp_path: Path, text: str) -> None:
    path = tmp_path / "m.json"
    path.write_text(text)
    for read in (read_request, read_tools):
        with pytest.raises(InputError, match=r"m\.json") as caught:
            read(str(path))
        assert "Download" not in caught.value.hint


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([QUESTION]).encode())
    assert read_request(str(path)).messages == [QUESTION]
