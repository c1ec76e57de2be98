"""The description of a message protocol: special tokens, texts, and the rules in which editions differ.

The releases use three protocols that share most rules. A `Protocol` has the rest; the folder `editions/` has one file
for each. Everything here is text: the tokenizer turns special tokens into ids.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from dsv4.convert.checkpoint.editions.prompts import ASSISTANT as ASSISTANT
from dsv4.convert.checkpoint.editions.prompts import BOS as BOS
from dsv4.convert.checkpoint.editions.prompts import DSML as DSML
from dsv4.convert.checkpoint.editions.prompts import END_THINK as END_THINK
from dsv4.convert.checkpoint.editions.prompts import EOS as EOS
from dsv4.convert.checkpoint.editions.prompts import THINK as THINK
from dsv4.convert.checkpoint.editions.prompts import TOOLS
from dsv4.convert.checkpoint.editions.prompts import USER as USER
from dsv4.errors import UsageError

ThinkingMode = Literal["chat", "thinking"]
Effort = str | int

LATEST_REMINDER = "<｜latest_reminder｜>"
TASKS = {task: f"<｜{task}｜>" for task in ("action", "query", "authority", "domain", "title", "read_url")}

RESPONSE_FORMAT = """\
## Response Format:

You MUST strictly adhere to the following schema to reply:
{schema}"""


def to_json(value: object) -> str:
    """JSON as the protocols write it: no ASCII escapes, `", "` and `": "`."""
    return json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True, kw_only=True)
class Efforts:
    """How hard a model can be asked to think: the text at the start of the prompt for each level.

    `by_number` is the text for a whole number from 1 to 100, with `{number}` in it, or None if there are only levels.
    `api_levels` maps further words of DeepSeek's API to levels of this edition.
    """

    texts: Mapping[str, str]
    default: str
    api_levels: Mapping[str, str]
    by_number: str | None = None
    empty_is_default: bool = False

    def _is_number(self, effort: object) -> bool:
        return self.by_number is not None and type(effort) is int and 1 <= effort <= 100

    def resolve(self, effort: Effort | None) -> Effort:
        """The effort to use: the default for None. Raises UsageError unless the edition has this effort."""
        if effort is None or (effort == "" and self.empty_is_default):
            return self.default
        if self._is_number(effort) or (isinstance(effort, str) and effort in self.texts):
            return effort
        levels = ", ".join(self.texts) + (" or a whole number from 1 to 100" if self.by_number else "")
        raise UsageError(f"unknown reasoning effort '{effort}', expected {levels}")

    def from_api(self, effort: Effort) -> Effort:
        """The effort that a request's `reasoning_effort` means: the API has more words than an edition has levels."""
        return self.api_levels.get(effort, effort) if isinstance(effort, str) else effort

    def text(self, effort: Effort | None) -> str:
        """The text at the start of the prompt. Raises UsageError unless the edition has this effort."""
        effort = self.resolve(effort)
        return self.texts[effort] if isinstance(effort, str) else str(self.by_number).format(number=effort)


@dataclass(frozen=True, kw_only=True)
class Signs:
    """How a checkpoint of an edition is recognised.

    `encoder` is the file of the release that builds prompts, `literals` the values that it assigns at its top level.
    `recognises` decides by the literals of a file of that name, `is_config` by config.json, if that suffices.
    """

    encoder: str
    literals: Mapping[str, object]
    recognises: Callable[[Mapping[str, object]], bool]
    is_config: Callable[[Mapping[str, Any]], bool] | None = None


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The message protocol of one edition: where its prompts and completions differ from those of other editions.

    `calls`, `invoke` and `parameter` are the names of the tags around tool calls. `system` stands in front of system
    messages and of the effort text; "" if they have no token. `is_question` says whether a message of a role at an
    index is one that the assistant answers. `read_arguments` turns a tool call's arguments into named parameters and
    raises ValueError for what the edition refuses. `image` is the token that stands for an image: text must not
    contain it; None if the protocol has no images. `parts_are_blocks` says that the parts of a user message are blocks
    of its turn, so that a tool result can be one of them.
    """

    edition: str
    signs: Signs
    efforts: Efforts
    calls: str
    invoke: str
    parameter: str
    roles: tuple[str, ...]
    is_question: Callable[[int, str], bool]
    read_arguments: Callable[[object], Mapping[str, Any]]
    system: str = ""
    image: str | None = None
    parts_are_blocks: bool = False

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """The tokens that neither content nor reasoning of a completion may contain."""
        tokens = (BOS, EOS, self.system, USER, ASSISTANT, LATEST_REMINDER, THINK, END_THINK, DSML, *TASKS.values())
        return tuple(filter(None, tokens))

    def tools_text(self, schemas: str) -> str:
        """The text that presents tools; `schemas` has one JSON object a line."""
        return TOOLS.format(calls=self.calls, invoke=self.invoke, parameter=self.parameter, schemas=schemas)


def check_thinking_mode(thinking_mode: str) -> None:
    """Raise UsageError unless `thinking_mode` is chat or thinking."""
    if thinking_mode not in get_args(ThinkingMode):
        raise UsageError(f"unknown thinking mode '{thinking_mode}', expected chat or thinking")
