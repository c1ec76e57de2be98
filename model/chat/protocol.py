"""The constants of the release's message protocol: special tokens and the fixed texts of prompts."""

import json
from typing import Literal, get_args

from dsv4.errors import UsageError, printable

ThinkingMode = Literal["chat", "thinking"]
Effort = Literal["high", "max"]

# The release's three modes: how each is called on the command line, its thinking mode and its effort.
MODES: dict[str, tuple[ThinkingMode, Effort | None]] = {
    "chat": ("chat", None),
    "think": ("thinking", "high"),
    "think-max": ("thinking", "max"),
}

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
LATEST_REMINDER = "<｜latest_reminder｜>"
THINK = "<think>"
END_THINK = "</think>"
DSML = "｜DSML｜"
TASKS = {task: f"<｜{task}｜>" for task in ("action", "query", "authority", "domain", "title", "read_url")}
SPECIAL_TOKENS = (BOS, EOS, USER, ASSISTANT, LATEST_REMINDER, THINK, END_THINK, DSML, *TASKS.values())

EFFORT_MAX = """\
Reasoning Effort: Absolute maximum with no shortcuts permitted.
You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, \
rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.
Explicitly write out your entire deliberation process, documenting every intermediate step, considered alternative, \
and rejected hypothesis to ensure absolutely no assumption is left unchecked.

"""

TOOLS = """\
## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a \
"<｜DSML｜tool_calls>" block like the following:

<｜DSML｜tool_calls>
<｜DSML｜invoke name="$TOOL_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$TOOL_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, arrays, \
objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside \
<think>...</think> BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

{schemas}

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""

RESPONSE_FORMAT = """\
## Response Format:

You MUST strictly adhere to the following schema to reply:
{schema}"""


def to_json(value: object) -> str:
    """JSON as the protocol writes it: no ASCII escapes, `", "` and `": "`."""
    return json.dumps(value, ensure_ascii=False)


def check_modes(thinking_mode: str, reasoning_effort: str | None = None) -> None:
    """Raise UsageError unless the protocol has this thinking mode and this effort."""
    if thinking_mode not in get_args(ThinkingMode):
        raise UsageError(f"unknown thinking mode '{printable(str(thinking_mode))}', expected chat or thinking")
    if reasoning_effort is not None and reasoning_effort not in get_args(Effort):
        raise UsageError(f"unknown reasoning effort '{printable(str(reasoning_effort))}', expected high or max")
