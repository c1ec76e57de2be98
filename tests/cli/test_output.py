"""The one sink: what each mode prints where, side by side."""

import gc
import io
import json
import sys
from collections.abc import Callable

import pytest

from dsv4 import output
from dsv4.errors import InputError, UsageError
from dsv4.machine import parse_size
from dsv4.output import Output
from dsv4.text import human_seconds

Printed = dict[str, tuple[str, str]]

BUG = InputError("broken: x", "Mend it.")
OBJECT = '{\n  "a": "é"\n}\n'
ERROR = json.dumps({"error": "broken: x", "hint": "Mend it.", "exit_code": 3}, indent=2) + "\n"

# What is called, then (stdout, stderr) in each mode.
TABLE: list[tuple[str, Callable[[Output], None], Printed]] = [
    ("text", lambda out: out.text("data"), {"human": ("data\n", ""), "json": ("", ""), "quiet": ("", "")}),
    ("result", lambda out: out.result({"a": "é"}), {"human": ("", ""), "json": (OBJECT, ""), "quiet": ("", "")}),
    ("say", lambda out: out.say("words"), {"human": ("", "words\n"), "json": ("", ""), "quiet": ("", "")}),
    ("hint", lambda out: out.hint("next"), {"human": ("", "next\n"), "json": ("", ""), "quiet": ("", "")}),
    (
        "warn",
        lambda out: out.warn("careful"),
        {"human": ("", "warning: careful\n"), "json": ("", "warning: careful\n"), "quiet": ("", "")},
    ),
    (
        "error",
        lambda out: out.error(BUG),
        {
            "human": ("", "error: broken: x\n  Mend it.\n"),
            "json": (ERROR, "error: broken: x\n  Mend it.\n"),
            "quiet": ("", "error: broken: x\n  Mend it.\n"),
        },
    ),
    ("detail", lambda out: out.detail("more"), {"human": ("", ""), "json": ("", ""), "quiet": ("", "")}),
]


@pytest.mark.parametrize(("name", "call", "expected"), TABLE, ids=lambda value: value if isinstance(value, str) else "")
def test_modes(
    name: str, call: Callable[[Output], None], expected: Printed, capsys: pytest.CaptureFixture[str]
) -> None:
    for mode in ("human", "json", "quiet"):
        call(output.configure(json_mode=mode == "json", quiet=mode == "quiet"))
        assert tuple(capsys.readouterr()) == expected[mode], (name, mode)


def test_verbose_shows_details(capsys: pytest.CaptureFixture[str]) -> None:
    output.configure(verbose=True).detail("more")
    assert capsys.readouterr().err == "more\n"
    output.configure(verbose=True, quiet=True).detail("more")
    assert capsys.readouterr().err == ""


def test_json_wins_over_quiet() -> None:
    assert output.configure(json_mode=True, quiet=True).mode == "json"
    assert output.current().mode == "json"
    output.configure()


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environment", "coloured"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False), ({"NO_COLOR": ""}, True)],
)
def test_colour_only_where_it_is_wanted(
    environment: dict[str, str], coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(key, raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    Output().warn("careful")
    assert ("\x1b[33m" in stream.getvalue()) == coloured
    assert stream.getvalue().endswith("careful\n")


def test_no_colour_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    Output().error(BUG)
    assert "\x1b" not in capsys.readouterr().err


def test_a_terminal_that_cannot_show_a_character(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    Output().text("2×3 ✓")
    sys.stdout.flush()
    assert raw.getvalue() == b"2\\xd73 \\u2713\n"


def test_an_answer_cannot_draw_on_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = "a\x1b[31mred\x07\u202eevil\n\tb\r"
    for mode in ("human", "quiet"):
        monkeypatch.setattr(sys, "stdout", Terminal())
        Output(mode).data(answer)
        assert sys.stdout.getvalue() == "a\\x1b[31mred\\x07\\u202eevil\n\tb\\r\n"
        monkeypatch.undo()
    Output().data(answer)  # a file gets it as it is
    assert capsys.readouterr().out == answer + "\n"


def test_progress_in_a_file_is_lines_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(output, "SECONDS_OF_A_LONG_STEP", 3600)
    monkeypatch.setattr(output.time, "monotonic", lambda: clock[0])
    with Output().progress(10_000_000, "convert") as progress:
        for _ in range(4):
            clock[0] += 5
            progress.advance(2_500_000)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "convert: 5.0 MB of 10.0 MB (50%), 500.0 kB/s, 10 s left".replace("10 s", human_seconds(10))
    assert all("\r" not in line for line in lines) and len(lines) == 2


@pytest.mark.parametrize("mode", ["json", "quiet"])
def test_no_progress_in_other_modes(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with Output("json" if mode == "json" else "quiet").progress(10, "x") as progress:
        progress.advance(10)
    assert stream.getvalue() == ""


def test_progress_on_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with Output().progress(1000, "convert") as progress:
        progress.advance(1000)
    assert "100%" in stream.getvalue() and "convert" in stream.getvalue()


def test_a_bar_can_vanish(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with Output().progress(1000, "convert") as progress:
        progress.vanish()
    assert "convert" in stream.getvalue() and stream.getvalue().split("\r")[-2].strip() == ""


def opened(stream: Terminal, seconds: float, monkeypatch: pytest.MonkeyPatch, mode: output.Mode = "human") -> str:
    """What a terminal shows while 64 headers are read that take so long each."""
    clock = [0.0]
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    with Output(mode).opening() as headers:
        for number in range(1, 65):
            clock[0] += seconds
            headers(number, 64)
    return stream.getvalue()


def test_opening_shows_a_bar_only_where_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    assert opened(Terminal(), 0.001, monkeypatch) == ""
    shown = opened(Terminal(), 0.1, monkeypatch)
    assert "opening" in shown and "64.0/64.0 [" in shown
    assert shown.split("\r")[-2].strip() == ""  # and it is gone before anything else is printed


@pytest.mark.parametrize("mode", ["json", "quiet", "silent"])
def test_opening_is_silent_in_other_modes(mode: output.Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    assert opened(Terminal(), 1, monkeypatch, mode) == ""


def test_opening_leaves_the_garbage_collector_as_it_was() -> None:
    for begin in (gc.enable, gc.disable):
        begin()
        before = gc.isenabled()
        with pytest.raises(UsageError), Output("quiet").opening():
            assert not gc.isenabled()
            raise UsageError("wrong")
        assert gc.isenabled() == before
    gc.enable()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("512MiB", 512 * 2**20),
        ("1000", 1000),
        ("1.5k", 1500),
        ("2 TB", 2 * 10**12),
        ("1gib", 2**30),
    ],
)
def test_parse_size(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0", "-1", "1XB", "five", "1e400", "nan", "inf", "1.2.3GB", "5GBB", "1 0"])
def test_parse_size_refuses(text: str) -> None:
    with pytest.raises(UsageError, match="not a size"):
        parse_size(text)


@pytest.mark.parametrize(("columns", "most"), [("60", 60), ("200", 80), ("10", 40)])
def test_a_paragraph_ends_where_the_terminal_does(columns: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("COLUMNS", columns)
    Output().paragraph("a word " * 50, "note  ", "      ")
    lengths = [len(line) for line in stream.getvalue().splitlines()]
    assert most - 7 < max(lengths) <= most


def test_a_paragraph_in_a_file_is_the_same_everywhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    Output().paragraph("a word " * 50)
    assert 73 < max(map(len, capsys.readouterr().out.splitlines())) <= 80
