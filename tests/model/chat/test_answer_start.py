"""Where an answer begins: inside the reasoning or behind it; and tokens that a tokenizer would cut into pieces."""

from pathlib import Path
from typing import Any

import pytest

from dsv4.commands.prompting import Asked, Mode, choose_style, warn_of_missing_tokens, write_prompt
from dsv4.commands.run.answers import answer_json
from dsv4.commands.run.prompts import Prompt
from dsv4.convert.synthetic.tokenizer import tokenizer_json
from dsv4.errors import InputError
from dsv4.model import encode_messages
from dsv4.model.chat.detection import PromptEdition
from dsv4.model.chat.messages import Request
from dsv4.model.chat.tokenizer import TextTokenizer, missing_tokens
from dsv4.model.generate import Answer
from dsv4.output import configure

QUESTION = {"role": "user", "content": "Which is longer?"}
REMINDER = {"role": "latest_reminder", "content": "Today is Friday."}


def begun(**fields: Any) -> dict[str, Any]:
    """An answer that the model continues."""
    return {"role": "assistant", "prefix": True, **fields}


@pytest.mark.parametrize(
    ("messages", "mode", "expected"),
    [
        ([QUESTION], Mode.think, "thinking"),
        ([QUESTION], Mode.chat, "chat"),
        ([QUESTION, REMINDER], Mode.think, "thinking"),
        ([{**QUESTION, "task": "title"}], Mode.think, "chat"),
        ([{**QUESTION, "task": "action"}], Mode.think, "chat"),
        ([QUESTION, begun(content="The")], Mode.think, "chat"),
        ([QUESTION, begun(reasoning_content="Let me", content="The")], Mode.think, "chat"),
        ([QUESTION, begun(reasoning_content="Let me", content="")], Mode.think, "thinking"),
        ([QUESTION, begun(reasoning="Let me", content=None)], Mode.think, "thinking"),
        ([QUESTION, begun(reasoning_content="Let me", content="")], Mode.chat, "chat"),
        ([{**QUESTION, "task": "title"}, begun(reasoning_content="Let me", content="")], Mode.think, "chat"),
    ],
)
def test_how_the_answer_is_parsed(messages: list[dict[str, Any]], mode: Mode, expected: str) -> None:
    """In the end it is the prompt that decides: its last <think> is still open, or closed, or there is none."""
    request, out = Request(messages), configure(False, True, False)
    written = write_prompt(request, choose_style(Asked(mode), request, "preview"), out)
    assert written.answer_mode == expected
    after = written.text.rpartition("<｜Assistant｜>")[2]
    is_open = "<think>" in after and "</think>" not in after and "task" not in messages[0]
    assert (expected == "thinking") == is_open


@pytest.mark.parametrize(
    "messages", [[{**QUESTION, "task": "title"}], [QUESTION, begun(reasoning_content="Let me", content="The")]]
)
def test_run_asks_for_no_end_of_reasoning_where_none_is_open(messages: list[dict[str, Any]]) -> None:
    request = Request(messages)
    written = write_prompt(request, choose_style(Asked(Mode.think), request, "preview"), configure(False, True, False))
    found = answer_json(Prompt([1], written), Answer([5], "stop"), "longer one")
    assert "problem" not in found and found["message"]["content"] == "longer one"
    assert found["thinking_mode"] == "thinking"  # of the prompt


def test_an_empty_reasoning_content_counts_before_reasoning() -> None:
    """An empty text is a value: only null or an absent field leaves the word to `reasoning`."""

    def prompt(**fields: Any) -> str:
        return encode_messages([QUESTION, {"role": "assistant", "content": "A", **fields}], "thinking")

    assert "never" not in prompt(reasoning_content="", reasoning="never")
    assert prompt(reasoning_content="", reasoning="never") == prompt(reasoning_content="")
    assert prompt(reasoning_content=None, reasoning="shown") == prompt(reasoning_content="shown")


def test_tokens_that_the_tokenizer_lacks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole, broken = tmp_path / "whole.json", tmp_path / "broken.json"
    whole.write_text(tokenizer_json())
    broken.write_text(tokenizer_json().replace("<｜User｜>", "<｜Used｜>").replace('"</think>"', '"</thinks>"'))
    edition = PromptEdition("preview", "for the test")
    warn_of_missing_tokens(TextTokenizer(whole), edition, configure(False, False, False))
    assert capfd.readouterr().err == ""
    assert missing_tokens(TextTokenizer(broken), "preview") == ["<｜User｜>", "</think>"]
    warn_of_missing_tokens(TextTokenizer(broken), edition, configure(False, False, False))
    assert "lacks tokens of edition preview" in (said := capfd.readouterr().err) and "<｜User｜>, </think>" in said


def test_the_other_fields_still_have_to_be_text() -> None:
    with pytest.raises(InputError, match="reasoning_content"):
        encode_messages([QUESTION, {"role": "assistant", "content": "A", "reasoning_content": 3}], "thinking")
