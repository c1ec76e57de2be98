"""The state of an output folder: empty, unfinished, finished, or not written by dsv4.

A folder was written by dsv4 if it holds a journal (unfinished) or a manifest (finished). Nothing in other folders is
changed; in ours, only the files that journal or manifest name.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from threading import Event
from typing import Any

from dsv4.convert.checkpoint.reader import CONFIG_NAME, INDEX_NAME, Checkpoint
from dsv4.convert.checkpoint.storage import Folder
from dsv4.convert.plan.container import Container
from dsv4.convert.plan.plan import Plan
from dsv4.convert.plan.shards import OutputShard
from dsv4.errors import InputError, UsageError
from dsv4.files import PREFIX, fsync_folder
from dsv4.progress import Progress, ignore, result_of

from .atomic_file import remove, remove_empty_folder
from .journal import FinishedShard, JournalContents, check_same_job, read_journal, remove_journals
from .manifest import MANIFEST_NAME, check_owned, read_manifest

HASH_BYTES = 8 * 2**20


@dataclass(frozen=True)
class OutputState:
    """The contents of the output folder: a journal (unfinished), a manifest (finished), or neither."""

    journal: JournalContents | None = None
    manifest: dict[str, Any] | None = None


def read_output_state(folder: Path) -> OutputState:
    """Read what the output folder holds. Raises UsageError if it holds files but neither of the two."""
    if not folder.is_dir():
        return OutputState()
    journal = read_journal(folder)
    if journal is not None:
        return OutputState(journal=journal)
    manifest = read_manifest(folder)
    if manifest is not None:
        return OutputState(manifest=manifest)
    strangers = sorted(p.name for p in folder.iterdir() if not p.name.startswith(PREFIX))
    if strangers:
        raise UsageError(
            f"{folder} is not empty (it holds {strangers[0]}) and was not written by dsv4",
            "Choose a new or empty folder. --overwrite replaces only what dsv4 wrote.",
        )
    return OutputState()


def owned_files(state: OutputState) -> list[str]:
    """Names of the files that belong to the conversion in the folder. Raises InputError if one would lead elsewhere."""
    if state.journal is not None:
        return check_owned(state.journal.owned)
    if state.manifest is not None:
        return check_owned([*state.manifest["shards"], *state.manifest["files"], MANIFEST_NAME])
    return []


def check_in_the_way(folder: Path, state: OutputState, names: list[str]) -> None:
    """Raises UsageError if a file that is not ours has a name that the conversion would write."""
    foreign = sorted(n for n in set(names) - set(owned_files(state)) if (folder / n).exists())
    if foreign:
        raise UsageError(
            f"{folder}: {foreign[0]} was not written by dsv4 and would be replaced",
            "Move it away: --overwrite replaces only what dsv4 wrote.",
        )


def owned_bytes(folder: Path, state: OutputState) -> int:
    """Bytes on disk of the conversion in the folder."""
    return sum(path.stat().st_size for path in map(folder.joinpath, owned_files(state)) if path.is_file())


def clear(folder: Path, state: OutputState) -> None:
    """Remove a former conversion's files, and its sub-folders if they are empty then.

    The config goes first, then the index, the reverse of the order of publishing: a half removed output must not look
    like a model. Manifest and journal go last, when the removal of the rest is durable: they mark the folder as ours.
    """
    names = owned_files(state)
    first = [name for name in (CONFIG_NAME, INDEX_NAME) if name in names]
    for name in (*first, *sorted(set(names) - {MANIFEST_NAME, *first})):
        remove(folder / name)
    inside = {parent for name in names for parent in PurePosixPath(name).parents if parent.name}
    for sub_folder in sorted(inside, key=lambda path: -len(path.parts)):
        remove_empty_folder(folder / sub_folder)
        if (folder / sub_folder).is_dir():
            fsync_folder(folder / sub_folder)
    fsync_folder(folder)
    if MANIFEST_NAME in names:
        remove(folder / MANIFEST_NAME)
    remove_journals(folder)


def source_changed(checkpoint: Checkpoint, since_ns: int) -> set[str]:
    """Source shards that were changed after a time."""
    return {name for name in checkpoint.shards if checkpoint.storage.changed_ns(name) > since_ns}


def check_finished(
    folder: Path, manifest: dict[str, Any], job: dict[str, Any], checkpoint: Checkpoint, container: Container
) -> None:
    """Whether a finished output is that of this job, by sizes and headers (`verify` proves the rest).

    Raises UsageError if it is another job's, InputError if files are missing or the source was changed since.
    """
    check_same_job({key: manifest.get(key) for key in job}, job, folder)
    storage = Folder(folder)
    sizes = storage.sizes()
    hint = "Convert again with --overwrite."
    for name, entry in {**manifest["shards"], **manifest["files"]}.items():
        if sizes.get(name) != entry["size"]:
            state = "is missing" if name not in sizes else f"has {sizes[name]} bytes, {entry['size']} expected"
            raise InputError(f"{folder}: {name} {state}", hint)
        if name in manifest["shards"]:
            container.check_file(storage, name, sizes[name])
    changed = source_changed(checkpoint, (folder / MANIFEST_NAME).stat().st_mtime_ns)
    if changed:
        raise UsageError(f"the source changed after {folder} was made from it: {min(changed)}", hint)


def file_sha256(path: Path, stop: Event) -> str:
    """SHA-256 of a file, read in small pieces; once `stop` is set, of the bytes read until then."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while not stop.is_set() and (block := file.read(HASH_BYTES)):
            digest.update(block)
    return digest.hexdigest()


def _is_intact(folder: Path, shard: FinishedShard, stop: Event) -> bool:
    path = folder / shard.file
    return path.is_file() and path.stat().st_size == shard.size and file_sha256(path, stop) == shard.sha256


def usable_shards(
    folder: Path,
    journal: JournalContents,
    shards: Sequence[OutputShard],
    checkpoint: Checkpoint,
    pool: Executor,
    progress: Progress = ignore,
) -> dict[str, FinishedShard]:
    """The shards of an interrupted run that can be kept: their hash is right and the source has not changed since.

    progress: called with the data bytes of each.
    """
    changed = source_changed(checkpoint, journal.started_ns)
    wanted = {s.file: s for s in shards}
    trusted = [s for f, s in journal.shards.items() if f in wanted and not changed & set(wanted[f].source_shards)]
    stop = Event()
    intact = [pool.submit(_is_intact, folder, shard, stop) for shard in trusted]
    usable = {}
    try:
        for shard, future in zip(trusted, intact, strict=True):
            if result_of(future, progress):
                usable[shard.file] = shard
                progress(wanted[shard.file].data_bytes)
        return usable
    finally:
        stop.set()  # an interrupted run does not wait until its threads have read whole shards


def files_of(plan: Plan, copied: list[str]) -> list[str]:
    """Every name the conversion will write, for the journal."""
    return [*(s.file for s in plan.shards), *copied, MANIFEST_NAME, *plan.last_files]
