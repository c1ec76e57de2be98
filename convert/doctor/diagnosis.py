"""All verdicts about one folder and one engine: gathers the facts and applies the rules that fit them."""

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.plan.engines import ENGINES, EngineName, Evidence, caveats_of
from dsv4.errors import UsageError
from dsv4.progress import Reached, ignore

from .context import FAILURES, Check, RuleContext
from .facts import Facts, gather
from .rules import RULES, RULES_FOR_FOREIGN, RULES_FOR_FORMS, layout


@dataclass(frozen=True)
class Diagnosis:
    """All verdicts about one folder and one engine.

    evidence: how the engine's rules were checked, None if they were not. start: the command that
    starts the engine on the folder, "" if it has none. checkpoint: the opened folder, None if it is not a readable
    Hugging Face folder.
    """

    folder: str
    engine: EngineName
    evidence: Evidence | None
    checks: tuple[Check, ...]
    start: str
    checkpoint: Checkpoint | None = None

    @property
    def loads(self) -> bool | None:
        """True if every rule says that the engine reads it right, False if one says that it does not, else None."""
        found = {check.status for check in self.checks}
        return False if found & set(FAILURES) else None if "unknown" in found else True

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        checks = [
            {"rule": c.rule, "status": c.status, "text": c.text, "fix": c.fix, "command": c.command}
            for c in self.checks
        ]
        return {
            "folder": self.folder,
            "engine": self.engine,
            "checked": asdict(self.evidence) if self.evidence else None,
            "loads": self.loads,
            "start": self.start,
            "checks": checks,
        }


def _served(facts: Facts) -> str:
    """What a server is started on: the folder, or the first file of a model in GGUF, which names the others."""
    if facts.layout == "gguf" and facts.checkpoint is not None:
        return str(Path(facts.folder) / next(iter(facts.checkpoint.shards)))
    return facts.folder


def _start(p: RuleContext) -> str:
    if not p.engine.serve:
        return ""
    variables = [c.variable for c in caveats_of(p.name, p.facts.stored) if c.variable]
    ranks = [f"{p.engine.ranks_option} {p.tensor_parallel}"] if p.tensor_parallel and p.engine.ranks_option else []
    return " ".join([*variables, p.engine.serve, shlex.quote(_served(p.facts)), *ranks])


def diagnose(
    folder: str | Path, engine: EngineName, tensor_parallel: int | None = None, headers: Reached = ignore
) -> Diagnosis:
    """Apply every rule. `headers` is called with the number of shards whose headers were read, and of all.

    Raises UsageError for an engine without a row, InputError if the folder is absent or holds no safetensors file.
    """
    if engine not in ENGINES:
        raise UsageError(f"there are no rules for {engine!r}", f"Engines are {', '.join(ENGINES)}.")
    facts = gather(Path(folder), headers)
    context = RuleContext(facts, engine, ENGINES[engine], tensor_parallel)
    checks = list(layout(context))
    if facts.unreadable is not None:
        checks.append(Check("files", "refuses", facts.unreadable.message, facts.unreadable.hint))
    elif checks[0].status == "ok":  # it does not read this layout at all: no other rule applies
        rules = RULES_FOR_FOREIGN if facts.foreign else RULES_FOR_FORMS if facts.form else RULES
        checks += [check for rule in rules for check in rule(context)]
    readable = facts.checkpoint if facts.layout == "hf" else None
    return Diagnosis(facts.folder, engine, context.engine.evidence, tuple(checks), _start(context), readable)
