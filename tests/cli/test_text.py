"""Sizes, times, lists and names as people read them."""

import pytest

from dsv4.machine import parse_size
from dsv4.text import aligned, enough_bytes, human_bytes, human_count, human_seconds, natural_order, printable, some_of


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (159_609_485_896, "159.6 GB"), (1_602_325_824_632, "1.60 TB")],
)
def test_human_bytes(count: int, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize("count", [1, 999, 1000, 1001, 347_412_345, 999_999_999, 12_340_000_001, 1_573_000_000_000])
def test_enough_bytes_are_no_fewer_when_they_are_typed_in(count: int) -> None:
    assert count <= parse_size(enough_bytes(count)) <= count * 1.1


@pytest.mark.parametrize(("seconds", "text"), [(3.21, "3.2 s"), (75, "1:15"), (5025, "1:23:45"), (9.94, "9.9 s")])
def test_human_seconds(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


def test_aligned() -> None:
    assert aligned([["a", "1"], ["bbb", "20"]], right=[1]) == ["a     1", "bbb  20"]


def test_natural_order() -> None:
    found = ["layers.10.a", "layers.9.ffn.experts.10.w1", "layers.9.ffn.experts.9.w3", "layers.9.a", "embed"]
    assert sorted(found, key=natural_order) == [found[4], found[3], found[2], found[1], found[0]]


@pytest.mark.parametrize(
    ("number", "text"),
    [(999, "999"), (1500, "1.5K"), (43_000_000, "43M"), (284_332_000_000, "284B"), (1_573_000_000_000, "1.6T")],
)
def test_human_count(number: int, text: str) -> None:
    assert human_count(number) == text


def test_some_of() -> None:
    assert some_of(["a", "b", "c"], 3) == "a, b, c"
    assert some_of(["a", "b", "c"], 2) == "a, b and 1 more"
    assert some_of([], 2) == ""


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 模型", "plain é 模型"),
        ("\x1b[31mred\a", r"\x1b[31mred\x07"),
        ("a\nb\tc", r"a\nb\tc"),
        ("\u202eevil\u2066", r"\u202eevil\u2066"),
        ("\udc80", r"\udc80"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown and printable(shown) == shown
