"""Everything that dsv4 prints goes through here.

Results go to stdout, messages and progress bars to stderr, so that `dsv4 inspect … > file` and
`dsv4 verify --json | jq` work. The mode is decided once per command: human; JSON (exactly one object on stdout, no
bars); quiet (the answer and errors only); silent (errors only), for all ranks of a shared run but the first. Colour is
used only on a terminal, and not if NO_COLOR is set or TERM is `dumb`.

Names, config values and answers of hubs are untrusted, so each call prints one line in which every character that could
act on a terminal is escaped, newlines included: nothing in a name can begin a line of its own. Callers pass text as it
was found. What has several lines is passed as several lines. Only `data`, the answer itself, keeps its newlines.
"""

import contextlib
import gc
import json
import os
import shutil
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TextIO

from dsv4 import signals
from dsv4.errors import Dsv4Error
from dsv4.progress import SECONDS_BETWEEN_CALLS, Pace, Reached
from dsv4.text import aligned, human_bytes, human_seconds, printable, wrapped

if TYPE_CHECKING:
    from dsv4.commands.distributed import Ranks

Mode = Literal["human", "json", "quiet", "silent"]

WIDTH = 80  # of what is not a terminal, and the most of one
NARROWEST = 40
SECONDS_UNTIL_A_PASSING_BAR = 0.5
SECONDS_OF_A_LONG_STEP = 0.5  # after this time without an advance, a bar draws itself anew
SECONDS_BETWEEN_LINES = 10.0  # progress in a log file: often enough to show that it goes on, rare enough to read


class ClosedPipe(Dsv4Error):
    """The reader of stdout closed it (`dsv4 … | head`). No message is printed; 128 + SIGPIPE, as in a shell."""

    exit_code = 141


class ProgressBar:
    """A bar over `total` bytes on a terminal, a line every few seconds in a file, nothing when switched off.

    Use as a context manager and call `advance(n)`, from one thread at a time. `advance` raises Interrupted once a
    signal has arrived, in every mode. A `passing` bar appears only if the work takes a while, and is wiped out at the
    end: what follows on the terminal is what counts. During a step that takes long, such as an fsync or a layer over a
    whole prompt, a thread of the bar shows the time that passes.
    """

    def __init__(
        self,
        total: int,
        what: str,
        stream: TextIO,
        enabled: bool,
        unit: str = "B",
        passing: bool = False,
        shown: "list[ProgressBar] | None" = None,
    ) -> None:
        self.total, self.what, self.unit, self.done = total, printable(what), unit, 0
        self._stream, self._started = stream, time.monotonic()
        self._printed = self._described = self._started
        self._pace = Pace(self._started)
        self._bar: Any = None
        self._shown = [] if shown is None else shown  # all bars of an Output that have not ended
        self._shown.append(self)
        self._lines = enabled and not stream.isatty()
        if enabled and stream.isatty():
            from tqdm import tqdm

            delay = SECONDS_UNTIL_A_PASSING_BAR if passing else 0
            self._bar = tqdm(
                total=total, desc=self.what, unit=unit, unit_scale=True, file=stream, dynamic_ncols=True,
                leave=not passing, delay=delay, miniters=0,
            )  # fmt: skip
            self._describe(self._started)
        self._drawing = threading.Lock()
        self._advances = self._ticked = 0
        self._makes_room, self._ended = False, threading.Event()
        self._ticker = threading.Thread(target=self._tick_until_the_end, name="dsv4-bar", daemon=True)
        if enabled:
            self._ticker.start()

    def _draw(self, count: int = 0) -> None:
        """Show what is done now, unless that was shown just before."""
        now = time.monotonic()
        self._pace.note(now, self.done)
        if self._bar is not None:
            if now - self._described >= SECONDS_BETWEEN_CALLS:
                self._describe(now)
            self._bar.update(count)  # with 0, too: the time that has passed is drawn anew
        elif self._lines and now - self._printed >= SECONDS_BETWEEN_LINES:
            self._print_line(now)

    def tick(self) -> None:
        """Draw, if nothing was done since the last tick. Called every now and then by the bar's thread."""
        with self._drawing:
            if self._advances == self._ticked and not self._makes_room:
                self._draw()
            self._ticked = self._advances

    def _tick_until_the_end(self) -> None:
        """The thread. What the stream refuses, the next `advance` raises."""
        with contextlib.suppress(OSError, ValueError):
            while not self._ended.wait(SECONDS_OF_A_LONG_STEP):
                self.tick()

    def advance(self, count: int) -> None:
        """`count` more are done. Raises Interrupted if a signal has arrived."""
        signals.token.check()
        with self._drawing:
            self.done += count
            self._advances += 1
            self._makes_room = False
            self._draw(count)

    def reach(self, done: int, total: int) -> None:
        """Set how much is done and how much there is in all: for work that learns the total on the way."""
        self.total = total
        if self._bar is not None:
            self._bar.total = total
        self.advance(done - self.done)
        if self._bar is not None and done == total and self._bar.last_print_n:
            self._bar.refresh()  # what comes next may take a while too: draw the end, if anything was drawn

    def clear(self) -> None:
        """Make room for words: wipe the bar out until the next advance."""
        with self._drawing:
            self._makes_room = True
            if self._bar is not None:
                self._bar.clear()

    def vanish(self) -> None:
        """Wipe the bar out at the end, because there was nothing to do."""
        if self._bar is not None:
            self._bar.leave = False

    def _amount(self, count: float) -> str:
        return human_bytes(count) if self.unit == "B" else f"{count:.0f}{self.unit}"

    def _rate(self, now: float) -> str:
        rate = self._pace.rate(now, self.done)
        return f"{human_bytes(rate)}/s" if self.unit == "B" else f"{rate:.3g}{self.unit}/s"

    def _describe(self, now: float) -> None:
        """Set what stands behind the bar: the time that has passed, the time left once it is known, the rate."""
        self._described = now
        left = self._pace.seconds_left(now, self.done, self.total)
        more = "" if left is None else f", {human_seconds(left)} left"
        self._bar.bar_format = f"{{l_bar}}{{bar}}| {{n_fmt}}/{{total_fmt}} [{{elapsed}}, {self._rate(now)}{more}]"

    def _print_line(self, now: float) -> None:
        self._printed = now
        left = self._pace.seconds_left(now, self.done, self.total)
        share = 100 * self.done // max(self.total, 1)
        line = f"{self.what}: {self._amount(self.done)} of {self._amount(self.total)} ({share}%)"
        more = "time left not known" if left is None else f"{human_seconds(left)} left"
        print(f"{line}, {self._rate(now)}, {more}", file=self._stream, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self in self._shown:
            self._shown.remove(self)
        self._ended.set()
        if self._ticker.is_alive():
            self._ticker.join()
        if self._bar is not None:
            self._bar.close()


def _json_text(value: dict[str, Any], encoding: str | None) -> str:
    """`value` as JSON over several lines. Characters that could act on a terminal, or that `encoding` lacks, are
    written as JSON's own escapes: parsers read the same value.
    """
    only_ascii = (encoding or "utf-8").lower().replace("-", "") != "utf8"
    lines = json.dumps(value, ensure_ascii=only_ascii, indent=2).split("\n")
    return "\n".join(
        line if line.isprintable() else "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in line)
        for line in lines
    )


class Output:
    """Where a command's words and data go. Made once per command by `configure`.

    `speaker` names this process in its error messages, where several run one command.
    """

    def __init__(self, mode: Mode = "human", verbose: bool = False, speaker: str = "") -> None:
        self.mode = mode
        self.verbose = verbose
        self.speaker = speaker
        self._has_result = False
        self._warned: set[str] = set()
        self._bars: list[ProgressBar] = []

    def _write(self, stream: TextIO, text: str, end: str = "\n") -> None:
        """Print `text` as it is. A character that the stream cannot encode is escaped."""
        try:
            print(text, file=stream, flush=True, end=end)
        except BrokenPipeError:
            # Point the descriptor at nothing, so that the interpreter's last flush finds no broken pipe either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            raise ClosedPipe("the reader of the output closed it") from None
        except UnicodeEncodeError:
            encoding = stream.encoding or "ascii"
            print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True, end=end)
        except OSError as error:
            error.filename = "standard output" if stream is sys.stdout else "standard error"
            raise

    def _colour(self, text: str, code: str, stream: TextIO) -> str:
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty()
        return text if plain else f"\x1b[{code}m{text}\x1b[0m"

    def text(self, line: str = "") -> None:
        """Data for stdout, in human mode. JSON mode has `result` instead."""
        if self.mode == "human":
            self._write(sys.stdout, printable(line))

    def lines(self, lines: Iterable[str]) -> None:
        """Several lines of data."""
        for line in lines:
            self.text(line)

    def paragraph(self, text: str, first: str = "", rest: str = "") -> None:
        """Data for stdout, broken at spaces where the terminal ends; `first` and `rest` begin the lines."""
        columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDTH
        self.lines(wrapped(text, max(NARROWEST, min(columns, WIDTH)), first, rest))

    def section(self, title: str, rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> None:
        """A title and, indented, a table of aligned columns; those in `right` are aligned to the right."""
        self.text(title)
        self.lines(f"  {line}" for line in aligned(rows or [["none"]], right))

    def data(self, text: str = "", end: str = "\n") -> None:
        """Data for stdout that is the whole point of the command, such as an answer: -q does not silence it.

        Newlines are kept. On a terminal, other control characters are escaped: what a model writes is untrusted.
        """
        if sys.stdout.isatty():
            text = "".join(c if c in "\n\t" or c.isprintable() else printable(c) for c in text)
        if self.mode in ("human", "quiet"):
            self._write(sys.stdout, text, end)

    def result(self, value: dict[str, Any]) -> None:
        """The one JSON object of a command that was given `--json`; nothing in the other modes.

        Once it is printed, no other follows: an error after it, such as a full disk, is on stderr alone.
        """
        if self.mode == "json" and not self._has_result:
            self._has_result = True
            self._write(sys.stdout, _json_text(value, sys.stdout.encoding))

    def say(self, line: str = "") -> None:
        """Words for stderr: what happens, closing lines."""
        if self.mode == "human":
            self._write(sys.stderr, printable(line))

    def detail(self, line: str) -> None:
        """Words that only `-v` shows."""
        if self.verbose and self.mode in ("human", "json"):
            self._write(sys.stderr, self._colour(printable(line), "2", sys.stderr))

    def hint(self, line: str) -> None:
        """The next command to try, after success."""
        if self.mode == "human":
            self._write(sys.stderr, self._colour(printable(line), "36", sys.stderr))

    def warn(self, line: str) -> None:
        """A warning on stderr, in JSON mode too; the command goes on."""
        if self.mode in ("human", "json"):
            self._write(sys.stderr, self._colour("warning: ", "33", sys.stderr) + printable(line))

    def warn_once(self, line: str) -> None:
        """A warning that is not repeated."""
        if line not in self._warned:
            self._warned.add(line)
            self.warn(line)

    def error(self, error: Dsv4Error) -> None:
        """The message of a failed command, on stderr; with `--json` also as the one object on stdout.

        If one of them is full or closed, that is not reported: the exit code is that of the error.
        """
        text = f"{printable(self.speaker)}: {error.message}" if self.speaker else error.message
        hint = printable(error.hint)
        words = self._colour("error: ", "31", sys.stderr) + text + (f"\n  {hint}" if hint else "")
        with contextlib.suppress(ClosedPipe, OSError):
            self._write(sys.stderr, words)
        with contextlib.suppress(ClosedPipe, OSError):
            self.result({"error": text, "hint": hint, "exit_code": error.exit_code})

    def traceback(self, error: BaseException) -> None:
        """Where an error was raised, on stderr: for bug reports."""
        for line in "".join(traceback.format_exception(error)).splitlines():
            self._write(sys.stderr, printable(line))

    def progress(self, total: int, what: str, unit: str = "B", passing: bool = False) -> ProgressBar:
        """A progress bar on stderr, human mode only."""
        return ProgressBar(total, what, sys.stderr, self.mode == "human", unit, passing, self._bars)

    @property
    def shows_progress(self) -> bool:
        """Whether a progress bar has begun and not ended."""
        return bool(self._bars)

    @contextlib.contextmanager
    def opening(self) -> Iterator[Reached]:
        """A bar over the shards whose headers are read, while a checkpoint is opened and planned.

        V4-Pro has 145,116 tensors in 64 shards: that takes seconds. Python looks for reference cycles whenever many
        objects were made, and looks at all there are: half of the time would go there, and tables of tensors have none.
        """
        collects = gc.isenabled()
        gc.disable()
        try:
            with self.progress(0, "opening", " shards", passing=True) as bar:
                yield bar.reach
        finally:
            if collects:
                gc.enable()


_current = Output()


def configure(
    json_mode: bool = False, quiet: bool = False, verbose: bool = False, ranks: "Ranks | None" = None
) -> Output:
    """Decide the mode for the rest of the process. `--json` wins over `-q`: the object was asked for.

    Of several ranks that run one command only the first prints, and errors name the rank.
    """
    global _current
    mode: Mode = "json" if json_mode else "quiet" if quiet else "human"
    if ranks is None:
        _current = Output(mode, verbose)
    else:
        speaker = f"rank {ranks.index} of {ranks.count} on {socket.gethostname()}"
        _current = Output(mode if ranks.is_first else "silent", verbose and ranks.is_first, speaker)
    return _current


def current() -> Output:
    """The sink of the running command."""
    return _current
