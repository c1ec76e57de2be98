"""What the editions 0731 and v41 have for themselves, as expected strings; the shared rules are in test_encoding.py."""

import json
from typing import Any

import pytest

from dsv4.errors import InputError, UsageError
from dsv4.model import encode_messages, parse_completion
from dsv4.model.chat.editions import PROTOCOLS, protocol_of
from dsv4.model.chat.editions.preview import ABSOLUTE_MAXIMUM
from dsv4.model.chat.editions.release_0731 import BEYOND_MAXIMUM
from dsv4.model.chat.messages import Request
from dsv4.model.chat.remarks import notes

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
HELLO = [{"role": "user", "content": "Hello!"}]
SYSTEM = {"role": "system", "content": "s"}
EDITIONS = list(PROTOCOLS)


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(arguments: Any, name: str = "f") -> dict[str, Any]:
    return {"id": "a", "type": "function", "function": {"name": name, "arguments": arguments}}


def prompt(edition: str, *messages: dict[str, Any], mode: str = "thinking", **how: Any) -> str:
    return encode_messages(messages, mode, edition=edition, **how).removeprefix(BOS)


def number_text(number: int) -> str:
    return f"Reasoning Effort: {number} (range 1-100, the higher the value, the more thorough the reasoning)\n\n"


# --- effort ---


@pytest.mark.parametrize(
    ("edition", "effort", "start"),
    [
        ("preview", None, ""),
        ("preview", "high", ""),
        ("preview", "max", ABSOLUTE_MAXIMUM),
        ("0731", None, ""),
        ("0731", "", ""),
        ("0731", "low", ""),
        ("0731", "high", ABSOLUTE_MAXIMUM),
        ("0731", "max", BEYOND_MAXIMUM),
        ("v41", None, "<｜System｜>" + number_text(75)),
        ("v41", "low", "<｜System｜>" + number_text(50)),
        ("v41", "high", "<｜System｜>" + number_text(75)),
        ("v41", "max", "<｜System｜>" + number_text(100)),
        ("v41", 1, "<｜System｜>" + number_text(1)),
    ],
)
def test_the_effort_stands_at_the_start_in_thinking_mode_only(edition: str, effort: Any, start: str) -> None:
    assert prompt(edition, *HELLO, reasoning_effort=effort) == f"{start}<｜User｜>Hello!<｜Assistant｜><think>"
    chat = prompt(edition, *HELLO, mode="chat", reasoning_effort=effort)
    assert chat == "<｜User｜>Hello!<｜Assistant｜></think>"


@pytest.mark.parametrize("mode", ["chat", "thinking"])
@pytest.mark.parametrize(
    ("edition", "effort"),
    [
        *(("preview", effort) for effort in ("low", "", "xhigh", 75, True)),
        *(("0731", effort) for effort in ("minimal", "none", 1, 0, False, ["low"])),
        *(("v41", effort) for effort in ("", "75", "minimal", 0, 101, -1, True, 75.0, ["low"])),
    ],
)
def test_an_effort_that_the_edition_lacks_is_refused_in_both_modes(edition: str, effort: Any, mode: str) -> None:
    with pytest.raises(UsageError, match=r"unknown reasoning effort .* expected (high|low)"):
        encode_messages(HELLO, mode, reasoning_effort=effort, edition=edition)


def test_an_unknown_edition_is_named() -> None:
    for function in (
        lambda: encode_messages(HELLO, "chat", edition="v5"),
        lambda: parse_completion("", "chat", edition="v5"),
    ):
        with pytest.raises(UsageError, match="unknown edition 'v5', expected preview, 0731, v41"):
            function()


def test_0731_is_the_preview_but_for_the_effort() -> None:
    messages = [SYSTEM, user("a"), assistant("b", reasoning_content="r", tool_calls=[call({})]), user("c")]
    for mode in ("chat", "thinking"):
        assert prompt("0731", *messages, mode=mode) == prompt("preview", *messages, mode=mode)


# --- v41: the system token ---


def test_v41_system_messages_have_a_token() -> None:
    assert prompt("v41", SYSTEM, user("a"), mode="chat") == "<｜System｜>s<｜User｜>a<｜Assistant｜></think>"
    assert prompt("v41", SYSTEM, user("a")) == f"<｜System｜>{number_text(75)}s<｜User｜>a<｜Assistant｜><think>"
    assert encode_messages([SYSTEM], "chat", edition="v41") == f"{BOS}<｜System｜>s"


def test_v41_a_later_system_message_asks_for_an_answer() -> None:
    messages = [user("a"), assistant("b", reasoning_content="r"), SYSTEM]
    start = f"<｜System｜>{number_text(75)}<｜User｜>a<｜Assistant｜></think>b{EOS}"
    assert prompt("v41", *messages) == f"{start}<｜System｜>s<｜Assistant｜><think>"
    answered = prompt("v41", *messages, assistant("c", reasoning_content="q"))
    assert answered == f"{start}<｜System｜>s<｜Assistant｜><think>q</think>c{EOS}"
    assert prompt("v41", *messages, user("d")) == f"{start}<｜System｜>s<｜User｜>d<｜Assistant｜><think>"
    kept = prompt("v41", user("a"), assistant("b", reasoning_content="r"), SYSTEM, drop_thinking=False)
    assert "<think>r</think>b" in kept


def test_v41_the_first_system_message_is_none_to_answer() -> None:
    """It does not count as a question either: the answer behind it keeps its reasoning, as the first of all."""
    assert prompt("v41", SYSTEM, assistant("b", reasoning_content="r")).endswith(f"sr</think>b{EOS}")


def test_v41_after_context_nothing_starts_again() -> None:
    context = [SYSTEM, user("a"), assistant("b")]
    assert prompt("v41", user("c"), context=context, reasoning_effort=9) == "<｜User｜>c<｜Assistant｜><think>"
    late = prompt("v41", SYSTEM, context=context, mode="chat")
    assert late == "<｜System｜>s<｜Assistant｜></think>"


def test_v41_has_no_developer() -> None:
    developer = {"role": "developer", "content": "x"}
    with pytest.raises(InputError, match="unknown role 'developer'"):
        prompt("v41", developer, user("q"), mode="chat")
    assert prompt("v41", developer, user("q")) == prompt("v41", user("q"))


# --- v41: tool calls ---


def test_v41_tags() -> None:
    messages = [user("q"), assistant("", tool_calls=[call({"x": "y", "n": [1, None]}), call("{}", "g")])]
    assert prompt("v41", *messages, mode="chat").partition("</think>")[2] == (
        "\n\n<｜DSML｜ calls>\n"
        '<｜DSML｜ invoke name="f">\n'
        '<｜DSML｜ parameter name="x" string="true">y</｜DSML｜ parameter>\n'
        '<｜DSML｜ parameter name="n" string="false">[1, null]</｜DSML｜ parameter>\n'
        "</｜DSML｜ invoke>\n"
        '<｜DSML｜ invoke name="g">\n'
        "\n"
        "</｜DSML｜ invoke>\n"
        f"</｜DSML｜ calls>{EOS}"
    )


def test_v41_tools_text_has_the_same_words() -> None:
    text, old = protocol_of("v41").tools_text("S"), protocol_of("preview").tools_text("S")
    assert text != old
    for new, before in (("｜ calls", "｜tool_calls"), ("｜ invoke", "｜invoke"), ("｜ parameter", "｜parameter")):
        text = text.replace(new, before)
    assert text == old


@pytest.mark.parametrize(
    ("arguments", "parameters"),
    [
        ({"x": "y"}, {"x": "y"}),
        ('{"x": "y"}', {"x": "y"}),
        (json.dumps('{"x": "y"}'), {"x": "y"}),
        (json.dumps(json.dumps('{"x": "y"}')), {"arguments": json.dumps(json.dumps('{"x": "y"}'))}),
        ("not json", {"arguments": "not json"}),
        ("", {"arguments": ""}),
        ("[1]", {"arguments": "[1]"}),
        ("null", {"arguments": "null"}),
        ([1], {"arguments": [1]}),
        (7, {"arguments": 7}),
        ("[" * 100_000, {"arguments": "[" * 100_000}),
    ],
)
def test_v41_arguments(arguments: Any, parameters: dict[str, Any]) -> None:
    found, expected = (
        prompt("v41", user("q"), assistant("", tool_calls=[call(given)])) for given in (arguments, parameters)
    )
    assert found == expected


@pytest.mark.parametrize("edition", EDITIONS)
def test_a_call_without_arguments(edition: str) -> None:
    none = {"id": "a", "type": "function", "function": {"name": "f"}}
    prompts = [prompt(edition, user("q"), assistant("", tool_calls=[asked])) for asked in (call({}), call(None), none)]
    assert prompts[0] == prompts[1] == prompts[2]


# --- v41: images ---

IMAGE = "<｜deepseek_image｜>"


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (user(f"a {IMAGE}"), "stands for an image"),
        (user([{"type": "text", "text": IMAGE}]), "stands for an image"),
        (assistant("a", reasoning_content=IMAGE), "stands for an image"),
        (assistant("a", reasoning=IMAGE), "stands for an image"),
        ({"role": "tool", "tool_call_id": "a", "content": IMAGE}, "stands for an image"),
        ({"role": "system", "content": IMAGE}, "stands for an image"),
        (user([{"type": "image_url", "image_url": {"url": "data:"}}]), "images cannot be encoded"),
        ({"role": "tool", "tool_call_id": "a", "content": [{"type": "image"}]}, "images cannot be encoded"),
    ],
)
def test_v41_refuses_images(message: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=rf"message 1 \({message['role']}\): .*{problem}"):
        prompt("v41", user("q"), message, mode="chat")


def test_v4_shows_images_as_unsupported() -> None:
    for edition in ("preview", "0731"):
        shown = prompt(edition, user([{"type": "image_url"}, {"type": "text", "text": IMAGE}]), mode="chat")
        assert shown == f"<｜User｜>[Unsupported image_url]\n\n{IMAGE}<｜Assistant｜></think>"


# --- tool results as parts of a user message ---


def result_part(call_id: str, content: Any, name: str = "tool_use_id") -> dict[str, Any]:
    return {"type": "tool_result", name: call_id, "content": content}


@pytest.mark.parametrize("name", ["tool_use_id", "tool_call_id"])
@pytest.mark.parametrize("content", ["r", [{"type": "text", "text": "r"}, {"type": "text", "text": "s"}], None])
def test_v41_a_tool_result_in_a_user_message_is_a_tool_message(name: str, content: Any) -> None:
    """Parts are blocks of the turn: sorted by the calls, as messages of the role tool are. Text keeps its place."""
    asked = user("q"), assistant("", tool_calls=[call("{}") | {"id": "a"}, call("{}") | {"id": "b"}])
    text = {"type": "text", "text": "and?"}
    parts = user([result_part("b", "second", name), text, result_part("a", content, name)])
    messages = [
        {"role": "tool", "tool_call_id": "b", "content": "second"}, user("and?"),
        {"role": "tool", "tool_call_id": "a", "content": content},
    ]  # fmt: skip
    shown = prompt("v41", *asked, parts, mode="chat")
    assert shown == prompt("v41", *asked, *messages, mode="chat")
    assert shown.endswith("</tool_result>\n\nand?\n\n<tool_result>second</tool_result><｜Assistant｜></think>")


def test_v41_finds_images_in_tool_results() -> None:
    for content in ([{"type": "image"}], IMAGE, [{"type": "text", "text": IMAGE}]):
        with pytest.raises(InputError, match="image"):
            prompt("v41", user([result_part("a", content)]))


@pytest.mark.parametrize(
    ("edition", "role", "kind", "place"),
    [
        *((edition, "user", "tool_result", 'role "tool"') for edition in ("preview", "0731")),
        *((edition, "assistant", "tool_result", 'role "tool"') for edition in EDITIONS),
        *((edition, "assistant", "tool_use", '"tool_calls"') for edition in EDITIONS),
        *((edition, "user", "tool_use", '"tool_calls"') for edition in EDITIONS),
        ("preview", "developer", "tool_result", 'role "tool"'),
    ],
)
def test_a_part_that_has_its_place_elsewhere_is_refused(edition: str, role: str, kind: str, place: str) -> None:
    message = {"role": role, "content": [{"type": "text", "text": "t"}, {"type": kind, "id": "a", "content": "r"}]}
    with pytest.raises(InputError, match=rf"message 1 \({role}\): a content part of type {kind} has no") as caught:
        prompt(edition, user("q"), message)
    assert place in caught.value.hint


@pytest.mark.parametrize("edition", EDITIONS)
def test_a_tool_message_may_hold_any_part(edition: str) -> None:
    message = {"role": "tool", "content": [result_part("a", "r"), {"type": "tool_use"}]}
    shown = prompt(edition, message, mode="chat")
    assert "<tool_result>[Unsupported tool_result]\n\n[Unsupported tool_use]</tool_result>" in shown


@pytest.mark.parametrize("kind", ["input_text", "output_text"])
@pytest.mark.parametrize(("edition", "role"), [(e, role) for e in EDITIONS for role in PROTOCOLS[e].roles])
def test_text_of_the_responses_api_is_text(edition: str, role: str, kind: str) -> None:
    """Its parts have other names for the same; what else such a part has, as annotations, is not text."""

    def parts(kind: str, **more: Any) -> list[dict[str, Any]]:
        message = {"role": role, "content": [{"type": kind, "text": text, **more} for text in ("one", "two")]}
        return [user("q"), message]

    shown = prompt(edition, *parts(kind, annotations=[]), mode="chat")
    assert shown == prompt(edition, *parts("text"), mode="chat") and "one\n\ntwo" in shown
    assert notes(Request(parts(kind))) == notes(Request(parts("text"))) == []


@pytest.mark.parametrize("edition", EDITIONS)
def test_text_of_the_responses_api_inside_tool_results_and_images_beside_it(edition: str) -> None:
    read = {"type": "input_text", "text": "r"}, {"type": "refusal", "refusal": "no"}
    shown = prompt(edition, {"role": "tool", "content": list(read)}, mode="chat")
    assert "<tool_result>r\n\n[Unsupported refusal]</tool_result>" in shown
    if edition == "v41":
        for parts in ([read[0], {"type": "input_image"}], [{"type": "input_text", "text": IMAGE}]):
            with pytest.raises(InputError, match="image"):
                prompt(edition, user(parts))
        assert prompt(edition, user([result_part("a", [read[0]])])) == prompt(edition, user([result_part("a", "r")]))


# --- fields that the APIs know ---


@pytest.mark.parametrize(("edition", "role"), [(name, role) for name in EDITIONS for role in PROTOCOLS[name].roles])
def test_content_parts_in_every_role(edition: str, role: str) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    as_parts, as_text = (
        prompt(edition, user("q"), {"role": role, "content": content}, mode="chat") for content in (parts, "one\n\ntwo")
    )
    assert as_parts == as_text


@pytest.mark.parametrize("edition", EDITIONS)
def test_reasoning_is_another_name(edition: str) -> None:
    expected = prompt(edition, user("q"), assistant("a", reasoning_content="r"))
    assert prompt(edition, user("q"), assistant("a", reasoning="r")) == expected
    assert prompt(edition, user("q"), assistant("a", reasoning_content=None, reasoning="r")) == expected
    assert prompt(edition, user("q"), assistant("a", reasoning_content="r", reasoning="other")) == expected
    with pytest.raises(InputError, match="expected reasoning to be text"):
        prompt(edition, user("q"), assistant("a", reasoning={"effort": "high"}))


@pytest.mark.parametrize("edition", EDITIONS)
def test_a_prefix_is_continued(edition: str) -> None:
    def end(**answer: Any) -> str:
        return prompt(edition, user("q"), {"role": "assistant", "prefix": True, **answer}).rpartition("<｜User｜>")[2]

    assert end(content="a", reasoning_content="r") == "q<｜Assistant｜><think>r</think>a"
    assert end(content="a") == "q<｜Assistant｜><think></think>a"
    assert end(content="", reasoning_content="r") == "q<｜Assistant｜><think>r"
    earlier = [user("q"), assistant("a", prefix=True), user("q")]
    assert f"a{EOS}" in prompt(edition, *earlier), "only what stands last can be continued"


# --- completions ---

CALLS = (
    "\n\n<｜DSML｜ calls>\n"
    '<｜DSML｜ invoke name="f">\n'
    '<｜DSML｜ parameter name="x" string="true">a "b"</｜DSML｜ parameter>\n'
    '<｜DSML｜ parameter name="n" string="false">[1,  2]</｜DSML｜ parameter>\n'
    "</｜DSML｜ invoke>\n"
    '<｜DSML｜ invoke name="g">\n</｜DSML｜ invoke>\n'
    "</｜DSML｜ calls>"
)


def test_v41_completions() -> None:
    message = parse_completion(f"r</think>c{CALLS}{EOS}", "thinking", edition="v41")
    assert (message["reasoning_content"], message["content"]) == ("r", "c")
    functions = [asked["function"] for asked in message["tool_calls"]]
    assert functions == [
        {"name": "f", "arguments": '{"x": "a \\"b\\"", "n": [1,  2]}'},
        {"name": "g", "arguments": "{}"},
    ]


def test_the_tags_of_another_edition_are_no_tool_call() -> None:
    old = (
        CALLS.replace("｜ calls", "｜tool_calls")
        .replace("｜ invoke", "｜invoke")
        .replace("｜ parameter", "｜parameter")
    )
    for edition, text in (("v41", old), ("preview", CALLS), ("0731", CALLS)):
        with pytest.raises(InputError, match="｜DSML｜ inside the content"):
            parse_completion(f"c{text}{EOS}", "chat", edition=edition)
    assert len(parse_completion(f"c{old}{EOS}", "chat", edition="0731")["tool_calls"]) == 2


@pytest.mark.parametrize("edition", EDITIONS)
def test_special_tokens_inside_content_are_refused(edition: str) -> None:
    tokens = [token for token in protocol_of(edition).special_tokens if token != EOS]
    assert ("<｜System｜>" in tokens) == (edition == "v41")
    for token in tokens:
        with pytest.raises(InputError, match="inside the content"):
            parse_completion(f"a{token}b{EOS}", "chat", edition=edition)


@pytest.mark.parametrize("edition", EDITIONS)
@pytest.mark.parametrize(
    "value",
    ["True", "None", "bare words", "1 2", "", "{'a': 1}", '"open', "[1,]", "NaN", "-Infinity", "1.", "[" * 100_000],
    ids=range(12),
)
def test_a_value_that_is_no_json_is_named(edition: str, value: str) -> None:
    """Also what Python's json would take: the arguments are for any JSON reader."""
    p = protocol_of(edition)
    text = (
        f'\n\n<{p.calls}>\n<{p.invoke} name="f">\n<{p.parameter} name="days" string="false">{value}</{p.parameter}>\n'
        f"</{p.invoke}>\n</{p.calls}>{EOS}"
    )
    with pytest.raises(InputError, match=r"parameter 'days' .*is not JSON") as caught:
        parse_completion(text, "chat", edition=edition)
    assert value[:60] in str(caught.value)


@pytest.mark.parametrize("value", ["true", " 1 ", "[1,  2]", '{"a": {}}', '"text"', "null", "-1.5e3"])
def test_json_values_stay_as_written(value: str) -> None:
    text = CALLS.replace("[1,  2]", value)
    message = parse_completion(f"c{text}{EOS}", "chat", edition="v41")
    arguments = message["tool_calls"][0]["function"]["arguments"]
    assert arguments == f'{{"x": "a \\"b\\"", "n": {value}}}'
    assert json.loads(arguments)["n"] == json.loads(value)
