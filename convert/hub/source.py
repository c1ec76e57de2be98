"""What a SOURCE on the command line means: a local folder, or a repository on one of the two hubs.

    ./DeepSeek-V4-Flash                     a folder (a folder that exists always wins)
    deepseek-ai/DeepSeek-V4-Flash           Hugging Face, unless there is a folder `deepseek-ai`: then a missing folder
    hf:deepseek-ai/DeepSeek-V4-Flash@main   Hugging Face, with a branch, tag or commit
    ms:deepseek-ai/DeepSeek-V4-Flash        ModelScope

and, as users paste them, `hf://org/name@rev`, `https://huggingface.co/org/name/tree/rev`, addresses of files in
there, the same of `modelscope.cn/models/…`, and those of the mirror that HF_ENDPOINT names.

This module looks nothing up and imports no hub library.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from dsv4.errors import InputError, UsageError

HubName = Literal["hf", "ms"]

_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_REPOSITORY = re.compile(rf"{_NAME}/{_NAME}")
# What git allows in a branch name, without the characters that would need quoting in a path.
_REVISION = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_./+-]{0,199})")
_HOW = "Write a folder, hf:org/name or ms:org/name, and @revision behind a repository if you want one."
_HOSTS: dict[str, HubName] = {
    "huggingface.co": "hf", "www.huggingface.co": "hf", "hf.co": "hf",
    "modelscope.cn": "ms", "www.modelscope.cn": "ms", "modelscope.ai": "ms", "www.modelscope.ai": "ms",
}  # fmt: skip
_OTHER_KINDS = ("datasets", "spaces", "collections", "papers", "docs", "studios")
# In the address of a page, the word between a repository and a revision; ModelScope's files say `file/view`.
_REVISION_FOLLOWS = ("tree", "blob", "resolve", "raw", "commit", "view")


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
        raise UsageError(f"'{text}' names no repository: '{name}' is not org/name", _HOW)
    if at and (not _REVISION.fullmatch(revision) or ".." in revision or revision.endswith("/")):
        raise UsageError(f"'{text}': '{revision}' is not a branch, tag or commit", _HOW)
    return HubSource(hub, name, revision or None)


def _hub_of_host(host: str) -> HubName | None:
    mirror = urlsplit(os.environ.get("HF_ENDPOINT", "")).netloc
    return "hf" if host and host == mirror else _HOSTS.get(host.lower())


def _of_address(host: str, path: str, text: str) -> HubSource:
    """The repository of a page or a file at an address."""
    hub = _hub_of_host(host)
    if hub is None:
        hint = "Write hf:org/name or ms:org/name. A mirror of Hugging Face is named by HF_ENDPOINT."
        raise UsageError(f"'{text}': {host} is no hub that dsv4 knows", hint)
    parts = [unquote(part) for part in path.split("/") if part]
    if parts[:1] and parts[0] in _OTHER_KINDS:
        raise UsageError(f"'{text}' is not the address of a model", _HOW)
    if parts[:1] == ["models"]:
        parts = parts[1:]
    name, rest = "/".join(parts[:2]).removesuffix(".git"), parts[2:]
    followed = [number for number, word in enumerate(rest[:-1]) if word in _REVISION_FOLLOWS]
    revision = f"@{rest[followed[0] + 1]}" if followed else ""
    return _repository(hub, name + revision, text)


def _address(text: str) -> tuple[str, str] | None:
    """(host, path) of an address of a hub, with `https://` or without; None for what is none."""
    try:
        address = urlsplit(text)
    except ValueError as error:
        raise UsageError(f"'{text}' is not an address: {error}", _HOW) from None
    if address.scheme in ("http", "https"):
        return address.netloc, address.path
    host, slash, path = text.partition("/")
    return (host, path.partition("?")[0].partition("#")[0]) if slash and _hub_of_host(host) else None


def _looks_like_path(text: str) -> bool:
    return text.startswith(("/", ".", "~", "\\")) or text.endswith("/") or text.count("/") > 1


def _parse(text: str, remote: bool) -> Path | HubSource:
    if not text or "\0" in text:
        raise UsageError("the source is empty" if not text else "the source holds a NUL character", _HOW)
    path = Path(text)
    if path.exists():
        return path
    if (address := _address(text)) is not None:
        return _of_address(*address, text)
    if scheme := re.match(r"([A-Za-z]+):(?://)?", text):
        if scheme[1] not in ("hf", "ms"):
            raise UsageError(f"'{text}': dsv4 knows no hub called '{scheme[1]}'", _HOW)
        return _repository("hf" if scheme[1] == "hf" else "ms", text[scheme.end() :], text)
    if _looks_like_path(text.partition("@")[0]):
        return path  # opening it reports that it does not exist
    if "/" not in text:
        raise UsageError(f"'{text}' is neither a folder that exists nor a repository", _HOW)
    is_path = not remote and _REPOSITORY.fullmatch(text) is not None
    return path if is_path else _repository("hf", text, text)


def parse_source(text: str, revision: str | None = None, remote: bool = False) -> Path | HubSource:
    """The folder or repository that `text` names.

    revision: what `--revision` says. remote: the command takes repositories only, so `a/b` is one unless it exists.
    Raises UsageError for text that is neither, and for a revision that is given twice or to a folder.
    """
    source = _parse(text, remote or revision is not None)
    if revision is None:
        return source
    if isinstance(source, Path):
        raise UsageError(f"--revision {revision}: {text} is a folder, which has no revisions", "Leave it out.")
    if source.revision not in (None, revision):
        raise UsageError(f"two revisions: @{source.revision} and --revision {revision}", "Give one of them.")
    return _repository(source.hub, f"{source.repository}@{revision}", text)


def folder_or_repository(text: str, revision: str | None = None) -> Path | HubSource:
    """As `parse_source`; what names neither is a folder that is missing. Raises UsageError, InputError."""
    try:
        source = parse_source(text, revision)
    except UsageError:
        if ":" in text or revision is not None:
            raise
        raise missing_folder(text) from None
    if isinstance(source, Path) and not source.is_dir():
        raise missing_folder(text)
    return source


def existing_source(text: str, revision: str | None = None) -> Path | HubSource:
    """As `parse_source`, but a folder has to exist. Raises UsageError, InputError. A repository is not looked up."""
    source = parse_source(text, revision)
    if isinstance(source, Path) and not source.is_dir():
        raise missing_folder(text)
    return source


def missing_folder(text: str) -> InputError:
    """The error for a path that does not exist or is no folder; the hint says how a repository is written."""
    path = Path(text)
    hint = "Name the folder that holds config.json and the shards."
    if _REPOSITORY.fullmatch(text):
        hint += f" A repository on Hugging Face is written hf:{text}."
    kind = "is not a folder" if path.exists() else "does not exist"
    return InputError(f"{text}: {kind}", hint)


def named_sides(source: str, output: str | None, revision: str | None) -> list[Path | HubSource]:
    """What SOURCE and OUTPUT name, looked up nowhere. revision: of the only repository.

    Raises UsageError for text that names neither a folder nor a repository, InputError for a folder that is missing.
    """
    texts, last = [source], list[Path | HubSource]()
    if output is not None:
        texts, last = [source, output], [folder_or_repository(output)]
    if revision is not None and last and isinstance(last[0], HubSource):
        if isinstance(parse_source(source), HubSource):
            raise UsageError("--revision is of one repository, there are two", "Write @revision behind each of them.")
        last, revision = [parse_source(texts[1], revision)], None
    sides = [parse_source(source, revision), *last]
    for text, side in zip(texts, sides, strict=True):
        if isinstance(side, Path) and not side.is_dir():
            raise missing_folder(text)
    return sides


def require_folder(text: str) -> Path:
    """A folder, for commands that take no repository. Raises InputError; the hint says how to fetch one."""
    path = Path(text)
    if path.is_dir():
        return path
    error = missing_folder(text)
    try:
        source = parse_source(text, remote=not path.parent.is_dir())
    except UsageError:
        raise error from None
    if isinstance(source, HubSource):
        error.hint = f"A repository must be fetched first: dsv4 download {source} FOLDER"
    raise error
