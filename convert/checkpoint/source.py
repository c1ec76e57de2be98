"""What a SOURCE on the command line means: a local folder, or a repository on one of the two hubs.

    ./DeepSeek-V4-Flash                     a folder (a folder that exists always wins)
    deepseek-ai/DeepSeek-V4-Flash           Hugging Face
    hf:deepseek-ai/DeepSeek-V4-Flash@main   Hugging Face, with a branch, tag or commit
    ms:deepseek-ai/DeepSeek-V4-Flash        ModelScope

Nothing is looked up here and no hub library is imported.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dsv4.errors import UsageError, printable

HubName = Literal["hf", "ms"]

_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_REPOSITORY = re.compile(rf"{_NAME}/{_NAME}")
# What git allows in a branch name, without the characters that would need quoting in a path.
_REVISION = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_./+-]{0,199})")
_HOW = "Write a folder, org/name, hf:org/name or ms:org/name, and @revision behind a repository if you want one."


@dataclass(frozen=True)
class HubSource:
    """A repository on a hub. `revision` is a branch, tag or commit; None is the hub's default branch."""

    hub: HubName
    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.hub}:{self.repository}" + (f"@{self.revision}" if self.revision else "")


def _repository(hub: HubName, rest: str, text: str) -> HubSource:
    name, at, revision = rest.partition("@")
    if not _REPOSITORY.fullmatch(name) or "--" in name or ".." in name:
        raise UsageError(f"'{printable(text)}' names no repository: '{printable(name)}' is not org/name", _HOW)
    if at and (not _REVISION.fullmatch(revision) or ".." in revision or revision.endswith("/")):
        raise UsageError(f"'{printable(text)}': '{printable(revision)}' is not a branch, tag or commit", _HOW)
    return HubSource(hub, name, revision or None)


def _looks_like_path(text: str) -> bool:
    return text.startswith(("/", ".", "~", "\\")) or text.endswith("/") or text.count("/") > 1


def _parse(text: str) -> Path | HubSource:
    if not text or "\0" in text:
        raise UsageError("the source is empty" if not text else "the source holds a NUL character", _HOW)
    path = Path(text)
    if path.exists():
        return path
    if text.startswith("hf:"):
        return _repository("hf", text[3:], text)
    if text.startswith("ms:"):
        return _repository("ms", text[3:], text)
    scheme = re.match(r"([A-Za-z]+):", text)
    if scheme:
        raise UsageError(f"'{printable(text)}': dsv4 knows no hub called '{scheme[1]}'", _HOW)
    if _looks_like_path(text.partition("@")[0]):
        return path  # whoever opens it says that it does not exist
    if "/" not in text:
        raise UsageError(f"'{printable(text)}' is neither a folder that exists nor a repository", _HOW)
    return _repository("hf", text, text)


def parse_source(text: str, revision: str | None = None) -> Path | HubSource:
    """The folder or repository that `text` names; `revision` is what `--revision` says.

    Raises UsageError for text that is neither, and for a revision that is given twice or to a folder.
    """
    source = _parse(text)
    if revision is None:
        return source
    if isinstance(source, Path):
        raise UsageError(f"--revision {printable(revision)}: {printable(text)} is a folder, which has no revisions")
    if source.revision not in (None, revision):
        raise UsageError(f"two revisions: @{source.revision} and --revision {printable(revision)}", "Give one of them.")
    return _repository(source.hub, f"{source.repository}@{revision}", text)


def download_hint(text: str) -> str:
    """What to tell somebody who names a repository where only a folder will do; empty if it is none."""
    try:
        source = parse_source(text)
    except UsageError:
        return ""
    return (
        f" A repository must be fetched first: dsv4 download {source} FOLDER" if isinstance(source, HubSource) else ""
    )
