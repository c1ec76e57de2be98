"""The preview's protocol, rule by rule, as expected strings; and that what is rendered is parsed back."""

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4.errors import InputError, UsageError
from dsv4.model import encode_messages, parse_completion
from dsv4.model.chat.editions.preview import ABSOLUTE_MAXIMUM as EFFORT_MAX
from dsv4.model.chat.editions.preview import PROTOCOL as PREVIEW

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
SYSTEM = {"role": "system", "content": "Be brief."}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Wetter für Orte", "parameters": {}}}


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def assistant(content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def tool(content: Any, call_id: str = "a") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def call(name: str, arguments: Any, call_id: str = "a") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def chat(*messages: dict[str, Any], **how: Any) -> str:
    """The prompt in chat mode without its BOS."""
    prompt = encode_messages(messages, thinking_mode="chat", **how)
    return prompt.removeprefix(BOS)


def think(*messages: dict[str, Any], **how: Any) -> str:
    return encode_messages(messages, thinking_mode="thinking", **how).removeprefix(BOS)


# --- the three modes ---


def test_one_question_in_each_mode() -> None:
    hello = [user("Hello")]
    assert encode_messages(hello, "chat") == f"{BOS}<｜User｜>Hello<｜Assistant｜></think>"
    assert encode_messages(hello, "thinking") == f"{BOS}<｜User｜>Hello<｜Assistant｜><think>"
    assert encode_messages(hello, "thinking", reasoning_effort="high") == encode_messages(hello, "thinking")
    expected = (
        f"{BOS}Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
        "You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root "
        "cause, rigorously stress-testing your logic against all potential paths, edge cases, and adversarial "
        "scenarios.\n"
        "Explicitly write out your entire deliberation process, documenting every intermediate step, considered "
        "alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.\n\n"
        "<｜User｜>Hello<｜Assistant｜><think>"
    )
    assert encode_messages(hello, "thinking", reasoning_effort="max") == expected


def test_effort_max_changes_nothing_in_chat_mode() -> None:
    assert chat(user("Hello"), reasoning_effort="max") == "<｜User｜>Hello<｜Assistant｜></think>"


def test_effort_prefix_comes_before_the_system_message() -> None:
    assert think(SYSTEM, user("Hi"), reasoning_effort="max").startswith(EFFORT_MAX + "Be brief.<｜User｜>")


def test_bos_can_be_left_out_and_has_no_place_after_context() -> None:
    assert encode_messages([user("a")], "chat", add_default_bos_token=False).startswith("<｜User｜>")
    assert encode_messages([user("b")], "chat", context=[user("a"), assistant("x")]).startswith("<｜User｜>b")


def test_no_messages_are_a_bare_bos() -> None:
    assert encode_messages([], "chat") == BOS


# --- roles ---


def test_system_then_user() -> None:
    assert chat(SYSTEM, user("Hi")) == "Be brief.<｜User｜>Hi<｜Assistant｜></think>"


def test_system_without_content() -> None:
    assert chat({"role": "system"}, user("Hi")) == "<｜User｜>Hi<｜Assistant｜></think>"
    assert chat({"role": "system", "content": None}) == ""


def test_a_system_message_announces_no_answer() -> None:
    assert chat(SYSTEM) == "Be brief."


def test_conversation_in_chat_mode() -> None:
    prompt = chat(SYSTEM, user("1+1?"), assistant("2"), user("2+2?"))
    assert prompt == (f"Be brief.<｜User｜>1+1?<｜Assistant｜></think>2{EOS}<｜User｜>2+2?<｜Assistant｜></think>")


def test_chat_mode_never_renders_reasoning() -> None:
    prompt = chat(user("a"), assistant("b", reasoning_content="secret"), user("c"))
    assert prompt == f"<｜User｜>a<｜Assistant｜></think>b{EOS}<｜User｜>c<｜Assistant｜></think>"


def test_an_assistant_message_at_the_end_is_not_answered() -> None:
    assert chat(user("a"), assistant("b")) == f"<｜User｜>a<｜Assistant｜></think>b{EOS}"


def test_wo_eos_leaves_the_answer_open() -> None:
    assert chat(user("a"), assistant("b", wo_eos=True)) == "<｜User｜>a<｜Assistant｜></think>b"
    assert chat(user("a"), assistant("b", wo_eos=False)).endswith(f"b{EOS}")


def test_developer() -> None:
    prompt = chat({"role": "developer", "content": "Do it."})
    assert prompt == "<｜User｜>Do it.<｜Assistant｜></think>"
    assert think({"role": "developer", "content": "Do it."}) == "<｜User｜>Do it.<｜Assistant｜><think>"


@pytest.mark.parametrize("content", [None, ""])
def test_developer_needs_content(content: str | None) -> None:
    with pytest.raises(InputError, match=r"message 0 \(developer\).*content"):
        chat({"role": "developer", "content": content})


def test_latest_reminder() -> None:
    prompt = chat(user("a"), {"role": "latest_reminder", "content": "It is Monday."})
    assert prompt == "<｜User｜>a<｜Assistant｜></think><｜latest_reminder｜>It is Monday."


def test_reminder_before_the_question() -> None:
    prompt = chat(SYSTEM, {"role": "latest_reminder", "content": "Monday"}, user("a"))
    assert prompt == "Be brief.<｜latest_reminder｜>Monday<｜User｜>a<｜Assistant｜></think>"


# --- user content: merging and tool results ---


def test_neighbouring_user_messages_share_one_turn() -> None:
    assert chat(user("a"), user("b")) == "<｜User｜>a\n\nb<｜Assistant｜></think>"


def test_an_empty_user_message_is_an_empty_block() -> None:
    assert chat(user("a"), user(None), user("b")) == "<｜User｜>a\n\n\n\nb<｜Assistant｜></think>"


def test_tool_result_becomes_user_content() -> None:
    prompt = chat(user("w?"), assistant("", tool_calls=[call("weather", "{}")]), tool("sunny"))
    assert prompt.endswith(f"{EOS}<｜User｜><tool_result>sunny</tool_result><｜Assistant｜></think>")


def test_tool_result_and_text_share_a_turn() -> None:
    results = "<｜User｜><tool_result>1</tool_result>\n\nand?\n\n<tool_result>2</tool_result><｜Assistant｜></think>"
    assert chat(tool("1"), user("and?"), tool("2")) == results


def test_a_user_message_after_a_task_starts_a_new_turn_but_a_tool_result_does_not() -> None:
    assert chat(user("a", task="query"), user("b")) == "<｜User｜>a<｜User｜>b<｜Assistant｜></think>"
    prompt = chat(user("a", task="query"), tool("r"))
    assert prompt == "<｜User｜>a\n\n<tool_result>r</tool_result><｜query｜>"


def test_the_task_of_an_appended_message_is_lost() -> None:
    assert chat(user("a"), user("b", task="query")) == "<｜User｜>a\n\nb<｜Assistant｜></think>"


def test_content_parts() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "image_url", "image_url": {}}, {"type": "text", "text": "two"}]
    joined = "one\n\n[Unsupported image_url]\n\ntwo"
    assert chat(tool(parts)) == f"<｜User｜><tool_result>{joined}</tool_result><｜Assistant｜></think>"
    assert chat(user(parts)) == f"<｜User｜>{joined}<｜Assistant｜></think>"


def results_of(prompt: str) -> str:
    return prompt.rpartition("<｜User｜>")[2].removesuffix("<｜Assistant｜></think>")


def test_tool_results_follow_the_order_of_the_calls() -> None:
    calls = [call("f", "{}", "one"), call("f", "{}", "two"), call("f", "{}", "three")]
    asked = [user("q"), assistant("", tool_calls=calls)]
    prompt = chat(*asked, tool("3", "three"), user("text"), tool("1", "one"), tool("2", "two"))
    one, two, three = (f"<tool_result>{i}</tool_result>" for i in (1, 2, 3))
    assert results_of(prompt) == f"{one}\n\ntext\n\n{two}\n\n{three}"


def test_unknown_ids_sort_as_the_first_call() -> None:
    asked = [user("q"), assistant("", tool_calls=[call("f", "{}", "one"), call("f", "{}", "two")])]
    prompt = chat(*asked, tool("2", "two"), tool("?", "other"), tool("1", "one"))
    assert results_of(prompt) == "\n\n".join(f"<tool_result>{i}</tool_result>" for i in "?12")


def test_only_the_latest_calls_order_the_results() -> None:
    first = assistant("", tool_calls=[call("f", "{}", "b"), call("f", "{}", "a")])
    second = assistant("", tool_calls=[call("f", "{}", "a"), call("f", "{}", "b")])
    prompt = chat(user("q"), first, tool("x", "b"), second, assistant("aside"), tool("B", "b"), tool("A", "a"))
    assert results_of(prompt) == "<tool_result>A</tool_result>\n\n<tool_result>B</tool_result>"


def test_results_without_any_call_keep_their_order() -> None:
    prompt = chat(tool("2", "b"), tool("1", "a"))
    assert results_of(prompt) == "<tool_result>2</tool_result>\n\n<tool_result>1</tool_result>"


def test_context_orders_the_results_too() -> None:
    context = [user("q"), assistant("", tool_calls=[call("f", "{}", "a"), call("f", "{}", "b")])]
    prompt = encode_messages([tool("B", "b"), tool("A", "a")], "chat", context=context)
    expected = "<｜User｜><tool_result>A</tool_result>\n\n<tool_result>B</tool_result><｜Assistant｜></think>"
    assert prompt == expected


# --- thinking ---


def test_reasoning_before_the_last_question_is_dropped() -> None:
    prompt = think(user("a"), assistant("b", reasoning_content="old"), user("c"))
    assert prompt == f"<｜User｜>a<｜Assistant｜></think>b{EOS}<｜User｜>c<｜Assistant｜><think>"


def test_reasoning_after_the_last_question_stays() -> None:
    prompt = think(user("a"), assistant("b", reasoning_content="new"))
    assert prompt == f"<｜User｜>a<｜Assistant｜><think>new</think>b{EOS}"
    assert think(user("a"), assistant("b")) == f"<｜User｜>a<｜Assistant｜><think></think>b{EOS}"


def test_drop_thinking_off_keeps_all_reasoning() -> None:
    prompt = think(user("a"), assistant("b", reasoning_content="old"), user("c"), drop_thinking=False)
    assert prompt == f"<｜User｜>a<｜Assistant｜><think>old</think>b{EOS}<｜User｜>c<｜Assistant｜><think>"


@pytest.mark.parametrize("where", range(3))
def test_tools_anywhere_keep_all_reasoning(where: int) -> None:
    messages = [user("a"), assistant("b", reasoning_content="old"), user("c")]
    messages[where] = {**messages[where], "tools": [WEATHER]}
    assert "<think>old</think>b" in think(*messages)


def test_empty_tools_are_no_tools() -> None:
    messages = [{**SYSTEM, "tools": []}, user("a"), assistant("b", reasoning_content="old"), user("c")]
    assert think(*messages).startswith("Be brief.<｜User｜>a<｜Assistant｜></think>b")


def test_a_tool_result_counts_as_the_last_question() -> None:
    prompt = think(user("a"), assistant("b", reasoning_content="old"), tool("r"))
    assert prompt == (
        f"<｜User｜>a<｜Assistant｜></think>b{EOS}<｜User｜><tool_result>r</tool_result><｜Assistant｜><think>"
    )


def test_developer_and_unknown_messages_before_the_last_question_vanish() -> None:
    messages = [SYSTEM, {"role": "developer", "content": "old"}, {"role": "critic", "content": "no"}, user("a")]
    assert think(*messages) == "Be brief.<｜User｜>a<｜Assistant｜><think>"
    kept = think(SYSTEM, {"role": "developer", "content": "old"}, user("a"), drop_thinking=False)
    assert kept == "Be brief.<｜User｜>old<｜User｜>a<｜Assistant｜><think>"


def test_a_reminder_before_the_last_question_stays() -> None:
    reminder = {"role": "latest_reminder", "content": "Monday"}
    assert think(reminder, user("a")) == "<｜latest_reminder｜>Monday<｜User｜>a<｜Assistant｜><think>"


def test_without_any_question_nothing_is_dropped() -> None:
    assert think(SYSTEM, assistant("b", reasoning_content="r")) == f"Be brief.r</think>b{EOS}"


def test_the_effort_prefix_needs_the_first_message() -> None:
    assert EFFORT_MAX not in encode_messages([user("b")], "thinking", reasoning_effort="max", context=[user("a")])


def test_context_is_not_rendered_but_decides() -> None:
    context = [user("a"), assistant("b", reasoning_content="r")]
    prompt = encode_messages([user("c")], "thinking", context=context)
    assert prompt == "<｜User｜>c<｜Assistant｜><think>"
    answer = encode_messages([assistant("b", reasoning_content="r")], "thinking", context=[user("a")])
    assert answer == f"r</think>b{EOS}"


def test_context_whose_messages_vanish() -> None:
    context = [SYSTEM, {"role": "developer", "content": "d"}]
    assert encode_messages([user("c")], "thinking", context=context) == "<｜User｜>c<｜Assistant｜><think>"


def test_context_with_tools_keeps_reasoning() -> None:
    context = [{**SYSTEM, "tools": [WEATHER]}]
    messages = [user("a"), assistant("b", reasoning_content="old"), user("c")]
    assert "<think>old</think>b" in encode_messages(messages, "thinking", context=context)


# --- tasks ---


@pytest.mark.parametrize("task", ["query", "authority", "domain", "title", "read_url"])
def test_task_tokens(task: str) -> None:
    assert chat(user("a", task=task)) == f"<｜User｜>a<｜{task}｜>"
    assert think(user("a", task=task)) == f"<｜User｜>a<｜{task}｜>"


def test_the_action_task_announces_the_assistant() -> None:
    assert chat(user("a", task="action")) == "<｜User｜>a<｜Assistant｜></think><｜action｜>"
    assert think(user("a", task="action")) == "<｜User｜>a<｜Assistant｜><think><｜action｜>"


def test_the_answer_to_a_task_has_no_thinking_part() -> None:
    prompt = think(user("a", task="title"), assistant("A title", reasoning_content="r"))
    assert prompt == f"<｜User｜>a<｜title｜>A title{EOS}"


# --- tools and response format ---


def test_tools_text() -> None:
    prompt = chat({**SYSTEM, "tools": [WEATHER, WEATHER]}, user("a"))
    schema = '{"name": "weather", "description": "Wetter für Orte", "parameters": {}}'
    start, _, rest = prompt.partition("### Available Tool Schemas\n\n")
    assert start.startswith("Be brief.\n\n## Tools\n\nYou have access to a set of tools to help answer the user's ")
    assert rest == (
        f"{schema}\n{schema}\n\nYou MUST strictly follow the above defined tool name and parameter schemas "
        "to invoke tool calls.\n<｜User｜>a<｜Assistant｜></think>"
    )


def test_tools_without_system_content() -> None:
    assert chat({"role": "system", "tools": [WEATHER]}).startswith("\n\n## Tools\n\n")


def test_response_format_comes_after_the_tools() -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "größe"}}
    prompt = chat({"role": "developer", "content": "d", "tools": [WEATHER], "response_format": schema})
    assert prompt.endswith(
        "to invoke tool calls.\n\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
        '{"type": "json_schema", "json_schema": {"name": "größe"}}<｜Assistant｜></think>'
    )


def test_the_tools_text_shows_a_call() -> None:
    assert (
        '<｜DSML｜invoke name="$TOOL_NAME">\n<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">'
        in PREVIEW.tools_text("")
    )


def test_tool_calls() -> None:
    arguments = {"city": 'Zürich "x"', "days": 3, "metric": True, "list": ["ä", 1.5], "nothing": None}
    asked = [call("weather", json.dumps(arguments)), call("f", {"a": "b"})]
    prompt = chat(user("w?"), assistant("Let me see.", tool_calls=asked))
    assert prompt == (
        "<｜User｜>w?<｜Assistant｜></think>Let me see.\n\n"
        "<｜DSML｜tool_calls>\n"
        '<｜DSML｜invoke name="weather">\n'
        '<｜DSML｜parameter name="city" string="true">Zürich "x"</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="metric" string="false">true</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="list" string="false">["ä", 1.5]</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="nothing" string="false">null</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n"
        '<｜DSML｜invoke name="f">\n'
        '<｜DSML｜parameter name="a" string="true">b</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n"
        f"</｜DSML｜tool_calls>{EOS}"
    )


def test_arguments_that_are_not_json() -> None:
    prompt = chat(user("a"), assistant(None, tool_calls=[call("f", "just text")]))
    assert '<｜DSML｜parameter name="arguments" string="true">just text</｜DSML｜parameter>' in prompt


def test_the_messages_are_not_modified() -> None:
    asked = [call("f", "{}", "a"), call("f", "{}", "b")]
    messages = [user("q"), assistant("", tool_calls=asked, reasoning_content="r"), tool("B", "b"), tool("A", "a")]
    before = copy.deepcopy(messages)
    think(*messages)
    assert messages == before


# --- errors ---


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ({"role": "critic", "content": "x"}, "unknown role 'critic'"),
        ({"role": "\x1b[31m", "content": "x"}, r"unknown role '\\x1b\[31m'"),
        ({"content": "x"}, "expected a role"),
        ("hello", "expected an object, found str"),
        (user("a", task="sing"), "unknown task 'sing'"),
        (user(3), "expected content to be text, found int"),
        (user(["a"]), "expected content parts to be objects"),
        ({**SYSTEM, "tools": [{"name": "f"}]}, "expected tools"),
        (assistant("", tool_calls=[{"name": "f"}]), "expected tool calls"),
        (assistant("", tool_calls="f"), "expected tool_calls to be a list"),
        (assistant("", tool_calls=[call("f", "[1]")]), "JSON object, found list"),
    ],
)
def test_what_the_protocol_does_not_know_is_named(message: Any, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        encode_messages([message], thinking_mode="chat")


def test_unknown_modes_are_named() -> None:
    with pytest.raises(UsageError, match="unknown thinking mode 'loud'"):
        encode_messages([user("a")], thinking_mode="loud")
    with pytest.raises(UsageError, match="unknown reasoning effort 'low'"):
        encode_messages([user("a")], thinking_mode="thinking", reasoning_effort="low")
    with pytest.raises(UsageError, match="unknown thinking mode 'loud'"):
        parse_completion(EOS, "loud")


# --- parsing ---


def test_parse_content() -> None:
    expected = {"role": "assistant", "content": "4", "reasoning_content": "", "tool_calls": []}
    assert parse_completion(f"4{EOS}", "chat") == expected
    assert parse_completion(f"2+2</think>4{EOS}", "thinking") == {**expected, "reasoning_content": "2+2"}
    assert parse_completion(EOS, "chat") == {**expected, "content": ""}


CALLS = (
    "\n\n<｜DSML｜tool_calls>\n"
    '<｜DSML｜invoke name="weather">\n'
    '<｜DSML｜parameter name="city" string="true">Zürich "x"\n</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">[1,  2]</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n"
    '<｜DSML｜invoke name="now">\n\n</｜DSML｜invoke>\n'
    "</｜DSML｜tool_calls>"
)


def test_parse_tool_calls() -> None:
    reply = parse_completion(f"hm</think>Wait.{CALLS}{EOS}", "thinking")
    assert reply == {
        "role": "assistant",
        "content": "Wait.",
        "reasoning_content": "hm",
        "tool_calls": [
            {
                "type": "function",
                "function": {"name": "weather", "arguments": '{"city": "Zürich \\"x\\"\\n", "days": [1,  2]}'},
            },
            {"type": "function", "function": {"name": "now", "arguments": "{}"}},
        ],
    }


@pytest.mark.parametrize(
    ("text", "mode", "problem"),
    [
        ("no end", "thinking", "character 6: expected </think>"),
        (f"hm{CALLS}{EOS}", "thinking", "expected </think>"),
        ("no end", "chat", "character 6: expected <｜end▁of▁sentence｜> at the end"),
        (f"a{EOS}b", "chat", "character 20: text after <｜end▁of▁sentence｜>"),
        (f"a{CALLS}b{EOS}", "chat", "expected the end of the completion after the tool calls"),
        (f"a{CALLS}", "chat", "expected <｜end▁of▁sentence｜> at the end"),
        (f"a</think>b{EOS}", "chat", "character 1: </think> inside the content"),
        (f"a<｜User｜></think>b{EOS}", "thinking", "character 1: <｜User｜> inside the reasoning"),
        (f"a</think>b<think>{EOS}", "thinking", "character 10: <think> inside the content"),
        (f"ab<｜DSML｜tool_calls>{EOS}", "chat", "character 3: ｜DSML｜ inside the content"),
        (f"{CALLS}{EOS}".replace('name="days"', 'name="city"'), "chat", "parameter 'city' is given twice"),
        (f"{CALLS}{EOS}".replace(' string="true"', ""), "chat", "expected <｜DSML｜parameter name"),
        (f"{CALLS}{EOS}".replace('string="true"', 'string="yes"'), "chat", "expected <｜DSML｜parameter name"),
        (f"{CALLS}{EOS}".replace("</｜DSML｜parameter>", ""), "chat", "expected <｜DSML｜parameter name"),
        (f"{CALLS}{EOS}".replace("parameter>\n<", "parameter> \n<"), "chat", "end its line"),
        (f"{CALLS}{EOS}".replace(' name="weather"', ""), "chat", 'expected <｜DSML｜invoke name="…">'),
        (f"{CALLS}{EOS}".replace("tool_calls>\n", "tool_calls>", 1), "chat", "on the next line"),
        (f"{CALLS}{EOS}".replace("</｜DSML｜tool_calls>", ""), "chat", "on the next line"),
        (f"{CALLS}{EOS}".replace("</｜DSML｜invoke>", ""), "chat", "expected"),
    ],
)
def test_completions_that_leave_the_protocol(text: str, mode: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        parse_completion(text, mode)


@pytest.mark.parametrize("token", [token for token in PREVIEW.special_tokens if token not in (EOS,)])
def test_every_special_token_inside_content_is_refused(token: str) -> None:
    with pytest.raises(InputError, match="inside the content"):
        parse_completion(f"a{token}b{EOS}", "chat")


# --- round trips ---

plain_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="｜"), max_size=20)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | plain_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(plain_text, inner, max_size=3),
    max_leaves=5,
)
names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_-]{0,10}", fullmatch=True)
calls = st.lists(st.tuples(names, st.dictionaries(names, json_values, max_size=4)), max_size=3)


@settings(max_examples=150, deadline=None)
@given(content=plain_text, reasoning=plain_text, calls=calls, thinking=st.booleans())
@pytest.mark.slow
def test_what_is_rendered_is_parsed_back(
    content: str, reasoning: str, calls: list[tuple[str, dict[str, Any]]], thinking: bool
) -> None:
    mode = "thinking" if thinking else "chat"
    question, answer = [user("q")], assistant(content, reasoning_content=reasoning)
    answer["tool_calls"] = [call(name, json.dumps(arguments)) for name, arguments in calls]
    prompt, whole = encode_messages(question, mode), encode_messages([*question, answer], mode)
    assert whole.startswith(prompt)
    reply = parse_completion(whole.removeprefix(prompt), mode)
    assert reply["content"] == content
    assert reply["reasoning_content"] == (reasoning if thinking else "")
    parsed = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in reply["tool_calls"]]
    assert parsed == calls
    assert [list(a) for _, a in parsed] == [list(a) for _, a in calls]
    again = encode_messages([*question, {**answer, **reply, "reasoning_content": reasoning}], mode)
    assert again == whole


PIECES = ["a", "\n", *PREVIEW.special_tokens, "\n\n<｜DSML｜tool_calls>\n", '<｜DSML｜invoke name="f">\n']


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(PIECES)))
def test_any_text_parses_or_says_where(pieces: list[str]) -> None:
    text = "".join(pieces)
    for mode in ("chat", "thinking"):
        try:
            parse_completion(text, mode)
        except InputError as error:
            assert "completion, character" in str(error)
