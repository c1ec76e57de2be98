"""Convert, kill at a random moment, continue, verify; for a number of minutes.

    python benchmarks/soak.py [FOLDER] [--minutes 20] [--seed N]

Every run is a fork of one process that has torch loaded. It is killed with SIGKILL, SIGTERM or SIGINT after a random
time, and started again until it ends by itself. The shards are small, but written past the page cache in small steps,
as large ones are. After each kill, whatever has a final name must be byte for byte what
an undisturbed run writes; at the end the whole folder must be, and `dsv4 verify` must call it identical. Prints one
line a minute and the totals: conversions, kills, losses. Exits with 1 if anything was lost.
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from dsv4 import cli
from dsv4.convert.synthetic.checkpoint import Geometry, make_checkpoint
from dsv4.convert.write import atomic_file as files
from dsv4.convert.write.atomic_file import PREFIX
from dsv4.convert.write.shards import pipeline

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
EXPECTED_EXIT = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}
COMMANDS = (
    ["--max-shard-size", "500KB", "--max-workers", "1"],
    ["--max-shard-size", "500KB", "--max-workers", "4"],
    ["--to", "bf16", "--max-shard-size", "1MB", "--max-workers", "2"],
    ["--layout", "mp", "--model-parallel", "2", "--max-workers", "2"],
)


@dataclass
class Totals:
    """What happened so far."""

    conversions: int = 0
    kills: int = 0
    survived: int = 0  # signals that came too late
    losses: int = 0
    slowest_stop: float = 0.0  # seconds between SIGINT or SIGTERM and the end

    def __str__(self) -> str:
        return (
            f"{self.conversions} conversions, {self.kills} kills ({self.survived} more came too late), "
            f"{self.losses} losses, slowest stop {self.slowest_stop:.2f} s"
        )


def start(arguments: list[str], words: Path = Path(os.devnull)) -> int:
    """A forked process that runs one command line, with stderr into the file `words`. Returns its id."""
    # Python's own handler would unwind the child through the code below, which removes the folder that all work in.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    if child:
        return child
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(os.open(words, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    sys.argv = ["dsv4", *arguments]
    code: object = 70
    try:
        cli.main()
    except SystemExit as ending:
        code = ending.code
    finally:
        os._exit(code if isinstance(code, int) else 70)


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(PREFIX)
    }


def one_conversion(
    arguments: list[str], output: Path, expected: dict[str, str], seconds: float, totals: Totals
) -> None:
    """Run, kill, check and continue until it is done."""
    words = output.with_name("words")
    while True:
        child = start(arguments, words)
        number = random.choice(SIGNALS)
        time.sleep(random.uniform(0, seconds))
        sent = time.monotonic()
        os.kill(child, number)
        code = wait(child)
        if number != signal.SIGKILL:
            totals.slowest_stop = max(totals.slowest_stop, time.monotonic() - sent)
        found = contents(output) if output.exists() else {}
        problems = [f"{name} is incomplete" for name, digest in found.items() if expected.get(name) != digest]
        if "config.json" in found and found.keys() != expected.keys():
            problems.append("config.json came early")
        if code not in (0, EXPECTED_EXIT[number], -number):  # -number: before dsv4 could install its handler
            problems.append(f"exit {code}")
        if problems:
            totals.losses += 1
            print(f"LOST after {number.name}: {', '.join(problems)}\n{words.read_text()[-3000:]}", flush=True)
        if code == 0:
            totals.survived += 1
            break
        totals.kills += 1
    totals.conversions += 1


def final_check(source: Path, output: Path, expected: dict[str, str], totals: Totals) -> None:
    code = wait(start(["verify", str(source), str(output), "-q"]))
    if code != 0 or contents(output) != expected:
        totals.losses += 1
        print(f"LOST: the finished output differs (verify said {code})", flush=True)


def prepare(source: Path, work: Path) -> list[tuple[list[str], dict[str, str], float]]:
    """Each command with what it writes undisturbed, and how long it takes."""
    prepared = []
    for number, options in enumerate(COMMANDS):
        clean = work / f"clean-{number}"
        began = time.monotonic()
        assert wait(start(["convert", str(source), str(clean), *options])) == 0
        prepared.append((options, contents(clean), time.monotonic() - began))
        shutil.rmtree(clean)
    return prepared


def soak(minutes: float, work: Path) -> Totals:
    source, output = work / "source", work / "output"
    make_checkpoint(source, geometry=Geometry(compress_ratios=(0, 4, 0)))
    before, totals = contents(source), Totals()
    prepared = prepare(source, work)
    began = time.monotonic()
    printed = began
    while time.monotonic() - began < 60 * minutes:
        options, expected, seconds = random.choice(prepared)
        one_conversion(["convert", str(source), str(output), *options], output, expected, seconds * 1.5, totals)
        final_check(source, output, expected, totals)
        shutil.rmtree(output)
        if time.monotonic() - printed >= 60:
            printed = time.monotonic()
            print(f"{(printed - began) / 60:.0f} min: {totals}", flush=True)
    if contents(source) != before:
        totals.losses += 1
        print("LOST: the source was changed", flush=True)
    return totals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("folder", nargs="?", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random.seed(options.seed)
    files.WRITE_BYTES = files.DIRECT_BYTES = pipeline.BLOCK_BYTES = 2**14
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as work:
        totals = soak(options.minutes, Path(work))
    print(f"{options.minutes:g} minutes: {totals}")
    sys.exit(1 if totals.losses else 0)


if __name__ == "__main__":
    main()
