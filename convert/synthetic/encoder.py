"""The text of `encoding/encoding_dsv4.py` in a small checkpoint: its literals identify the edition.

The release has its prompt encoder there. Its literals identify the edition.
"""

FILE = "encoding/encoding_dsv4.py"

PREVIEW = '''"""The release keeps its prompt encoder here. This file has only the literals that tell the edition."""

REASONING_EFFORT_MAX = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, "
    "rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.\\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, considered "
    "alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.\\n\\n"
)
'''
