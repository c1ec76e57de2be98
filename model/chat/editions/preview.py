"""The protocol of the preview releases: V4-Flash, V4-Pro, and *-DSpark as first published.

Its one effort text belongs to the level `max`; `high` is plain thinking.
"""

import json
from collections.abc import Mapping
from typing import Any

from dsv4.convert.checkpoint.editions.prompts import ABSOLUTE_MAXIMUM as ABSOLUTE_MAXIMUM
from dsv4.model.chat.protocol import DSML, Efforts, Protocol, Signs


def _read_arguments(arguments: object) -> Mapping[str, Any]:
    """An object, or JSON text of an object. Text that is not JSON becomes one parameter named `arguments`."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return {"arguments": arguments}
    if not isinstance(arguments, Mapping):
        raise ValueError(f"expected tool call arguments to be a JSON object, found {type(arguments).__name__}")
    return arguments


PROTOCOL = Protocol(
    edition="preview",
    signs=Signs(
        encoder="encoding/encoding_dsv4.py",
        literals={"REASONING_EFFORT_MAX": ABSOLUTE_MAXIMUM},
        recognises=lambda literals: "REASONING_EFFORT_MAX" in literals,
    ),
    efforts=Efforts(
        texts={"high": "", "max": ABSOLUTE_MAXIMUM},
        default="high",
        api_levels={"minimal": "high", "low": "high", "medium": "high", "xhigh": "max", "ultra": "max"},
    ),
    calls=f"{DSML}tool_calls",
    invoke=f"{DSML}invoke",
    parameter=f"{DSML}parameter",
    roles=("system", "user", "assistant", "tool", "developer", "latest_reminder"),
    is_question=lambda index, role: role in ("user", "developer"),
    read_arguments=_read_arguments,
)
