"""Progress that can be believed: the rate of the last minute, no estimate from nothing, time that ticks."""

import io
import sys
import threading

import pytest

from dsv4 import output
from dsv4.output import Output
from dsv4.progress import Pace, Scaled
from dsv4.text import human_seconds


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Awaited(io.StringIO):
    """A stream, of a terminal or not, that sets `came` when something with `words` is written to it."""

    def __init__(self, is_terminal: bool, words: str) -> None:
        super().__init__()
        self.is_terminal, self.words, self.came = is_terminal, words, threading.Event()

    def isatty(self) -> bool:
        return self.is_terminal

    def write(self, text: str) -> int:
        if self.words in text:
            self.came.set()
        return super().write(text)


def test_no_estimate_from_nothing() -> None:
    pace = Pace(0)
    assert pace.seconds_left(4.9, 10, 1000) is None  # too early
    assert pace.seconds_left(30, 0, 1000) is None  # nothing was done
    assert pace.seconds_left(10, 100, 1000) == 90


def test_a_burst_and_a_pause_are_forgotten() -> None:
    pace, done = Pace(0), 0
    for second in range(1, 600):
        done += 5000 if second < 10 else 0 if second < 200 else 10  # a burst, a pause, then an even rate
        pace.note(second, done)
    assert pace.rate(599, done) == 10
    assert pace.seconds_left(599, done, done + 100) == 10


def test_scaled_counts_add_up() -> None:
    passed_on: list[int] = []
    progress = Scaled(passed_on.append, 7, 3)
    for count in (1, 0, 2, 3, 1):
        progress(count)
    assert sum(passed_on) == 3 and min(passed_on) >= 0
    Scaled(passed_on.append, 0, 0)(0)


def shown(monkeypatch: pytest.MonkeyPatch, steps: list[tuple[float, int]]) -> list[str]:
    """What a terminal shows of a bar over 1000 bytes that is advanced at these times, one item for each drawing."""
    clock, stream = [0.0], Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(output, "SECONDS_OF_A_LONG_STEP", 3600)
    monkeypatch.setattr(output.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    with Output().progress(1000, "convert") as progress:
        for clock[0], count in steps:
            progress.advance(count)
    return [drawing for drawing in stream.getvalue().split("\r") if "convert" in drawing]


def test_the_time_ticks_while_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = shown(monkeypatch, [(1, 100), *((float(second), 0) for second in range(2, 9))])
    assert [f"00:0{second}" in drawn[second] for second in range(2, 9)] == [True] * 7


@pytest.mark.parametrize(("is_terminal", "words"), [(True, "00:20"), (False, "convert: 5 B of 10 B (50%)")])
@pytest.mark.parametrize("passing", [False, True])
def test_a_bar_ticks_during_a_long_step(
    is_terminal: bool, words: str, passing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An fsync, or a layer over a whole prompt: nobody calls `advance`, and the bar shows that time passes."""
    clock, stream = [0.0], Awaited(is_terminal, words)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(output, "SECONDS_OF_A_LONG_STEP", 0.01)
    monkeypatch.setattr(output.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    with Output().progress(10, "convert", passing=passing) as progress:
        progress.advance(5)
        clock[0] = 20
        assert stream.came.wait(60)


def test_words_have_room_until_the_next_advance(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, stream = [0.0], Awaited(True, "00:20")
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(output, "SECONDS_OF_A_LONG_STEP", 3600)
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    with Output().progress(10, "convert") as progress:
        progress.advance(5)
        progress.clear()
        clock[0] = 20
        before = stream.getvalue()
        for _ in range(3):
            progress.tick()
        assert stream.getvalue() == before
        progress.advance(0)
        progress.tick()
        assert stream.came.is_set()


def test_a_bar_that_cannot_be_drawn_ends_with_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread leaves it to the next `advance` to say that the stream is closed."""
    stream = Awaited(False, "")
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(output, "SECONDS_OF_A_LONG_STEP", 0.001)
    monkeypatch.setattr(output, "SECONDS_BETWEEN_LINES", 0)
    with Output().progress(10, "convert") as progress:
        assert stream.came.wait(60)
        stream.close()
        with pytest.raises(ValueError, match="closed"):
            progress.advance(1)


def test_a_bar_estimates_once_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = shown(monkeypatch, [(1, 100), (10, 400)])
    assert "left" not in drawn[1] and f"50 B/s, {human_seconds(10)} left" in drawn[2]


def test_a_line_says_that_nothing_is_known(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(output, "SECONDS_OF_A_LONG_STEP", 3600)
    monkeypatch.setattr(output.time, "monotonic", lambda: clock[0])
    with Output().progress(10, "convert") as progress:
        clock[0] = 20
        progress.advance(0)
    assert capsys.readouterr().err == "convert: 0 B of 10 B (0%), 0 B/s, time left not known\n"
