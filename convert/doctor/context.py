"""The input and the output of a rule: facts and an engine's row, and a verdict with advice.

Advice names a command. It is proposed for this folder only if a dry run of it succeeds, else for the release.
"""

import shlex
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, cast

from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.plan.engines import Engine, EngineName, TargetName
from dsv4.convert.plan.plan import make_plan
from dsv4.convert.plan.settings import Settings, resolve
from dsv4.convert.plan.side_files import check_configs
from dsv4.errors import InputError, UsageError

from .facts import Facts

Status = Literal["ok", "note", "unknown", "wrong", "refuses"]

# wrong: it loads and computes something else. refuses: it stops with an error. unknown: not tested.
FAILURES = ("wrong", "refuses")


@dataclass(frozen=True)
class Check:
    """The verdict of one rule: what was found, what to do about it if it is a failure, and the command that does it."""

    rule: str
    status: Status
    text: str
    fix: str = ""
    command: str = ""


class Advice(NamedTuple):
    """What to do about a failure: a sentence, and a command whose dry run succeeds. Each may be ""."""

    fix: str
    command: str


def _refusal(checkpoint: Checkpoint, settings: Settings) -> str:
    """Why a dry run of the conversion fails, in sentences; "" if it does not."""
    try:
        check_configs(checkpoint, make_plan(checkpoint, settings))
    except (InputError, UsageError) as error:
        return f"{error.message}. {error.hint or ''}".rstrip()
    return ""


@dataclass(frozen=True)
class RuleContext:
    """The input of a rule: the folder's facts, the engine, and the number of ranks if it was given."""

    facts: Facts
    name: EngineName
    engine: Engine
    tensor_parallel: int | None

    @cached_property
    def convert(self) -> Advice:
        """Advice: convert this checkpoint for this engine."""
        if self.engine.layout == "mp":
            return self._rank_files(self.tensor_parallel)
        for to in self.engine.forms.values() if self.engine.target is None else ():
            return self._advice(f"--to {to}", resolve(to))
        return self._advice(f"--target {self.name}", resolve(target=cast(TargetName, self.name)))

    @cached_property
    def decode(self) -> Advice:
        """Advice: convert this checkpoint to BF16."""
        return self._advice("--to bf16", resolve("bf16"))

    def _rank_files(self, ranks: int | None) -> Advice:
        def settings(count: int) -> Settings:
            return resolve("same", layout="mp", model_parallel=count)

        advice = self._advice(f"--to same --layout mp --model-parallel {ranks or 'N'}", settings(1))
        refusal = _refusal(self.facts.checkpoint, settings(ranks)) if self.facts.checkpoint and ranks else ""
        return Advice(refusal, "") if refusal and not advice.fix else advice

    def _advice(self, flags: str, settings: Settings) -> Advice:
        """`dsv4 convert` from this folder if a dry run succeeds, else from the release."""
        facts, command = self.facts, f"dsv4 convert RELEASE NEW {flags}"
        if facts.checkpoint is None or facts.experts == {"bf16"} or facts.form:
            return Advice("", command)
        refusal = _refusal(facts.checkpoint, settings)
        if refusal:
            return Advice(f"This folder cannot be converted: {refusal}", command)
        return Advice("", f"dsv4 convert {shlex.quote(facts.folder)} NEW {flags}")
