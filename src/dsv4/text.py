"""How sizes, times, lists and names are written for people: once for all commands and messages."""

import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any


def human_bytes(count: float) -> str:
    """`159609485896` -> `159.6 GB`. Decimal units, as the hubs and disk makers count."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def enough_bytes(count: int) -> str:
    """`347412345` -> `348.0 MB`, `1234567890` -> `1.3 GB`: for a size that has to suffice, rounded up."""
    digits = len(str(count))
    step = 10 ** max(digits - 3, (digits - 1) // 3 * 3 - 1, 0)
    return human_bytes(-(-count // step) * step)


def human_count(number: int) -> str:
    """`284332000000` -> `284B`, `1573000000000` -> `1.6T`: as model cards round."""
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.{0 if number >= 10 * size else 1}f}{unit}"
    return str(number)


def counted(number: int, noun: str) -> str:
    """`1 tensor`, `2,345 tensors`: a number and what is counted, in the singular or plural."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def human_seconds(seconds: float) -> str:
    """`75` -> `1:15`, `5025` -> `1:23:45`; under ten seconds one decimal: `3.2 s`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def printable(text: str) -> str:
    """`text` with control characters, surrogates and bidirectional marks escaped.

    Names are untrusted input: printed raw they could move the cursor or recolour the terminal.
    """
    if text.isprintable():
        return text  # nearly always, and asked for once per tensor
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii") for c in text)


def aligned(rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> list[str]:
    """Columns padded to equal width, two spaces apart; the columns in `right` are aligned to the right."""
    rows = [list(map(printable, row)) for row in rows]  # before widths are taken: escapes are longer
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    to_right = set(right)
    return [
        "  ".join(
            c.rjust(w) if i in to_right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def wrapped(text: str, width: int, first: str = "", rest: str = "") -> list[str]:
    """Lines of at most `width` characters, broken at spaces only; `first` and `rest` begin the lines."""
    return textwrap.wrap(
        printable(text), width, initial_indent=first, subsequent_indent=rest,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def some_of(names: Sequence[str], most: int) -> str:
    """`a, b, c and 9 more`: the first `most` names, and how many are left out."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


_NUMBERS = re.compile(r"(\d+)")


def natural_order(name: str) -> list[Any]:
    """Sort key that puts expert 2 before expert 10: text and numbers in turns, text first, which may be empty."""
    parts: list[Any] = _NUMBERS.split(name)
    parts[1::2] = map(int, parts[1::2])
    return parts
