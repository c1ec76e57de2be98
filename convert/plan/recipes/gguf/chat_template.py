"""The chat template of a GGUF file, in Jinja: the prompt that the release's own encoder builds.

The releases have no template but an encoder in Python; llama.cpp needs a template. This one has the rules for what a
chat consists of: the roles system, user, assistant and tool, reasoning, tool calls, `tools`, `enable_thinking`, and
`reasoning_effort`, which differs between the preview editions and 0731. Roles that the encoder has beyond these are
refused by name. A test renders it beside the engine's encoder.
"""

import json

from dsv4.convert.checkpoint.editions.prompts import (
    ABSOLUTE_MAXIMUM,
    ASSISTANT,
    BEYOND_MAXIMUM,
    BOS,
    DSML,
    END_THINK,
    EOS,
    THINK,
    TOOLS,
    USER,
)
from dsv4.convert.checkpoint.reader import Checkpoint

ENCODER = "encoding/encoding_dsv4.py"
MAX_ENCODER_BYTES = 10_000_000
LATER = b"REASONING_EFFORT_PROMPTS"  # a name in the encoder of 0731 and later, which the preview's lacks
# `reasoning_effort` -> the text at the start of the prompt; other words, and none, mean no text.
PREVIEW_EFFORTS = {"max": ABSOLUTE_MAXIMUM, "xhigh": ABSOLUTE_MAXIMUM, "ultra": ABSOLUTE_MAXIMUM}
LATER_EFFORTS = {
    "medium": ABSOLUTE_MAXIMUM, "high": ABSOLUTE_MAXIMUM, "xhigh": ABSOLUTE_MAXIMUM,
    "max": BEYOND_MAXIMUM, "ultra": BEYOND_MAXIMUM,
}  # fmt: skip

_TEMPLATE = r"""
{%- set efforts = @efforts -%}
{%- if thinking is not defined -%}
  {%- set thinking = enable_thinking if enable_thinking is defined else true -%}
{%- endif -%}
{%- if add_generation_prompt is not defined -%}{%- set add_generation_prompt = true -%}{%- endif -%}

{%- macro text(content) -%}
  {%- if content is string -%}{{ content }}
  {%- elif content is defined and content is not none -%}
    {%- for part in content -%}
      {%- if part.type in ['text', 'input_text', 'output_text'] -%}{{ text(part.text) }}
      {%- else -%}{{ '[Unsupported ' ~ part.type ~ ']' }}
      {%- endif -%}
      {%- if not loop.last -%}{{ '\n\n' }}{%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}

{%- macro call(function) -%}
  {{ '<@invoke name="' ~ function.name ~ '">\n' }}
  {%- set given = function.arguments if function.arguments is defined and function.arguments is not none else {} -%}
  {%- if given is string -%}{%- set given = {'arguments': given} -%}{%- endif -%}
  {%- for name, value in given.items() -%}
    {{ '<@parameter name="' ~ name ~ '" string="' ~ ('true' if value is string else 'false') ~ '">' }}
    {{- value if value is string else value | tojson }}{{ '</@parameter>' }}
    {%- if not loop.last -%}{{ '\n' }}{%- endif -%}
  {%- endfor -%}
  {{ '\n</@invoke>' }}
{%- endmacro -%}

{%- set ns = namespace(question=-1, drop=thinking and not tools, system=false, ids=[], results=[], next=0) -%}
{%- for message in messages -%}
  {%- if message.role not in ['system', 'user', 'assistant', 'tool'] -%}
    {{ raise_exception('unknown role ' ~ message.role) }}
  {%- endif -%}
  {%- set before = messages[loop.index0 - 1].role if loop.index0 else '' -%}
  {%- if message.role in ['user', 'tool'] and before not in ['user', 'tool'] -%}
    {%- set ns.question = loop.index0 -%}
  {%- endif -%}
  {%- if message.role == 'system' -%}{%- set ns.system = true -%}{%- endif -%}
{%- endfor -%}

{{- @bos -}}
{%- if thinking and messages and reasoning_effort is defined and reasoning_effort in efforts -%}
  {{ efforts[reasoning_effort] }}
{%- endif -%}
{%- macro schemas() -%}
  {{ '\n\n' ~ @tools_before }}
  {%- for tool in tools -%}{{ tool.function | tojson }}{%- if not loop.last -%}{{ '\n' }}{%- endif -%}{%- endfor -%}
  {{ @tools_after }}
{%- endmacro -%}
{%- if tools and not ns.system -%}{{ schemas() }}{%- endif -%}
{%- set ns.system = false -%}

{%- for message in messages -%}
  {%- set index = loop.index0 -%}
  {%- set before = messages[index - 1].role if index else '' -%}
  {%- set after = messages[index + 1].role if not loop.last else 'assistant' -%}
  {%- if message.role == 'system' -%}
    {{ text(message.content) }}
    {%- if tools and not ns.system -%}{{ schemas() }}{%- endif -%}
    {%- set ns.system = true -%}
  {%- elif message.role == 'assistant' -%}
    {%- if thinking and (not ns.drop or index > ns.question) -%}
      {%- set thought = message.reasoning_content -%}
      {%- if thought is not defined or thought is none -%}{%- set thought = message.reasoning -%}{%- endif -%}
      {{ text(thought) }}{{ @end_think }}
    {%- endif -%}
    {{ text(message.content) }}
    {%- if message.tool_calls -%}
      {{ '\n\n<@calls>\n' }}
      {%- set ns.ids = [] -%}
      {%- for one in message.tool_calls -%}
        {{ call(one.function) }}
        {%- if not loop.last -%}{{ '\n' }}{%- endif -%}
        {%- set ns.ids = ns.ids + [one.id if one.id is defined else ''] -%}
      {%- endfor -%}
      {{ '\n</@calls>' }}
    {%- endif -%}
    {{ @eos }}
  {%- else -%}
    {%- if before not in ['user', 'tool'] -%}
      {{ @user }}
      {#- The results of this turn, in the order of the calls; a result of no call counts as that of the first. -#}
      {%- set ns.results = [] -%}
      {%- set ns.next = 0 -%}
      {%- for rank in range([ns.ids | length, 1] | max) -%}
        {%- set turn = namespace(open=true) -%}
        {%- for other in messages[index:] -%}
          {%- if other.role not in ['user', 'tool'] -%}{%- set turn.open = false -%}{%- endif -%}
          {%- if turn.open and other.role == 'tool' -%}
            {%- set found = namespace(rank=0) -%}
            {%- for id in ns.ids -%}
              {%- if id and id == other.tool_call_id -%}{%- set found.rank = loop.index0 -%}{%- endif -%}
            {%- endfor -%}
            {%- if found.rank == rank -%}{%- set ns.results = ns.results + [other] -%}{%- endif -%}
          {%- endif -%}
        {%- endfor -%}
      {%- endfor -%}
    {%- else -%}{{ '\n\n' }}
    {%- endif -%}
    {%- if message.role == 'tool' -%}
      {{ '<tool_result>' }}{{ text(ns.results[ns.next].content) }}{{ '</tool_result>' }}
      {%- set ns.next = ns.next + 1 -%}
    {%- else -%}{{ text(message.content) }}
    {%- endif -%}
    {%- if after == 'assistant' and (not loop.last or add_generation_prompt) -%}
      {{ @assistant }}{{ @think if thinking and (not ns.drop or index >= ns.question) else @end_think }}
    {%- endif -%}
  {%- endif -%}
{%- endfor -%}
"""


def _literal(value: object) -> str:
    """A string, or an object of strings, as Jinja writes it."""
    return json.dumps(value, ensure_ascii=False)


def template_for(efforts: dict[str, str]) -> str:
    """The template with an edition's texts for `reasoning_effort`."""
    tags = {tag: f"{DSML}{tag}" for tag in ("invoke", "parameter")} | {"calls": f"{DSML}tool_calls"}
    before, _, after = TOOLS.partition("{schemas}")
    words = {
        "efforts": efforts, "bos": BOS, "eos": EOS, "user": USER, "assistant": ASSISTANT, "think": THINK,
        "end_think": END_THINK, "tools_before": before.format(**tags), "tools_after": after,
    }  # fmt: skip
    found = _TEMPLATE.strip()
    for name in sorted(words, key=len, reverse=True):
        found = found.replace(f"@{name}", _literal(words[name]))
    for name, tag in tags.items():
        found = found.replace(f"@{name}", tag)
    return found


def chat_template(checkpoint: Checkpoint) -> str:
    """The template of the checkpoint's edition: by the encoder beside the weights, else by the config."""
    size = checkpoint.files.get(ENCODER)
    if size is not None and size <= MAX_ENCODER_BYTES:
        later = LATER in checkpoint.storage.read(ENCODER, 0, size)
    else:
        later = "dspark_block_size" in checkpoint.released
    return template_for(LATER_EFFORTS if later else PREVIEW_EFFORTS)
