"""The protocol of V4-Flash-0731, V4-Pro-0813 and the text of Vision-Exp: the preview's, with three effort texts.

The levels are shifted by one: the preview's max is high here, and max has its own text.
"""

from collections.abc import Mapping
from dataclasses import replace

from dsv4.model.chat.protocol import Efforts, Signs

from .preview import ABSOLUTE_MAXIMUM, PREVIEW

BEYOND_MAXIMUM = """\
Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.
You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively decompose the \
problem into its most fundamental components, trace every causal chain to its root, and resolve the underlying cause \
rather than any surface symptom.
Do not stop reasoning until you have independently verified the solution from multiple angles and are certain that no \
assumption remains unchecked and no error remains undiscovered.

"""

TEXTS = {"low": "", "high": ABSOLUTE_MAXIMUM, "max": BEYOND_MAXIMUM}
DEFAULT = "low"


def _recognises(literals: Mapping[str, object]) -> bool:
    """Whether an encoder has the three levels, with low as the default."""
    texts = literals.get("REASONING_EFFORT_PROMPTS")
    return (
        literals.get("DEFAULT_REASONING_EFFORT") == DEFAULT and isinstance(texts, dict) and TEXTS.keys() <= set(texts)
    )


RELEASE_0731 = replace(
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
