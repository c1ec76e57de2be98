"""A conversion from end to end: read the output folder, resume or start, write the shards, publish.

Files become visible in this order: shards, side files and manifest, index, config.json. Loaders look for the index or
the config, so they never find half a model, wherever a run was stopped.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv4.convert.checkpoint.reader import CONFIG_NAME, Checkpoint
from dsv4.convert.checkpoint.storage import Folder
from dsv4.convert.plan.partition import All, Part, Publish, Work, shards_of
from dsv4.convert.plan.plan import Plan
from dsv4.convert.plan.shards import OutputShard
from dsv4.convert.plan.side_files import check_configs, config_file, copied_files, made_files, read_side_file
from dsv4.convert.write.shards.in_flight import Flight, InFlight, Written
from dsv4.convert.write.shards.resources import Resources
from dsv4.convert.write.shards.shard import write_shard
from dsv4.convert.write.shards.workers import Workers
from dsv4.errors import InputError, Interrupted, MachineError
from dsv4.machine import free_bytes
from dsv4.progress import Progress, ignore
from dsv4.text import human_bytes

from .atomic_file import (
    check_separate,
    create_folder,
    leftovers,
    remove_leftovers,
    remove_scratch_of_parts,
    write_file,
)
from .journal import FinishedShard, Journal, check_same_job, read_journal, remove_journals
from .lock import locked, remove_stale_lock
from .manifest import MANIFEST_NAME, describe_job, dump_manifest, make_manifest
from .output_folder import (
    check_finished,
    check_in_the_way,
    clear,
    files_of,
    owned_bytes,
    read_output_state,
    usable_shards,
)

NOT_DURABLE = (
    "the file system of the output cannot fsync: after a power loss a file may be incomplete under its final name; "
    "dsv4 verify finds that"
)
WHOLE = All()
SPARE_DISK_BYTES = 64 * 2**20  # manifest, index, side files and the file system's own blocks


@dataclass(frozen=True)
class Job:
    """A conversion: the checkpoint, the plan, the output folder, and threads and memory to use."""

    checkpoint: Checkpoint
    plan: Plan
    output: Path
    resources: Resources

    def describe(self) -> dict[str, Any]:
        """The job as data, see `describe_job`."""
        return describe_job(self.checkpoint, self.plan.settings)

    def side_files(self) -> list[str]:
        """Names of the files that are copied from the source."""
        return copied_files(self.checkpoint, self.plan)

    def made_files(self) -> dict[str, bytes]:
        """The files that the conversion adds to these, by name."""
        return made_files(self.checkpoint, self.plan)

    def files(self) -> list[str]:
        """Names of all files of the output."""
        return files_of(self.plan, [*self.side_files(), *self.made_files()])


@dataclass
class Result:
    """The result of a conversion."""

    output: Path
    plan: Plan = field(repr=False)
    already_done: bool = False
    shards_written: int = 0
    shards_reused: int = 0
    output_bytes: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    summary: dict[str, int] = field(default_factory=dict)
    kept_tensors: list[str] = field(default_factory=list, repr=False)
    dry_run: bool = False  # nothing was written; output_bytes is what would be

    @property
    def is_exact(self) -> bool:
        """Whether no value was rounded."""
        return not (self.summary.get("inexact_blocks") or self.summary.get("changed_elements"))

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            **({"dry_run": True} if self.dry_run else {}),
            "output": str(self.output),
            "already_done": self.already_done,
            "source_bytes": self.plan.source_bytes,
            "output_bytes": self.output_bytes,
            "shards": len(self.plan.shards),
            "shards_written": self.shards_written,
            "shards_reused": self.shards_reused,
            "seconds": round(self.seconds, 3),
            **({} if self.dry_run else {"exact": self.is_exact}),
            "kept_tensors": self.kept_tensors,
            "notes": [*self.plan.notes, *self.notes],
            **self.summary,
        }


class _Run:
    """One run into a locked folder: its shards, the finished ones among them, and the work that is left."""

    def __init__(self, job: Job, work: Work, workers: Workers, progress: Progress) -> None:
        self.job, self.work, self.workers, self.progress = job, work, workers, progress
        self.shards = shards_of(job.plan, work)
        self.finished: dict[str, FinishedShard] = {}
        self.durable = True

    @property
    def pending(self) -> list[OutputShard]:
        """Shards of this run that are not finished."""
        return [shard for shard in self.shards if shard.file not in self.finished]

    def resume(self) -> None:
        """Read the shards that earlier runs or other parts finished, and keep those with the right hash."""
        job, journal = self.job, read_journal(self.job.output)
        if journal is None:
            return
        for old in journal.jobs:
            check_same_job(old, job.describe(), job.output)
        confirmed = self.work.confirmed if isinstance(self.work, Publish) else frozenset()
        doubted = [shard for shard in self.shards if shard.file not in confirmed]
        self.finished = {file: shard for file, shard in journal.shards.items() if file in confirmed}
        self.progress(sum(shard.data_bytes for shard in self.shards if shard.file in self.finished))
        self.finished |= usable_shards(job.output, journal, doubted, job.checkpoint, self.workers.pool, self.progress)

    def check_complete(self) -> None:
        """Raises InputError if shards are missing."""
        missing = [shard.file for shard in self.pending]
        if missing:
            shown = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
            raise InputError(
                f"{self.job.output} is not complete: {len(missing)} of {len(self.shards)} shards are "
                f"not there or not whole: {shown}",
                "Run the parts that write them again (the same --part commands), then --finish.",
            )

    def _write(self, shard: OutputShard, flight: Flight) -> Written:
        job = self.job
        return write_shard(job.checkpoint, shard, job.plan.settings, job.output, self.workers, flight)

    def write_pending(self, journal: Journal) -> int:
        """Write, commit and record the pending shards. Returns how many."""
        pending, storage = self.pending, self.job.checkpoint.storage
        try:
            with InFlight(self._write, storage, self.job.resources.shards, self.progress) as in_flight:
                for file, finished in in_flight.written(pending):
                    with file:
                        self.durable &= file.commit()
                    journal.add(finished)
                    self.finished[finished.file] = finished
            storage.prepare(())
        except Interrupted as error:
            error.args = (f"interrupted: {len(self.finished)} of {len(self.shards)} shards are finished and kept",)
            left = _unfinished_bytes(self.job.output, self.shards)
            removed = f" It removes {human_bytes(left)} of shards that were not finished." if left else ""
            error.hint = f"Run the same command again to continue.{removed}"
            raise
        return len(pending)

    def kept_tensors(self) -> list[str]:
        """Weights that kept the source's dtype because they have no exact form."""
        planned = {t.name: t.dtype for s in self.job.plan.shards for t in s.tensors}
        entries = {n: e for s in self.finished.values() for n, e in s.tensors.items()}
        return sorted(n for n, e in entries.items() if n.endswith(".weight") and e["dtype"] != planned.get(n))

    def _last_files(self, kept: list[str]) -> dict[str, bytes]:
        """The files that loaders look for, in their order."""
        plan = self.job.plan
        tensors = {n: e for shard in plan.shards for n, e in self.finished[shard.file].tensors.items()}
        return {
            name: config_file(self.job.checkpoint, plan, some_kept=bool(kept))
            if name == CONFIG_NAME
            else plan.container.index(tensors)
            for name in plan.last_files
        }

    def publish(self) -> dict[str, int]:
        """Write everything beside the shards, config.json last. Returns the manifest's summary."""
        job, kept = self.job, self.kept_tensors()
        files = {name: read_side_file(job.checkpoint, name, job.plan) for name in job.side_files()}
        files |= job.made_files()
        last = self._last_files(kept)
        shards = [self.finished[shard.file] for shard in job.plan.shards]
        manifest = make_manifest(job.describe(), shards, {**files, **last}, kept)
        contents = {name: [data] for name, data in files.items()}
        contents[MANIFEST_NAME] = dump_manifest(manifest)
        contents |= {name: [data] for name, data in last.items()}
        for name, parts in contents.items():
            self.progress(0)
            self.durable &= write_file(job.output / name, parts)
        return dict(manifest["summary"])

    def carry_out(self, result: Result) -> None:
        """Do the rest of this run's work."""
        job, part = self.job, self.work if isinstance(self.work, Part) else None
        self.resume()
        if isinstance(self.work, Publish):
            self.check_complete()
        result.shards_reused = len(self.finished)
        _check_disk(job, sum(shard.size for shard in self.pending))
        journal = Journal(job.output, job.describe(), job.files(), part.tag if part else "")
        try:
            result.shards_written = self.write_pending(journal)
            result.kept_tensors = self.kept_tensors()
            if part is None:
                result.summary = self.publish()
        except BaseException:
            # A journal without shards would only bind the next run to this one's options. Look at the folder: a run
            # may be stopped between a shard's rename and its line in the journal.
            begun = any((job.output / shard.file).exists() for shard in self.shards)
            journal.close() if begun else journal.discard()
            raise
        journal.close()
        if part is None:
            remove_journals(job.output)
            remove_scratch_of_parts(job.output)
        if not self.durable:
            result.notes.append(NOT_DURABLE)
        result.output_bytes = sum(shard.size for shard in self.finished.values())


def _unfinished_bytes(output: Path, shards: Sequence[OutputShard]) -> int:
    """Bytes on disk of temporary files of stopped runs; the next run removes them."""
    return sum(path.stat().st_size for path in leftovers(output, [shard.file for shard in shards]))


def _check_disk(job: Job, missing_bytes: int) -> None:
    """Raises MachineError, with both numbers, if the disk is too small for the output and fetched source shards."""
    needed = missing_bytes + job.checkpoint.storage.disk_bytes() + SPARE_DISK_BYTES
    free = free_bytes(job.output)
    if needed > free:
        raise MachineError(
            f"the output needs {human_bytes(needed)}, {human_bytes(free)} are free where {job.output} is",
            "Free some space or choose another disk. Nothing was written.",
        )


def _already_done(job: Job, manifest: dict[str, Any]) -> Result:
    check_finished(job.output, manifest, job.describe(), job.checkpoint, job.plan.container)
    remove_stale_lock(job.output)
    size = sum(entry["size"] for entry in manifest["shards"].values())
    return Result(
        job.output,
        job.plan,
        already_done=True,
        shards_reused=len(job.plan.shards),
        output_bytes=size,
        summary=dict(manifest["summary"]),
        kept_tensors=list(manifest["kept_tensors"]),
    )


def _clear(job: Job) -> None:
    state = read_output_state(job.output)
    check_in_the_way(job.output, state, job.files())
    clear(job.output, state)


def clear_output(job: Job) -> None:
    """Remove a former conversion, once for all runs that share the work. Errors as in `run_conversion`."""
    if job.output.is_dir():
        with locked(job.output):
            _clear(job)


def check_part(job: Job, part: Part, progress: Progress = ignore) -> list[str]:
    """Read a part's shards again. Returns the names of those whose hash is right and whose source is unchanged."""
    journal = read_journal(job.output)
    if journal is None:
        return []
    with Workers(job.resources) as workers:
        shards = shards_of(job.plan, part)
        return list(usable_shards(job.output, journal, shards, job.checkpoint, workers.pool, progress))


def check_job(job: Job) -> None:
    """Raises what can be found before the work: an output inside the source, a config that cannot be made."""
    if isinstance(job.checkpoint.storage, Folder):
        check_separate(job.checkpoint.storage.path, job.output)
    check_configs(job.checkpoint, job.plan)


def run_conversion(job: Job, work: Work = WHOLE, progress: Progress = ignore) -> Result:
    """Run a conversion or a part of it: start, continue, or find it finished.

    progress: called with bytes of data as they are scanned and written (half each), or found whole from a former run;
    they add up to the data of the shards that the work is about.
    Raises Dsv4Error: UsageError for a folder that dsv4 did not create or that holds another conversion,
    InputError for a source that is not what it claims, MachineError for disk and lock, Interrupted on a signal.
    """
    started, output = time.monotonic(), job.output
    overwrite = isinstance(work, All) and work.overwrite
    check_job(job)
    state = read_output_state(output)
    if state.manifest is not None and not overwrite:
        return _already_done(job, state.manifest)
    shards = shards_of(job.plan, work)
    if overwrite or not state.journal:  # a continued run is checked when it is known what of it can be used
        missing = 0 if isinstance(work, Publish) else sum(shard.size for shard in shards)
        _check_disk(job, missing - owned_bytes(output, state) - _unfinished_bytes(output, shards))
    create_folder(output)
    result, tag = Result(output, job.plan), work.tag if isinstance(work, Part) else ""
    with locked(output, tag), Workers(job.resources) as workers:
        remove_leftovers(output, [shard.file for shard in shards] if tag else ("*",))
        if overwrite:
            _clear(job)
        _Run(job, work, workers, progress).carry_out(result)
    result.seconds = time.monotonic() - started
    return result
