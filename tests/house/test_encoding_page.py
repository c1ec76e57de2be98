"""docs/encoding.md against the protocols: its levels, defaults and texts are those of the program."""

import re
from pathlib import Path

from dsv4.model.chat.editions import PROTOCOLS
from dsv4.model.chat.editions.preview import ABSOLUTE_MAXIMUM
from dsv4.model.chat.editions.release_0731 import BEYOND_MAXIMUM
from dsv4.model.chat.editions.v41 import EFFORT, LEVELS

PAGE = (Path(__file__).parents[2] / "docs" / "encoding.md").read_text(encoding="utf-8")
TEXTS = {
    "none": "",
    "A": ABSOLUTE_MAXIMUM,
    "B": BEYOND_MAXIMUM,
    **{str(number): EFFORT.format(number=number) for number in LEVELS.values()},
}


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_editions_levels_and_defaults() -> None:
    rows = [cells(row) for row in re.findall(r"^\| `(?:preview|0731|v41)` \|.*$", PAGE, re.MULTILINE)]
    assert [row[0].strip("`") for row in rows] == list(PROTOCOLS)
    for (name, _, levels, default), protocol in zip(rows, PROTOCOLS.values(), strict=True):
        efforts = protocol.efforts
        assert re.findall(r"`(\w+)`", levels) == list(efforts.texts), name
        assert ("1 to 100" in levels) == (efforts.by_number is not None)
        assert default == f"`{efforts.default}`"


def test_texts_of_each_level() -> None:
    rows = [cells(row) for row in re.findall(r"^\| `\w+`: the encoder in the checkpoint.*$", PAGE, re.MULTILINE)]
    assert len(rows) == len(PROTOCOLS)
    for row, protocol in zip(rows, PROTOCOLS.values(), strict=True):
        assert row[0].startswith(f"`{protocol.edition}`")
        for level, text in zip(("low", "high", "max"), row[1:4], strict=True):
            assert (text == "refused") == (level not in protocol.efforts.texts)
            assert text == "refused" or TEXTS[text] == protocol.efforts.texts[level]
        assert TEXTS[row[4]] == protocol.efforts.text(None)
