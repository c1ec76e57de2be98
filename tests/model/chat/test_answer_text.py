"""Text while tokens arrive: whole characters, stop strings that straddle tokens, nothing shown twice or lost."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv4.convert.synthetic.tokenizer import tokenizer_json
from dsv4.model.chat.answer import AnswerText, parse_answer, remembered
from dsv4.model.chat.tokenizer import TextTokenizer

EOS = 1


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    path: Path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(tokenizer_json(), encoding="utf-8")
    return TextTokenizer(path)


def shown(tokenizer: TextTokenizer, ids: list[int], *stop: str) -> tuple[list[str], AnswerText]:
    answer = AnswerText(tokenizer, stop, frozenset([EOS]))
    return [*(answer.add(token) for token in ids), answer.rest()], answer


text_with_everything = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=text_with_everything)
def test_streamed_text_is_the_text(tokenizer: TextTokenizer, text: str) -> None:
    pieces, answer = shown(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == answer.text == text


def test_a_character_of_four_tokens_comes_at_once(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode("a🌍")
    assert len(ids) == 5
    assert shown(tokenizer, ids)[0] == ["a", "", "", "", "🌍", ""]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.lists(st.integers(3, 400), max_size=30))
def test_any_tokens_can_be_shown(tokenizer: TextTokenizer, ids: list[int]) -> None:
    pieces, answer = shown(tokenizer, ids)
    assert "".join(pieces) == answer.text


def test_half_a_character_at_the_end_is_shown(tokenizer: TextTokenizer) -> None:
    pieces, _ = shown(tokenizer, tokenizer.encode("a🌍")[:3])
    assert "".join(pieces) == "a\ufffd"


def test_the_end_token_is_not_shown(tokenizer: TextTokenizer) -> None:
    assert "".join(shown(tokenizer, [*tokenizer.encode("hello"), EOS])[0]) == "hello"


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text("ab", max_size=12), stop=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=2))
def test_stop_strings(tokenizer: TextTokenizer, text: str, stop: list[str]) -> None:
    answer = AnswerText(tokenizer, stop, frozenset())
    pieces = []
    for token in tokenizer.encode(text):
        pieces.append(answer.add(token))
        if answer.stopped:
            break
    pieces.append(answer.rest())
    assert answer.stopped == any(s in text for s in stop)
    ends = [text.index(s) + len(s) for s in stop if s in text]
    first = min(ends, default=len(text))
    cut = min((text[:first].index(s) for s in stop if s in text[:first]), default=len(text))
    assert "".join(pieces) == answer.text == text[:cut]


def test_text_that_may_become_a_stop_string_waits(tokenizer: TextTokenizer) -> None:
    answer = AnswerText(tokenizer, ["xyz"], frozenset())
    assert [answer.add(token) for token in tokenizer.encode("axyxq")] == ["a", "", "", "xy", "xq"]


def test_parsed_answers() -> None:
    message, problem = parse_answer("r</think>c", "thinking", "preview")
    assert message is not None and (message["reasoning_content"], message["content"], problem) == ("r", "c", None)
    message, problem = parse_answer("r", "thinking", "preview")
    assert message is None and problem is not None and "</think>" in problem


def test_answers_are_parsed_by_the_rules_of_their_edition() -> None:
    """The tags around tool calls differ: those of one edition are plain content in the other."""
    text = '\n\n<{0}tool_calls>\n<{0}invoke name="f">\n\n</{0}invoke>\n</{0}tool_calls>'.format("｜DSML｜")
    for edition, written in (
        ("0731", text),
        ("v41", text.replace("tool_calls", " calls").replace("invoke", " invoke")),
    ):
        message, problem = parse_answer(written, "chat", edition)
        assert problem is None and message is not None
        assert [call["function"]["name"] for call in message["tool_calls"]] == ["f"]
        other, _ = parse_answer(written, "chat", "v41" if edition == "0731" else "0731")
        assert other is None or not other["tool_calls"]


@pytest.mark.parametrize(
    ("text", "mode", "content", "reasoning"),
    [
        ("r</think>c", "thinking", "c", "r"),
        ("cut off while reas", "thinking", "", "cut off while reas"),
        ("r</think>c<think>", "thinking", "c<think>", "r"),
        ("c<think>", "chat", "c<think>", ""),
        ("cut o", "chat", "cut o", ""),
    ],
)
def test_every_answer_can_be_remembered(text: str, mode: str, content: str, reasoning: str) -> None:
    message = remembered(text, mode, "preview")
    assert (message["role"], message["content"], message["reasoning_content"]) == ("assistant", content, reasoning)
