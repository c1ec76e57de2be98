"""The protocol of V4-Flash-0731, V4-Pro-0813 and the text of Vision-Exp: the preview's, with three effort texts.

The levels are shifted by one: the preview's max is high here, and max has its own text.
"""

from collections.abc import Mapping
from dataclasses import replace

from dsv4.convert.checkpoint.editions.prompts import ABSOLUTE_MAXIMUM
from dsv4.convert.checkpoint.editions.prompts import BEYOND_MAXIMUM as BEYOND_MAXIMUM
from dsv4.model.chat.protocol import Efforts, Signs

from .preview import PROTOCOL as PREVIEW

TEXTS = {"low": "", "high": ABSOLUTE_MAXIMUM, "max": BEYOND_MAXIMUM}
DEFAULT = "low"


def _recognises(literals: Mapping[str, object]) -> bool:
    """Whether an encoder has the three levels, with low as the default."""
    texts = literals.get("REASONING_EFFORT_PROMPTS")
    return (
        literals.get("DEFAULT_REASONING_EFFORT") == DEFAULT and isinstance(texts, dict) and TEXTS.keys() <= set(texts)
    )


PROTOCOL = replace(
    PREVIEW,
    edition="0731",
    signs=Signs(
        encoder=PREVIEW.signs.encoder,
        literals={"DEFAULT_REASONING_EFFORT": DEFAULT, "REASONING_EFFORT_PROMPTS": TEXTS},
        recognises=_recognises,
    ),
    efforts=Efforts(
        texts=TEXTS,
        default=DEFAULT,
        api_levels={"minimal": "low", "medium": "high", "xhigh": "high", "ultra": "max"},
        empty_is_default=True,
    ),
)
