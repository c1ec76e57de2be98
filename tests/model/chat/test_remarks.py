"""What is said of a prompt that leaves something out, or shows it as no model was trained on."""

import re
from typing import Any

import pytest

from dsv4.model import encode_messages
from dsv4.model.chat.messages import Request
from dsv4.model.chat.remarks import notes, warnings

SYSTEM, QUESTION = {"role": "system", "content": "s"}, {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a", "reasoning_content": "r"}
REMINDER, DEVELOPER = {"role": "latest_reminder", "content": "note"}, {"role": "developer", "content": "d"}
TOOL = {"role": "tool", "tool_call_id": "x", "content": "t"}
EDITIONS = ["preview", "0731", "v41"]


def said(*messages: dict[str, Any], edition: str = "preview", mode: str = "thinking", **how: Any) -> list[str]:
    encode_messages(messages, mode, edition=edition, **how)
    return warnings(messages, mode, edition=edition, **how)


@pytest.mark.parametrize("edition", EDITIONS)
@pytest.mark.parametrize("mode", ["chat", "thinking"])
@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize(
    "messages",
    [
        [QUESTION],
        [SYSTEM, QUESTION],
        [SYSTEM, QUESTION, ANSWER, QUESTION],
        [QUESTION, QUESTION],
        [REMINDER, QUESTION],
        [SYSTEM, QUESTION, ANSWER, REMINDER, QUESTION],
        [QUESTION, ANSWER, TOOL, ANSWER, QUESTION],
        [{**QUESTION, "task": "title"}],
        [{**QUESTION, "task": "query"}, {"role": "assistant", "content": "a"}, QUESTION],
        [QUESTION, {**ANSWER, "wo_eos": True}],
        [QUESTION, {**ANSWER, "prefix": True}],
        [QUESTION, REMINDER, ANSWER, QUESTION],
    ],
)
def test_usual_conversations_need_no_word(edition: str, mode: str, drop: bool, messages: list[dict[str, Any]]) -> None:
    assert said(*messages, edition=edition, mode=mode, drop_thinking=drop) == []
    assert notes(Request(messages)) == []


@pytest.mark.parametrize("edition", EDITIONS)
def test_nothing_to_answer(edition: str) -> None:
    assert "no messages" in said(edition=edition)[0]
    assert said(edition=edition, context=[QUESTION]) != []
    (line,) = said(SYSTEM, edition=edition)
    assert line.startswith("message 0 (system): the prompt ends with this message, without <｜Assistant｜>")
    (line,) = said(QUESTION, ANSWER, edition=edition)
    assert line.startswith("message 1 (assistant): the prompt ends with this answer and <｜end▁of▁sentence｜>")
    (line,) = said(QUESTION, REMINDER, edition=edition)
    assert line.startswith("message 1 (latest_reminder): the prompt ends with this reminder")


@pytest.mark.parametrize("edition", EDITIONS)
def test_an_answer_behind_an_answer(edition: str) -> None:
    (line,) = said(QUESTION, ANSWER, ANSWER, QUESTION, edition=edition)
    assert line.startswith("message 2 (assistant): the model sees this answer behind message 1 (assistant), without")
    assert "<think>" not in line
    line = said(QUESTION, ANSWER, ANSWER, QUESTION, edition=edition, drop_thinking=False)[0]
    assert line.endswith("its reasoning without <think>")
    assert "at the start" in said(ANSWER, QUESTION, edition=edition)[0]


@pytest.mark.parametrize("edition", ["preview", "0731"])
def test_later_system_messages_where_nothing_marks_them(edition: str) -> None:
    """V4.1 has a token for them."""
    behind = "message 1 (system): the model sees its text right behind message 0 (user), without any mark"
    lines = said(QUESTION, SYSTEM, edition=edition)
    assert lines[0] == behind and "ends with this message" in lines[1] and len(lines) == 2
    lines = said(QUESTION, SYSTEM, ANSWER, QUESTION, edition=edition)
    assert lines[0] == behind and lines[1].startswith("message 2 (assistant): ") and len(lines) == 2
    assert said(QUESTION, SYSTEM, QUESTION, edition=edition) == [behind]
    for messages in ([QUESTION, SYSTEM], [QUESTION, SYSTEM, ANSWER, QUESTION], [QUESTION, SYSTEM, QUESTION]):
        assert said(*messages, edition="v41") == []


@pytest.mark.parametrize("edition", EDITIONS)
def test_messages_that_thinking_mode_drops(edition: str) -> None:
    critic = {"role": "critic", "content": "c"}
    lines = said(DEVELOPER, critic, QUESTION, edition=edition)
    assert [line.split(" is not")[0] for line in lines] == ["message 0 (developer)", "message 1 (critic)"]
    assert said(DEVELOPER, QUESTION, mode="chat") == []


def test_a_task_that_is_lost() -> None:
    (line,) = said(QUESTION, {**QUESTION, "task": "title"})
    assert line == "message 0 (user): a message with the task title joins it, and the task is lost"


def test_warnings_are_true() -> None:
    """What a warning quotes stands, or does not stand, in the prompt."""
    prompt = encode_messages([QUESTION, SYSTEM, ANSWER, QUESTION], "thinking")
    assert re.search("<｜User｜>qsa<｜end", prompt)


def test_fields_that_are_not_in_the_prompt_are_noted() -> None:
    request = Request(
        [
            {**QUESTION, "name": "Bob", "reasoning_content": "r", "cache": None, "x": []},
            {**ANSWER, "refusal": None, "annotations": [], "audio": {"id": "x"}, "tool_calls": []},
            {**TOOL, "is_error": True},
            {**SYSTEM, "tools": [], "response_format": {"type": "json_object"}, "weight": 0.5},
        ],
        ignored=("model", "a\x1bb"),
    )
    assert notes(request) == [
        "request: not in the prompt: model, a\x1bb",
        "message 0 (user): not in the prompt: name, reasoning_content",
        "message 1 (assistant): not in the prompt: audio",
        "message 2 (tool): not in the prompt: is_error",
        "message 3 (system): not in the prompt: weight",
    ]


def test_parts_that_the_model_does_not_see_are_noted() -> None:
    parts = [{"type": "text", "text": "t"}, {"type": "image_url", "image_url": {}}, {"type": "file"}]
    (line,) = notes(Request([{"role": "user", "content": parts}]))
    assert line == "message 0 (user): the model sees [Unsupported image_url], [Unsupported file] in place of a part"
