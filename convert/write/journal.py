"""The finished shards of an unfinished conversion: `.dsv4-journal.jsonl` in the output folder, one file for each part.

The first line binds the journal to one job: source, settings, version. It fills whole blocks of the disk, so that no
later write can damage it: without this line dsv4 would refuse the folder. Each further line is one finished shard with
its size, SHA-256 and the manifest entries of its tensors. The journal is a hint: a resumed run reads every listed shard
again and compares its hash. A torn last line is ignored. Of a journal in an older format only the job is used: the same
job starts again in its place.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4.errors import UsageError
from dsv4.files import PREFIX
from dsv4.text import counted, human_bytes

from .atomic_file import AppendLog, read_small, remove, write_file

_STEM, _ENDING = PREFIX + "journal", ".jsonl"
MAX_JOURNAL_BYTES = 2 * 10**9
BLOCK_BYTES = 4096  # of a disk, which may lose all of one that it writes when the power goes
FORMAT = 3  # of journal and manifest. 1: tensors had SHA-256, 2: they had BLAKE3, and their sources too


@dataclass(frozen=True)
class FinishedShard:
    """One shard under its final name, as it was when it was written."""

    file: str
    size: int
    sha256: str
    tensors: dict[str, dict[str, Any]]  # manifest entries


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _shard(entry: dict[str, Any]) -> FinishedShard | None:
    try:
        return FinishedShard(str(entry["file"]), int(entry["size"]), str(entry["sha256"]), dict(entry["tensors"]))
    except (KeyError, TypeError, ValueError):
        return None


@dataclass(frozen=True)
class JournalContents:
    """The contents of all journals of a folder.

    jobs: the job of each journal. owned: names of all files the jobs write. started_ns: when the first began.
    """

    jobs: list[dict[str, Any]]
    owned: list[Any]
    started_ns: int
    shards: dict[str, FinishedShard]


def journal_name(part: str = "") -> str:
    """File name of a journal: of a whole conversion, or of one part (`2-of-8`)."""
    return f"{_STEM}.{part}{_ENDING}" if part else _STEM + _ENDING


def _journals(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob(f"{_STEM}*{_ENDING}") if p.is_file())


def _read_one(path: Path) -> JournalContents | None:
    lines = read_small(path, MAX_JOURNAL_BYTES).split(b"\n")[:-1]  # a line without a newline is torn
    entries = [entry for entry in map(_parse, lines) if entry is not None]
    try:
        job, owned, started = dict(entries[0]["job"]), list(entries[0]["owned"]), int(entries[0]["started_ns"])
    except (IndexError, KeyError, TypeError, ValueError):
        return None
    lines_of_shards = entries[1:] if job.get("format") == FORMAT else []
    shards = [shard for shard in map(_shard, lines_of_shards) if shard is not None]
    return JournalContents([job], owned, started, {shard.file: shard for shard in shards})


def _can_go_on(path: Path) -> bool:
    """Whether lines may be added to a journal."""
    contents = _read_one(path) if path.is_file() else None
    return contents is not None and contents.jobs[0].get("format") == FORMAT


def read_journal(folder: Path) -> JournalContents | None:
    """All journals of an unfinished conversion together; None if there is no usable one."""
    found = [contents for contents in map(_read_one, _journals(folder)) if contents is not None]
    if not found:
        return None
    return JournalContents(
        [job for one in found for job in one.jobs],
        [name for one in found for name in one.owned],
        min(one.started_ns for one in found),
        {file: shard for one in found for file, shard in one.shards.items()},
    )


def remove_journals(folder: Path) -> None:
    """Remove all journals: the conversion is complete, or is removed."""
    for path in _journals(folder):
        remove(path)


def describe_difference(old: Any, new: Any, where: str = "") -> str | None:
    """Name the first thing in which two jobs differ, as `settings.to: 'fp8' before, 'bf16' now`; None if nothing."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(k for k in new if k not in old)]:
            found = describe_difference(old.get(key), new.get(key), f"{where}.{key}" if where else str(key))
            if found:
                return found
        return None
    if old == new:
        return None
    return f"{where}: {repr(old)[:80]} before, {repr(new)[:80]} now"


def _as_resumed_by(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The old job in the new one's format, with the new `on_inexact` if the old was "error": its shards are exact."""
    old = {**old, "format": new.get("format")}
    options, wanted = old.get("options"), new.get("options")
    if not isinstance(options, dict) or not isinstance(wanted, dict) or options.get("on_inexact") != "error":
        return old
    return {**old, "options": {**options, "on_inexact": wanted.get("on_inexact")}}


def _shards_of(source: Any) -> str:
    """`4 shards, 15.1 MB`: what a job says of its source, "" if that cannot be read."""
    try:
        sizes = [int(shard["size"]) for shard in source["shards"].values()]
    except (AttributeError, KeyError, TypeError, ValueError):
        return ""
    return f"{counted(len(sizes), 'shard')}, {human_bytes(sum(sizes))}"


def _other_source(source: dict[str, Any], present: Any, difference: str) -> str:
    """How the source of an earlier job is not the present one. The path of a folder is no part of a job."""
    if "repository" in source:
        return f"made from {source.get('hub')}:{source['repository']}@{source.get('commit')}"
    before, now = _shards_of(source), _shards_of(present)
    if before and now and before != now:
        return f"made from another checkpoint ({before}; this one has {now})"
    shard = difference.removeprefix("source.shards.").partition(": ")[0]
    key = difference.removeprefix("source.").partition(":")[0]
    file = {"config_sha256": "config.json", "recorded_scales_sha256": "dsv4.json"}.get(key, shard)
    return f"made from another checkpoint, whose {file} is not this one's"


def _value(option: Any) -> Any:
    """An option's value as the command line has it."""
    return "not given" if option is None else option


def _in_words(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """What makes two jobs different ones, in the user's terms; None if nothing does."""
    difference = describe_difference(old, new)
    before, now, source = old.get("options"), new.get("options"), old.get("source")
    if difference is None:
        return None
    if difference.startswith("source.") and isinstance(source, dict):
        return _other_source(source, new.get("source"), difference)
    if difference.startswith("options.") and isinstance(before, dict) and isinstance(now, dict):
        changed = [name for name in now if before.get(name) != now[name]]
        if "to" in changed:  # what follows from it is not what the user chose
            changed = ["to"]
        pairs = (f"--{name.replace('_', '-')} {_value(before.get(name))}, now {_value(now[name])}" for name in changed)
        return "made with " + "; ".join(pairs)
    return difference


def check_same_job(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    """Raises UsageError naming what differs if the folder holds another job's output."""
    difference = _in_words(_as_resumed_by(old, new), new)
    if difference:
        raise UsageError(
            f"{folder} holds the output of another conversion, {difference}",
            "Choose another folder, or replace it with --overwrite.",
        )


class Journal:
    """The journal of the running conversion, open for adding lines."""

    def __init__(self, folder: Path, job: dict[str, Any], owned: list[str], part: str = "") -> None:
        self._path = folder / journal_name(part)
        if not _can_go_on(self._path):  # an older one is ours until this one is there
            first = json.dumps({"job": job, "owned": owned, "started_ns": time.time_ns()}).encode()
            write_file(self._path, [first.ljust(-(len(first) + 1) % BLOCK_BYTES + len(first)) + b"\n"])
        self._log = AppendLog(self._path)

    def add(self, shard: FinishedShard) -> None:
        """Record a shard that is durable under its final name."""
        entry = {"file": shard.file, "size": shard.size, "sha256": shard.sha256, "tensors": shard.tensors}
        self._log.append(json.dumps(entry))

    def close(self) -> None:
        """Close the file; it stays for the next run."""
        self._log.close()

    def discard(self) -> None:
        """Remove the file: no shard was finished."""
        self.close()
        remove(self._path)
