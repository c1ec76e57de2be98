"""The protocol of V4.1: a token in front of system messages, an effort that is a number, and other tags for tool calls.

A system message that is not the first asks for an answer, as a user message does. There is no role developer. Images
have their own token, which text must not contain.
"""

import json
from collections.abc import Mapping
from typing import Any

from dsv4.convert.checkpoint.editions.table import edition_of
from dsv4.model.chat.protocol import DSML, Efforts, Protocol, Signs

EFFORT = "Reasoning Effort: {number} (range 1-100, the higher the value, the more thorough the reasoning)\n\n"
LEVELS = {"low": 50, "high": 75, "max": 100}
DEFAULT = "high"
MOST_DECODINGS = 2  # clients send JSON text, and some encode it twice


def _read_arguments(arguments: object) -> Mapping[str, Any]:
    """An object, or JSON text of one, encoded once or twice. Anything else becomes one parameter named `arguments`."""
    decoded = arguments
    for _ in range(MOST_DECODINGS):
        if not isinstance(decoded, str):
            break
        try:
            decoded = json.loads(decoded)
        except (ValueError, RecursionError):
            break
    return decoded if isinstance(decoded, Mapping) else {"arguments": arguments}


def _is_config(config: Mapping[str, Any]) -> bool:
    """The release's, or the reference engine's, which has no model type."""
    return edition_of(config).name == "V4.1" or ("engram_layer_ids" in config and "model_type" not in config)


PROTOCOL = Protocol(
    edition="v41",
    signs=Signs(
        encoder="encoding/encoding.py",
        literals={"DEFAULT_REASONING_EFFORT": DEFAULT, "REASONING_EFFORT_MAPPINGS": LEVELS},
        recognises=lambda literals: True,  # the file name is specific to this edition
        is_config=_is_config,
    ),
    efforts=Efforts(
        texts={level: EFFORT.format(number=number) for level, number in LEVELS.items()},
        default=DEFAULT,
        api_levels={"minimal": "low", "medium": "high", "xhigh": "high", "ultra": "max"},
        by_number=EFFORT,
    ),
    calls=f"{DSML} calls",
    invoke=f"{DSML} invoke",
    parameter=f"{DSML} parameter",
    roles=("system", "user", "assistant", "tool", "latest_reminder"),
    is_question=lambda index, role: role == "user" or (role == "system" and index > 0),
    read_arguments=_read_arguments,
    system="<｜System｜>",
    image="<｜deepseek_image｜>",
    parts_are_blocks=True,
)
