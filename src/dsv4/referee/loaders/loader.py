"""`dsv4 doctor --python`: the engine's own loader over a folder or a sample of it, and the verdict on what it holds.

The loader decides about everything that it executes: where it holds every value, a rule that says otherwise becomes a
note. Side files, splits over ranks and damaged tensors stay with the rules.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsv4 import signals
from dsv4.convert.checkpoint.config import weight_block
from dsv4.convert.checkpoint.names import pattern_of
from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.checkpoint.weights import Weight, find_weights
from dsv4.convert.doctor.context import FAILURES, Check
from dsv4.convert.doctor.diagnosis import Diagnosis
from dsv4.convert.plan.engines import ENGINES, Loader
from dsv4.errors import MachineError, UsageError
from dsv4.machine import free_bytes, usable_memory
from dsv4.output import Output
from dsv4.text import human_bytes

from .process import Answer, check_is_about_the_folder, interpreter, parse, run
from .sample import Cut, cut_of, sample_bytes, write_sample
from .values import Compared, compare_all

WHOLE_BYTES = 2 * 10**9  # a checkpoint up to this size is loaded whole
SECONDS = 3600.0
GOOD = ("equal", "rounded")
EXECUTED = (
    "architecture", "experts", "expert_dtype", "expert scales", "wo_a", "n-gram tables", "quantization_config",
    "block edges", "form", "quantization",
)  # fmt: skip


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for: the interpreter, everything or a sample, and the longest time."""

    python: str
    everything: bool
    seconds: float


@dataclass(frozen=True)
class Loaded:
    """What an engine's loader made of a folder. cut: of which sample, None for the whole folder."""

    python: str
    loader: Loader
    answer: Answer
    cut: Cut | None
    compared: tuple[Compared, ...]

    @property
    def engine(self) -> str:
        """Name and version."""
        return f"{self.loader.title} {self.answer.version}"

    @property
    def right(self) -> bool:
        """Whether it loaded, and holds every value that it has a parameter for."""
        good = (*GOOD, "left out")
        return self.answer.raised is None and all(one.outcome in good for one in self.compared)

    def count(self, *outcomes: str) -> int:
        """Weights with one of these outcomes."""
        return sum(one.outcome in outcomes for one in self.compared)

    def to_json(self) -> dict[str, Any]:
        """For `--json`: names of all weights but the equal ones."""
        others = [vars(one) for one in self.compared if one.outcome != "equal"]
        raised = self.answer.raised
        return {
            "python": self.python,
            "engine": self.loader.title,
            "version": self.answer.version,
            "tried_with": list(self.loader.tried),
            "sample": None if self.cut is None else vars(self.cut),
            "choices": self.answer.choices,
            "raised": None if raised is None else vars(raised),
            "right": self.right,
            "equal": self.count("equal"),
            "weights": others,
        }


def _grouped(compared: tuple[Compared, ...]) -> Iterator[tuple[str, str]]:
    """(outcome, line) for all weights whose names differ in numbers only."""
    groups: dict[tuple[str, str], list[Compared]] = {}
    for one in compared:
        groups.setdefault((one.outcome, pattern_of(one.name)), []).append(one)
    for (outcome, _), ones in groups.items():
        more = f" (and {len(ones) - 1} more like it)" if len(ones) > 1 else ""
        yield outcome, f"{ones[0].name}{more}: {ones[0].text}"


def _summary(loaded: Loaded) -> str:
    chosen = ", ".join(f"{what} {name}" for what, name in loaded.answer.choices.items())
    part = "all of it" if loaded.cut is None else f"a sample, {loaded.cut}"
    return f"{loaded.engine} in {loaded.python}; {part}; {chosen or 'nothing chosen'}"


def checks(loaded: Loaded) -> Iterator[Check]:
    """The lines of `dsv4 doctor` about the loader."""
    version = loaded.answer.version.split("+")[0]
    yield Check("loader", "note", _summary(loaded))
    if version not in loaded.loader.tried:
        tried = ", ".join(loaded.loader.tried)
        yield Check("loader", "note", f"dsv4's script for it was tried with {loaded.loader.title} {tried}")
    raised = loaded.answer.raised
    if raised is not None:
        where = f" ({raised.where})" if raised.where else ""
        yield Check("loader", "refuses", f"{raised.stage}: {raised.type}: {raised.message}{where}")
        return
    for outcome, text in _grouped(loaded.compared):
        if outcome == "rounded":
            yield Check("values", "note", text)
        elif outcome not in (*GOOD, "left out"):
            yield Check("values", "wrong", text)
    if (left_out := loaded.count("left out")) > 0:
        yield Check("values", "note", f"{left_out} weights of draft stages are not part of the main model")
    if loaded.right:
        yield Check("values", "ok", f"{loaded.count(*GOOD)} weights read back, every value equal")


def _overruled(check: Check, diagnosis: Diagnosis) -> Check:
    """A rule that the loader has just refuted, as a note."""
    if check.rule not in EXECUTED or check.status not in (*FAILURES, "unknown"):
        return check
    rules = f"rules for {diagnosis.evidence}" if diagnosis.evidence else "rules"
    return Check(check.rule, "note", f"the {rules} say: {check.text}; the loader holds every value")


def combined(diagnosis: Diagnosis, loaded: Loaded) -> Diagnosis:
    """The diagnosis with what the loader did."""
    rules = diagnosis.checks
    if loaded.right:
        rules = tuple(_overruled(check, diagnosis) for check in rules)
    return replace(diagnosis, checks=(*rules, *checks(loaded)))


def _memory(weights: dict[str, Weight], decodes: bool) -> int:
    """Bytes that an engine holds: the tensors as stored, or every element as BF16."""
    total = 0
    for weight in weights.values():
        elements = 1
        for size in weight.logical_shape:
            elements *= size
        scale = weight.scale.nbytes if weight.scale else 0
        total += 2 * elements if decodes else weight.info.nbytes + scale
    return total


def _check_memory(checkpoint: Checkpoint, decodes: bool) -> None:
    needed, there = _memory(find_weights(checkpoint.tensors, checkpoint.config), decodes), usable_memory()
    if needed > there:
        text = f"the engine would hold {human_bytes(needed)}, {human_bytes(there)} of memory are free"
        raise MachineError(text, "Leave out --all: a sample has every kind of tensor.")


def _request(engine: str, folder: str, checkpoint: Checkpoint) -> dict[str, Any]:
    weights = find_weights(checkpoint.tensors, checkpoint.config)
    return {
        "engine": engine,
        "folder": str(Path(folder).absolute()),
        "shapes": {name: weight.logical_shape for name, weight in weights.items()},
        "block": weight_block(checkpoint.config) or (128, 128),
    }


def _ask(engine: str, loader: Loader, wanted: Wanted, checkpoint: Checkpoint, place: Path, out: Output) -> Answer:
    """Run the engine's loader over a checkpoint's folder."""
    python = interpreter(wanted.python)
    out.say(f"the loader of {loader.title} runs in {wanted.python}, over {checkpoint.storage.label}")
    request = _request(engine, checkpoint.storage.label, checkpoint)
    answer, in_probe = parse(run(python, request, place, wanted.seconds, signals.look), wanted.python)
    check_is_about_the_folder(answer, loader.title, loader.tried, wanted.python, in_probe)
    return answer


def _compare(checkpoint: Checkpoint, answer: Answer, out: Output) -> tuple[Compared, ...]:
    if answer.raised is not None:
        return ()
    weights = find_weights(checkpoint.tensors, checkpoint.config)
    with out.progress(sum(w.info.nbytes for w in weights.values()), "comparing", passing=True) as bar:
        return tuple(compare_all(checkpoint, weights, answer.weights, bar.advance))


def _sampled(checkpoint: Checkpoint, place: Path, out: Output) -> tuple[Checkpoint, Cut]:
    """A sample of a checkpoint, written and opened."""
    cut = cut_of(checkpoint)
    size, free = sample_bytes(checkpoint, cut), free_bytes(place)
    if size > free:
        text = f"a sample takes {human_bytes(size)}, {place} has {human_bytes(free)} free"
        raise MachineError(text, "TMPDIR names another folder for temporary files.")
    folder = place / "sample"
    folder.mkdir()
    with out.progress(size, "writing a sample", passing=True) as bar:
        write_sample(checkpoint, cut, folder, bar.advance)
    return Checkpoint.open(folder), cut


def load(checkpoint: Checkpoint, engine: str, wanted: Wanted, out: Output) -> Loaded:
    """Run the engine's loader and compare.

    Raises UsageError for an engine without a script, MachineError where the loader cannot run, InputError for a
    checkpoint that cannot be sampled or has a damaged scale.
    """
    loader = ENGINES[engine].loader
    if loader is None:
        names = ", ".join(name for name, row in ENGINES.items() if row.loader)
        raise UsageError(f"dsv4 has no script for the loader of {engine}", f"--python is for {names}.")
    interpreter(wanted.python)
    size = sum(info.nbytes for info in checkpoint.tensors.values())
    with tempfile.TemporaryDirectory(prefix="dsv4-doctor-") as folder:
        place, cut = Path(folder), None
        part = checkpoint
        if not wanted.everything and size > WHOLE_BYTES:
            part, cut = _sampled(checkpoint, place, out)
        _check_memory(part, loader.decodes)
        try:
            answer = _ask(engine, loader, wanted, part, place, out)
            return Loaded(wanted.python, loader, answer, cut, _compare(part, answer, out))
        finally:
            part.close()
            checkpoint.close()
