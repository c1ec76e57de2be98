"""Detects which edition's prompts a checkpoint was trained on, from its files, without running any of them.

The releases include their encoder as Python in `encoding/`. Only the literals that it assigns are read, from its syntax
tree. A checkpoint without that folder is judged by config.json and its name; the assumption is then printed.
"""

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsv4.convert.checkpoint.header import strict_json
from dsv4.errors import InputError

from .editions import PROTOCOLS
from .protocol import Protocol

MOST_ENCODER_BYTES = 1_000_000  # the releases' have 30 thousand
UNDECIDED = "dspark_block_size"  # a key of config.json in editions that only the name of the folder distinguishes
VISION = "vision_n_layers"  # a key of Vision-Exp's flat config.json
NEWEST_FIRST = tuple(reversed(PROTOCOLS.values()))
ENCODERS = tuple(dict.fromkeys(protocol.signs.encoder for protocol in NEWEST_FIRST))
ASK = f"Say which edition it is: --edition {' or '.join(PROTOCOLS)}."


@dataclass(frozen=True)
class PromptEdition:
    """The edition of a checkpoint and the evidence for it. `warnings` are lines for the user."""

    name: str
    reason: str
    warnings: tuple[str, ...] = ()


def _literal(node: ast.expr) -> object:
    """The value of a literal; None for an expression that would have to be executed."""
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


def module_literals(source: str) -> dict[str, object]:
    """Name and value of the literals that a module assigns at its top level. Raises ValueError if it is not Python."""
    try:
        body = ast.parse(source).body
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(str(error)) from None
    literals: dict[str, object] = {}
    for statement in body:
        if isinstance(statement, ast.Assign):
            names = [target.id for target in statement.targets if isinstance(target, ast.Name)]
            literals |= dict.fromkeys(names, _literal(statement.value))
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value:
            literals[statement.target.id] = _literal(statement.value)
    return literals


def _config(folder: Path) -> Mapping[str, Any]:
    """config.json of the folder, {} without one. Raises InputError unless it holds an object."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    config = strict_json(path.read_bytes(), str(path))
    if not isinstance(config, dict):
        raise InputError(f"{path}: a JSON object is expected")
    return config


def _encoder_literals(path: Path) -> dict[str, object]:
    """The literals that the encoder at `path` assigns. Raises InputError if it is not Python."""
    try:
        if path.stat().st_size > MOST_ENCODER_BYTES:
            raise ValueError("it is too large for an encoder")
        return module_literals(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of another encoding, too
        raise InputError(f"{path} does not tell the edition: {error}", ASK) from None


def _same(found: object, released: object) -> bool:
    """Whether two literals are equal, white space around texts aside: encoders add line breaks in other places."""
    if isinstance(found, str) and isinstance(released, str):
        return found.strip() == released.strip()
    if isinstance(found, dict) and isinstance(released, dict):
        return found.keys() == released.keys() and all(_same(found[key], released[key]) for key in released)
    return found == released


def _changes(literals: Mapping[str, object], protocol: Protocol) -> tuple[str, ...]:
    """A warning for each value that the encoder assigns otherwise than the release's, or does not assign.

    A value that is not a literal would have to be executed; it is not compared, and the warning says so.
    """
    found = []
    for name, value in protocol.signs.literals.items():
        what = f"has another {name} than the release"
        if name in literals and literals[name] is None:
            what = f"computes {name}, which is a literal in the release, and it is not executed"
        elif _same(literals.get(name), value):
            continue
        prompt = f"the prompt is the one of edition {protocol.edition}, not the one of this file"
        found.append(f"{protocol.signs.encoder} {what}: {prompt}")
    return tuple(found)


def _from_encoder(folder: Path, encoder: str) -> PromptEdition:
    """The edition whose encoder lies in the folder. Raises InputError if it is no known edition."""
    protocols = [protocol for protocol in NEWEST_FIRST if protocol.signs.encoder == encoder]
    literals = _encoder_literals(folder / encoder)
    for protocol in protocols:
        if protocol.signs.recognises(literals):
            return PromptEdition(protocol.edition, f"told from {encoder}", _changes(literals, protocol))
    known = " or ".join(protocol.edition for protocol in protocols)
    raise InputError(f"{folder / encoder} is not the encoder of edition {known}", ASK)


def _assumed(edition: str, reason: str) -> PromptEdition:
    reason = f"assumed: there is no encoding folder, and {reason}"
    return PromptEdition(edition, reason, (f"edition {edition} is {reason}; --edition says another",))


def _from_config(folder: Path, config: Mapping[str, Any]) -> PromptEdition:
    """The edition that config.json and the folder's name suggest: an assumption."""
    if UNDECIDED not in config:
        return _assumed("preview", f"config.json has no {UNDECIDED}")
    if VISION in config:
        return _assumed("0731", f"config.json has {UNDECIDED} and {VISION}")
    path = folder.resolve()
    name = path.parent.parent.name if path.parent.name == "snapshots" else path.name  # of the repository, in a cache
    edition = "preview" if "dspark" in name.lower() and not re.search("0731|0813", name) else "0731"
    return _assumed(edition, f"config.json has {UNDECIDED}; the name {name} has to decide")


def prompt_edition_of(folder: str | Path) -> PromptEdition:
    """The edition of the checkpoint in `folder`.

    Raises InputError if the encoder in it is of no known edition, or if it or config.json cannot be read.
    """
    folder = Path(folder)
    config = _config(folder)
    named = next((p for p in PROTOCOLS.values() if p.signs.is_config is not None and p.signs.is_config(config)), None)
    encoders = [encoder for encoder in ENCODERS if (folder / encoder).is_file()]
    if named is not None and named.signs.encoder not in encoders:
        others = tuple(f"{encoder} is of another edition than config.json" for encoder in encoders)
        return PromptEdition(named.edition, "told from config.json", others)
    if not encoders:
        return _from_config(folder, config)
    found = _from_encoder(folder, encoders[0])
    if config and named is None and PROTOCOLS[found.name].signs.is_config is not None:
        warning = f"{encoders[0]} is of another edition than config.json"
        return replace(found, warnings=(*found.warnings, warning))
    return found
