"""The page of messages quotes messages that the program has."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
SOURCES = [path for top in ("convert", "model", "quant", "src/dsv4") for path in (ROOT / top).rglob("*.py")]
MESSAGES = re.findall(r"^\| `([^`]+)`", PAGE, re.MULTILINE)


def _text() -> str:
    """All sources, with texts that are split over lines joined."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)
    return re.sub(r'"\n\s*f?"', "", text)


TEXT = _text()


def test_there_are_rows() -> None:
    assert len(MESSAGES) > 20


@pytest.mark.parametrize("message", MESSAGES)
def test_the_program_has_the_message(message: str) -> None:
    """… stands for what a message quotes."""
    parts = [part.strip(" ,()") for part in message.split("…") if part.strip(" ,()")]
    for part in parts:
        assert part in TEXT, part
