"""The chat template in a GGUF file, rendered by transformers' Jinja, against the prompts of the engine's encoder."""

import itertools
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
from conversations import CONVERSATIONS, TOOLS, call
from exact_values import convert
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from dsv4.convert.plan.recipes.gguf.chat_template import LATER_EFFORTS, PREVIEW_EFFORTS, template_for
from dsv4.convert.synthetic.checkpoint import Geometry, make_checkpoint
from dsv4.model.chat.encoding import encode_messages
from dsv4.model.chat.messages import with_additions

TEMPLATES = {"preview": template_for(PREVIEW_EFFORTS), "0731": template_for(LATER_EFFORTS)}
SMALL = Geometry(compress_ratios=(0, 0), n_routed_experts=2, num_experts_per_tok=1, num_hash_layers=0)


def rendered(edition: str, messages: list[dict[str, Any]], tools: Any = None, **options: Any) -> str:
    found = render_jinja_template(
        [messages], tools=tools, chat_template=TEMPLATES[edition], add_generation_prompt=True, **options
    )
    text: str = found[0][0]
    return text


def assert_same(
    edition: str, messages: list[dict[str, Any]], tools: Any, thinking: bool, effort: str | None = None
) -> None:
    expected = encode_messages(
        with_additions(messages, tools), "thinking" if thinking else "chat", reasoning_effort=effort, edition=edition
    )
    chosen = {} if effort is None else {"reasoning_effort": effort}
    assert rendered(edition, messages, tools, enable_thinking=thinking, **chosen) == expected


@pytest.mark.parametrize("edition", TEMPLATES)
@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
def test_prompts_are_those_of_the_encoder(number: int, edition: str) -> None:
    efforts = {"preview": (None, "high", "max"), "0731": (None, "low", "high", "max")}[edition]
    for thinking, tools, effort in itertools.product((True, False), (None, TOOLS), efforts):
        assert_same(edition, CONVERSATIONS[number], tools, thinking, effort)


TEXT = st.text("ab\n <>{}%'\"\\üß", max_size=6)
CALLS = st.lists(st.sampled_from([call("weather", "a", x="1"), call("time", "b", y=2.5), call("time", "")]), max_size=3)
MESSAGE = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user"]), "content": st.one_of(TEXT, st.none())}),
    st.fixed_dictionaries({"role": st.just("tool"), "tool_call_id": st.sampled_from("abc"), "content": TEXT}),
    st.fixed_dictionaries({"role": st.just("assistant"), "content": st.one_of(TEXT, st.none()),
                           "reasoning_content": st.one_of(TEXT, st.none()), "tool_calls": CALLS}),
)  # fmt: skip


@settings(max_examples=150)
@given(st.lists(MESSAGE, min_size=1, max_size=7), st.booleans(), st.booleans(), st.sampled_from(list(TEMPLATES)))
def test_any_order_of_messages(messages: list[dict[str, Any]], thinking: bool, has_tools: bool, edition: str) -> None:
    assert_same(edition, messages, TOOLS if has_tools else None, thinking)


def test_other_roles_are_refused() -> None:
    with pytest.raises(Exception, match="unknown role developer"):
        rendered("preview", [{"role": "developer", "content": "x"}])


def template_in(folder: Path, output: Path) -> str:
    convert(folder, output, "--to", "gguf")
    found: str = gguf.GGUFReader(min(output.glob("model*.gguf"))).fields["tokenizer.chat_template"].contents()
    return found


def test_the_edition_s_template_is_in_the_file(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", geometry=SMALL)
    shutil.rmtree(source / "encoding", ignore_errors=True)
    assert template_in(source, tmp_path / "none") == TEMPLATES["preview"]
    (source / "encoding").mkdir()
    (source / "encoding" / "encoding_dsv4.py").write_text("REASONING_EFFORT_PROMPTS = {}\n")
    assert template_in(source, tmp_path / "later") == TEMPLATES["0731"]
    (source / "tokenizer_config.json").write_text('{"chat_template": "its own"}')
    assert template_in(source, tmp_path / "own") == "its own"
