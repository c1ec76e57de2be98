"""Opening a repository on a hub: the client for the hub, and a snapshot of one commit with its listing."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from dsv4.errors import InputError
from dsv4.progress import Progress, Reached, ignore
from dsv4.text import some_of

from .client import Hub, NoRepository, Snapshot, check_remote_name, with_patience
from .source import HubName, HubSource

DEFAULT_SCRATCH = 2


@dataclass(frozen=True)
class HubOptions:
    """How a command reads a repository. `scratch`: shards on disk at once. `keep`: leave them in the library's cache.

    warn, detail: called with a line for the user. headers: called with (shards whose first bytes arrived, all shards).
    progress: called while the work waits; an exception that it raises ends the work.
    """

    token: str | None = None
    cache: Path | None = None
    scratch: int = DEFAULT_SCRATCH
    keep: bool = False
    warn: Callable[[str], None] = field(default=lambda line: None)
    detail: Callable[[str], None] = field(default=lambda line: None)
    headers: Reached = ignore
    progress: Progress = ignore


def open_hub(name: HubName, token: str | None = None) -> Hub:
    """The client for one hub. Imports its library."""
    if name == "hf":
        from .huggingface import HuggingFace

        return HuggingFace(token)
    from .modelscope import ModelScope

    return ModelScope(token)


def other_hub(name: HubName) -> HubName:
    """The hub that is not this one."""
    return "ms" if name == "hf" else "hf"


def _name_similar(hub: Hub, source: HubSource, error: NoRepository) -> NoRepository:
    names = [f"{source.hub}:{name}" if source.hub == "ms" else name for name in hub.similar(source.repository)]
    guess = f"Did you mean {' or '.join(names)}? " if names else ""
    return NoRepository(error.message, guess + error.hint)


def open_snapshot(source: HubSource, token: str | None = None, cache: Path | None = None) -> Snapshot:
    """Resolve the revision to a commit and list its files, every name checked.

    With HF_HUB_OFFLINE, both come from `cache` (None: the library's own). Raises NoRepository with similar names,
    InputError for names that are not safe, NetworkError, MachineError.
    """
    hub = open_hub(source.hub, token)
    if hub.offline():
        commit, files = hub.cached_files(source.repository, source.revision, cache)
    else:
        try:
            commit = with_patience(lambda: hub.resolve(source.repository, source.revision))
        except NoRepository as error:
            raise _name_similar(hub, source, error) from None
        files = with_patience(lambda: hub.files(source.repository, commit))
    for file in files:
        check_remote_name(file.name, str(source))
    return Snapshot(source, hub, commit, {file.name: file for file in files})


def check_unchanged(snapshot: Snapshot) -> None:
    """Raises InputError if the files are not those that were listed first. A commit is not asked for again."""
    if snapshot.is_commit:
        return
    files = with_patience(lambda: snapshot.hub.files(snapshot.source.repository, snapshot.commit))
    now = {file.name: file for file in files}
    if now != snapshot.files:
        changed = sorted(name for name, file in snapshot.files.items() if now.get(name) != file)
        text = f"{snapshot.label}: the branch moved while it was read: {some_of(changed, 3)}"
        raise InputError(text, "Run it again.")
