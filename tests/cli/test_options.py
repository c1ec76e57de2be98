"""How a command declares its options: the fields of a dataclass."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from dsv4.errors import UsageError
from dsv4.options import Json, Token, as_folder, as_text, as_typed, command, named


@dataclass(frozen=True, kw_only=True)
class Example:
    """One of each: an argument, an optional one, a value, a flag, a list, a shared option."""

    source: Annotated[str, typer.Argument(parser=named, metavar="SOURCE", help="Where from.")]
    target: Annotated[Path | None, typer.Argument(parser=as_folder, metavar="TARGET", help="Where to.")] = None
    count: Annotated[int, typer.Option("--count", metavar="N", min=1, help="How often.")] = 3
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only look.")] = False
    stop: Annotated[list[str] | None, typer.Option("--stop", metavar="TEXT", help="Where to stop.")] = None
    json: Json = False

    def __post_init__(self) -> None:
        if self.dry_run and self.stop:
            raise UsageError("--dry-run has nothing to stop")


@dataclass(frozen=True, kw_only=True)
class Secret:
    """A command with an access token."""

    source: Annotated[str, typer.Argument(help="Where from.")]
    token: Token = None


CALLS: list[Example] = []


@command
def example(options: Example) -> None:
    """Do nothing, and remember it."""
    CALLS.append(options)


def invoke(*arguments: str) -> object:
    app = typer.Typer(rich_markup_mode=None)
    app.command()(example)
    return CliRunner().invoke(app, list(arguments))


def test_fields_are_filled() -> None:
    CALLS.clear()
    invoke("a")
    invoke("a", "b", "--count", "5", "--dry-run", "--json")
    invoke("--stop", "x", "a", "--stop", "y")
    assert CALLS == [
        Example(source="a"),
        Example(source="a", target=Path("b"), count=5, dry_run=True, json=True),
        Example(source="a", stop=["x", "y"]),
    ]


@pytest.mark.parametrize("arguments", [(), ("a", "--count", "0"), ("a", "--count"), ("a", "--other"), ("",)])
def test_wrong_values_do_not_arrive(arguments: tuple[str, ...]) -> None:
    CALLS.clear()
    assert invoke(*arguments).exit_code == 2
    assert not CALLS


def test_options_as_they_were_typed() -> None:
    for typed in ("x a", "x a b --count 5 --dry-run --json", "x 'a b' --stop 'x y' --stop z"):
        CALLS.clear()
        invoke(*shlex.split(typed)[1:])
        assert as_typed("x", CALLS[0]) == typed


def test_the_token_stays_out_of_reports() -> None:
    assert as_typed("x", Secret(source="a", token="hf_secret")) == "x a"


def test_contradictions_are_found_before_the_work() -> None:
    CALLS.clear()
    assert isinstance(invoke("a", "--dry-run", "--stop", "x").exception, UsageError)
    assert not CALLS


def test_help_has_the_fields_in_order() -> None:
    text = invoke("--help").output
    assert "Do nothing, and remember it." in text
    places = [text.index(word) for word in ("Where from.", "Where to.", "--count", "--dry-run", "--stop", "--json")]
    assert places == sorted(places) and "default: 3" in text


def test_text_is_utf_8_in_every_locale() -> None:
    """In the C locale, Python passes the bytes of a prompt as surrogates."""
    assert as_text("ü".encode().decode("ascii", "surrogateescape")) == as_text("ü") == "ü"
    assert as_text(b"\xff".decode("ascii", "surrogateescape")) == "\udcff"
