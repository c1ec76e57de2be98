"""Prompts and parsed completions against deepseek-recipe, the renderer of DeepSeek's own service.

It differs from the encoders of the checkpoints by design, and the conversations here keep to where both must agree: a
question stands last (the service always announces an answer), V4 has no later system message (the service moves it to
the front) and no empty question (the service leaves it out beside others), and in chat mode with tools V4 has no old
reasoning (the service shows it). A call without arguments has an empty line in the checkpoints' encoders only, which
`as_checkpoint` puts back.
"""

import json
import random
import re
from typing import Any

import deepseek_recipe as recipe
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4.commands.prompting import Asked, choose_style
from dsv4.model import encode_messages, parse_completion
from dsv4.model.chat.messages import as_request

Message = dict[str, Any]

# What the service's levels are called in each edition: the text is the same.
LEVELS = {
    "preview": {"low": "high", "high": "max"},
    "0731": {"low": "low", "high": "high", "max": "max"},
    "v41": {"low": "low", "high": "high", "max": "max"},
}
MODELS = {"preview": "DeepSeek-V4-Pro", "0731": "DeepSeek-V4-Pro", "v41": "DeepSeek-V4.1-Flash"}
CASES = [(edition, level) for edition, levels in LEVELS.items() for level in [None, *levels]]  # None: chat mode

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="｜"), max_size=30)
names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_-]{0,10}", fullmatch=True)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.sampled_from([0.5, -2.25, 1e-3]) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=4,
)
tools = st.lists(
    st.tuples(names, texts, st.dictionaries(texts, json_values)).map(
        lambda tool: dict(zip(("name", "description", "parameters"), tool, strict=True))
    ),
    min_size=1,
    max_size=2,
    unique_by=lambda tool: tool["name"],
)
calls = st.lists(st.tuples(names, st.dictionaries(names, json_values, max_size=3)), min_size=1, max_size=3)


def call(number: int, name: str, arguments: dict[str, Any]) -> Message:
    function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": f"call{number}", "type": "function", "function": function}


@st.composite
def answers(draw: st.DrawFn, with_reasoning: bool) -> Message:
    reasoning = {"reasoning_content": draw(texts)} if with_reasoning else {}
    return {"role": "assistant", "content": draw(texts), **reasoning}


@st.composite
def tool_rounds(draw: st.DrawFn, with_reasoning: bool) -> list[Message]:
    """An answer that calls tools, and their results in any order."""
    asked = [call(i, *drawn) for i, drawn in enumerate(draw(calls))]
    answer = draw(answers(with_reasoning))
    results = [{"role": "tool", "tool_call_id": c["id"], "content": draw(texts)} for c in asked]
    draw(st.randoms(use_true_random=False)).shuffle(results)
    return [{**answer, "tool_calls": asked}, *results]


@st.composite
def conversations(draw: st.DrawFn, edition: str, thinking: bool) -> list[Message]:
    """System messages with tools, questions, reminders, answers and tool rounds; the last message asks."""
    system: Message = {"role": "system", "content": draw(texts)}
    if given_tools := draw(st.none() | tools):
        system["tools"] = [{"type": "function", "function": tool} for tool in given_tools]
    messages = [system] if given_tools or draw(st.booleans()) else []
    with_reasoning = thinking or edition == "v41" or not given_tools
    for _ in range(draw(st.integers(0, 3))):
        messages += draw(questions(edition))
        for _ in range(draw(st.integers(0, 2))):
            messages += draw(tool_rounds(with_reasoning))
        messages.append(draw(answers(with_reasoning)))
    messages += draw(questions(edition))
    return messages + (draw(tool_rounds(with_reasoning)) if draw(st.booleans()) else [])


@st.composite
def questions(draw: st.DrawFn, edition: str) -> list[Message]:
    """One or two user messages, with a reminder in front, and in V4.1 a system message behind."""
    content = texts if edition == "v41" else texts.filter(bool)
    asked: list[Message] = [{"role": "user", "content": draw(content)} for _ in range(draw(st.integers(1, 2)))]
    if draw(st.booleans()):
        asked.insert(0, {"role": "latest_reminder", "content": draw(texts)})
    if edition == "v41" and draw(st.booleans()):
        asked.append({"role": "system", "content": draw(texts)})
    return asked


def recipe_message(message: Message) -> recipe.Message:
    content = message["content"]
    if message["role"] == "system":
        return recipe.SystemMessage(content)
    if message["role"] == "assistant":
        asked = [recipe.ToolCall(c["id"], **c["function"]) for c in message.get("tool_calls", [])]
        return recipe.AssistantMessage(content, message.get("reasoning_content"), asked or None)
    if message["role"] == "tool":
        return recipe.ToolMessage(content, message["tool_call_id"])
    return {"user": recipe.UserMessage, "latest_reminder": recipe.LatestReminderMessage}[message["role"]](content)


def renderer(edition: str) -> Any:
    return recipe.DeepseekV41Encoding() if edition == "v41" else recipe.DeepseekV4Encoding()


def as_checkpoint(prompt: str) -> str:
    """With the empty line of a call without arguments, which V4's service leaves out."""
    return re.sub(r'(<｜DSML｜invoke name="[^"]*">\n)(?=</｜DSML｜invoke>)', r"\1\n", prompt)


@pytest.mark.parametrize(
    ("edition", "level"),
    [pytest.param(*case, marks=() if case[1] in (None, "high") else pytest.mark.slow) for case in CASES],
)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
@pytest.mark.slow
def test_the_service_renders_the_same_prompt(edition: str, level: str | None, data: st.DataObject) -> None:
    messages = data.draw(conversations(edition, level is not None))
    conversation = recipe.Conversation(
        [recipe_message(message) for message in messages],
        thinking_mode=level is not None,
        reasoning_effort=level,
        tools=[recipe.ToolDefinition(**tool["function"]) for tool in messages[0].get("tools", [])],
    )
    expected = as_checkpoint(renderer(edition).render_conversation(conversation).prompt)
    mode = "chat" if level is None else "thinking"
    effort = None if level is None else LEVELS[edition][level]
    assert encode_messages(messages, mode, reasoning_effort=effort, edition=edition) == expected


@pytest.mark.parametrize("number", [1, 2, 50, 99, 100])
def test_an_effort_as_a_number_stands_where_the_service_writes_its_levels(number: int) -> None:
    messages = [{"role": "user", "content": "q"}]
    conversation = recipe.Conversation([recipe.UserMessage("q")], reasoning_effort="high")
    rendered = renderer("v41").render_conversation(conversation).prompt
    expected = rendered.replace("75", str(number))
    assert encode_messages(messages, "thinking", reasoning_effort=number, edition="v41") == expected


# --- requests as the API takes them ---

PARTS = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
ASKED = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
API_EFFORTS = ["none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra"]
QUESTION = {"role": "user", "content": "q"}
BODIES: dict[str, dict[str, Any]] = {
    "parts": {
        "messages": [
            {"role": "system", "content": PARTS},
            {"role": "user", "content": PARTS},
            {"role": "assistant", "content": PARTS, "tool_calls": [ASKED]},
            {"role": "tool", "tool_call_id": "a", "content": PARTS},
        ]
    },
    "tools": {
        "messages": [{"role": "system", "content": "s"}, QUESTION],
        "tools": [
            {"type": "function", "function": {"name": "f", "description": "ü", "parameters": {"type": "object"}}}
        ],
    },
    "text format": {"messages": [QUESTION], "response_format": {"type": "text"}},
    "ignored": {"messages": [{**QUESTION, "name": "Bob"}], "temperature": 0.5, "top_p": 0.9, "stream": False},
    "prefix": {"messages": [QUESTION, {"role": "assistant", "content": "yes", "prefix": True}]},
    "prefix of the reasoning": {
        "messages": [QUESTION, {"role": "assistant", "content": "", "reasoning_content": "so", "prefix": True}]
    },
    "disabled": {"messages": [QUESTION], "thinking": {"type": "disabled"}},
    "disabled with effort": {"messages": [QUESTION], "thinking": {"type": "disabled"}, "reasoning_effort": "max"},
    **{
        f"enabled {effort}": {"messages": [QUESTION], "thinking": {"type": "enabled"}, "reasoning_effort": effort}
        for effort in API_EFFORTS[1:]  # "none" leaves the default, which differs
    },
    **{effort: {"messages": [QUESTION], "reasoning_effort": effort} for effort in API_EFFORTS},
}


@pytest.mark.parametrize("edition", ["0731", "v41"])
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_a_request_gives_the_prompt_of_the_service(edition: str, body: dict[str, Any]) -> None:
    body = {**body, "reasoning_effort": body.get("reasoning_effort", "low")}  # the defaults differ
    converted = recipe.ChatCompletionRequest({"model": MODELS[edition], **body}).convert(recipe.ConversionOptions())
    expected = renderer(edition).render_conversation(converted.conversation).prompt
    request = as_request(body, "request.json")
    style = choose_style(Asked(), request, edition)
    found = encode_messages(request.messages, style.thinking_mode, True, style.reasoning_effort, edition=edition)
    assert found == expected


# --- completions ---


def service_message(edition: str, thinking: bool, completion: str, seed: int) -> Message:
    """What the service makes of a completion that arrives in pieces."""
    body = {
        "model": MODELS[edition],
        "messages": [QUESTION],
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "thinking": {"type": "enabled" if thinking else "disabled"},
    }
    request = recipe.ChatCompletionRequest(body).convert(recipe.ConversionOptions())
    stream = recipe.StreamProcessor(
        recipe.ChatCompletionRequest.chunk_generator(request, "id", "m"), request.parsing_options
    )
    cuts = sorted(random.Random(seed).sample(range(len(completion) + 1), min(4, len(completion) + 1)))
    pieces = [completion[a:b] for a, b in zip([0, *cuts], [*cuts, len(completion)], strict=True)]
    chunks = [
        recipe.InferenceChunk.ready(),
        *map(recipe.InferenceChunk.text, pieces),
        recipe.InferenceChunk.finish(recipe.InferenceFinishReason.Stop),
    ]
    response = recipe.ChatCompletionResponse("id", "m", 0, 0, 0)
    for made in [*(stream.push(chunk) for chunk in chunks), stream.finish()]:
        for part in made:
            response.accumulate(part)
    message: Message = json.loads(response.to_json())["choices"][0]["message"]
    return message


@pytest.mark.parametrize("edition", list(MODELS))
@settings(max_examples=50, deadline=None)
@given(data=st.data(), thinking=st.booleans(), seed=st.integers(0, 1000))
@pytest.mark.fast_cases(1)
def test_the_service_parses_the_same_message(edition: str, data: st.DataObject, thinking: bool, seed: int) -> None:
    answer = data.draw(answers(True).map(lambda message: {k: v.strip() for k, v in message.items()}))
    if data.draw(st.booleans()):
        answer["tool_calls"] = [call(i, *drawn) for i, drawn in enumerate(data.draw(calls))]
    mode = "thinking" if thinking else "chat"
    prompt, whole = (encode_messages(m, mode, edition=edition) for m in ([QUESTION], [QUESTION, answer]))
    completion = whole.removeprefix(prompt)
    found = parse_completion(completion, mode, edition=edition)
    expected = service_message(edition, thinking, completion.removesuffix("<｜end▁of▁sentence｜>"), seed)
    assert (found["content"], found["reasoning_content"]) == (
        expected.get("content") or "",
        expected.get("reasoning_content") or "",
    )
    functions = [c["function"] for c in expected.get("tool_calls") or []]
    assert [c["function"] for c in found["tool_calls"]] == functions
