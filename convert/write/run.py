"""A conversion from end to end: look, resume or begin, write shard after shard, publish.

The order of what becomes visible is the promise: shards first, then side files and manifest, then the index, then
config.json. A loader that looks for the index or the config never meets half a model, wherever a run was stopped.
"""

import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from dsv4.convert.checkpoint.reader import CONFIG_NAME, INDEX_NAME, Checkpoint
from dsv4.convert.checkpoint.storage import Folder
from dsv4.convert.plan.engines import Layout, ScaleDtype, TargetName, WoA
from dsv4.convert.plan.partition import Part, deal
from dsv4.convert.plan.plan import OutputShard, Plan, make_plan
from dsv4.convert.plan.settings import DEFAULT_MAX_SHARD_BYTES, OnInexact, To, resolve
from dsv4.convert.plan.side_files import (
    check_configs,
    config_file,
    copied_files,
    index_file,
    index_names,
    read_side_file,
)
from dsv4.errors import InputError, Interrupted, MachineError, UsageError, printable
from dsv4.machine import free_bytes
from dsv4.progress import Progress, ignore

from .atomic_file import (
    check_separate,
    create_folder,
    leftovers,
    locked,
    remove_leftovers,
    remove_scratch_of_parts,
    remove_stale_lock,
    write_file,
)
from .journal import FinishedShard, Journal, check_same_job, read_journal, remove_journals
from .manifest import MANIFEST_NAME, describe_job, dump_manifest, make_manifest
from .output_folder import check_finished, check_in_the_way, clear, files_of, look, owned_bytes, usable_shards
from .resources import Resources, decide_resources, keep_freed_memory
from .shard import Workers, write_shard

SPARE_DISK_BYTES = 64 * 2**20  # manifest, index, side files and the file system's own blocks


@dataclass
class Result:
    """What a conversion did."""

    output: Path
    plan: Plan
    already_done: bool = False
    shards_written: int = 0
    shards_reused: int = 0
    output_bytes: int = 0
    seconds: float = 0.0
    summary: dict[str, int] = field(default_factory=dict)
    kept_tensors: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "output": str(self.output),
            "already_done": self.already_done,
            "source_bytes": self.plan.source_bytes,
            "output_bytes": self.output_bytes,
            "shards": len(self.plan.shards),
            "shards_written": self.shards_written,
            "shards_reused": self.shards_reused,
            "seconds": round(self.seconds, 3),
            "exact": not (self.summary.get("inexact_blocks") or self.summary.get("changed_elements")),
            "kept_tensors": self.kept_tensors,
            "notes": list(self.plan.notes),
            **self.summary,
        }


def check_disk(checkpoint: Checkpoint, missing_bytes: int, output: Path) -> None:
    """Raises MachineError with both numbers if what is to be written, and what the source needs, do not fit."""
    needed = missing_bytes + checkpoint.storage.disk_bytes() + SPARE_DISK_BYTES
    free = free_bytes(output)
    if needed > free:
        raise MachineError(
            f"the output needs {needed} bytes, {free} are free where {printable(str(output))} is",
            "Free some space or choose another disk. Nothing was written.",
        )


class _Run:
    """One run into a locked folder: what is finished, and how to finish the rest.

    part: write only the shards of one part, and leave publishing to another run. finish: write no shards at all.
    confirmed: finished shards that need not be read again, because another process has just done so.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        output: Path,
        resources: Resources,
        part: Part | None = None,
        finish: bool = False,
        confirmed: Collection[str] = (),
    ) -> None:
        self.checkpoint, self.plan, self.output, self.part, self.finish = checkpoint, plan, output, part, finish
        self.confirmed = frozenset(confirmed)
        self.shards = list(plan.shards) if part is None else deal(plan, part.count)[part.index]
        self.finished: dict[str, FinishedShard] = {}
        keep_freed_memory()
        self.pool = ThreadPoolExecutor(resources.workers, "dsv4", initializer=lambda: torch.set_num_threads(1))
        self.hasher, self.writer = ThreadPoolExecutor(1, "dsv4-hash"), ThreadPoolExecutor(1, "dsv4-write")
        self.workers = Workers(self.pool, resources.window, self.hasher, self.writer)

    @property
    def pending(self) -> list[OutputShard]:
        """Shards of this run that are not finished."""
        return [shard for shard in self.shards if shard.file not in self.finished]

    def resume(self, job: dict[str, Any], advance: Progress) -> None:
        """Take over what interrupted runs, or other parts, of the same job finished. Reads it all to be sure."""
        past = read_journal(self.output)
        if past is None:
            return
        for old in past.jobs:
            check_same_job(old, job, self.output)
        doubted = [shard for shard in self.shards if shard.file not in self.confirmed]
        self.finished = {file: shard for file, shard in past.shards.items() if file in self.confirmed}
        advance(sum(shard.data_bytes for shard in self.shards if shard.file in self.finished))
        self.finished |= usable_shards(self.output, past, doubted, self.checkpoint, self.pool, advance)

    def check_complete(self) -> None:
        """Raises InputError if shards are missing though this run is only to publish."""
        missing = [shard.file for shard in self.pending]
        if self.finish and missing:
            shown = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
            raise InputError(
                f"{printable(str(self.output))} is not complete: {len(missing)} of {len(self.shards)} shards are not "
                f"there or not whole: {shown}",
                "Run the parts that write them again (the same --part commands), then --finish.",
            )

    def write(self, shard: OutputShard, journal: Journal, advance: Progress) -> None:
        """Write one shard, make it final and record it."""
        file, finished = write_shard(self.checkpoint, shard, self.plan.settings, self.output, self.workers, advance)
        with file:
            file.commit()
        journal.add(finished)
        self.finished[shard.file] = finished

    def kept_tensors(self) -> list[str]:
        """Weights that kept the source's dtype for want of an exact form."""
        planned = {t.name: t.dtype for s in self.plan.shards for t in s.tensors}
        entries = {n: e for s in self.finished.values() for n, e in s.tensors.items()}
        return sorted(n for n, e in entries.items() if n.endswith(".weight") and e["dtype"] != planned.get(n))

    def publish(self, job: dict[str, Any], copied: list[str], advance: Progress) -> dict[str, int]:
        """Write everything beside the shards, config.json last. Returns the manifest's summary."""
        shards = [self.finished[s.file] for s in self.plan.shards]
        files = {name: read_side_file(self.checkpoint, name, self.plan) for name in copied}
        tensors = {name: entry for shard in shards for name, entry in shard.tensors.items()}
        contents = {
            INDEX_NAME: lambda: index_file(tensors),
            CONFIG_NAME: lambda: config_file(self.checkpoint, self.plan, some_kept=bool(self.kept_tensors())),
        }
        last = {name: contents[name]() for name in index_names(self.plan)}
        manifest = make_manifest(job, shards, {**files, **last}, self.kept_tensors())
        for name, data in {**files, MANIFEST_NAME: dump_manifest(manifest), **last}.items():
            advance(0)
            write_file(self.output / name, data)
        return dict(manifest["summary"])


def _unfinished_bytes(run: _Run) -> int:
    """On disk, of this run's shards that were stopped half way; the next run removes them."""
    return sum(path.stat().st_size for path in leftovers(run.output, [shard.file for shard in run.shards]))


def _convert_shards(run: _Run, journal: Journal, advance: Progress) -> int:
    """Write what is not finished yet. Returns how many shards were written."""
    pending = run.pending
    storage = run.checkpoint.storage
    try:
        for shard, after in zip_longest(pending, pending[1:]):
            storage.prepare(shard.source_shards, after.source_shards if after else ())
            run.write(shard, journal, advance)
        storage.prepare(())
    except Interrupted as error:
        error.args = (f"interrupted: {len(run.finished)} of {len(run.shards)} shards are finished and kept",)
        left = _unfinished_bytes(run)
        removed = f" It removes the {left} bytes of a shard that was not finished." if left else ""
        error.hint = f"Run the same command again to continue.{removed}"
        raise
    return len(pending)


def _work(run: _Run, result: Result, advance: Progress) -> None:
    job = describe_job(run.checkpoint, run.plan.settings)
    copied = copied_files(run.checkpoint, run.plan)
    run.resume(job, advance)
    run.check_complete()
    result.shards_reused = len(run.finished)
    check_disk(run.checkpoint, sum(shard.size for shard in run.pending), run.output)
    journal = Journal(run.output, job, files_of(run.plan, copied), run.part.tag if run.part else "")
    try:
        result.shards_written = _convert_shards(run, journal, advance)
        result.kept_tensors = run.kept_tensors()
        if run.part is None:
            result.summary = run.publish(job, copied, advance)
    except BaseException:
        # A journal without shards would only bind the next run to this one's options. Look at the folder: a run
        # may be stopped between a shard's rename and its line in the journal.
        begun = any((run.output / shard.file).exists() for shard in run.shards)
        journal.close() if begun else journal.discard()
        raise
    journal.close()
    if run.part is None:
        remove_journals(run.output)
        remove_scratch_of_parts(run.output)
    result.output_bytes = sum(shard.size for shard in run.finished.values())


def _already_done(checkpoint: Checkpoint, plan: Plan, output: Path, manifest: dict[str, Any]) -> Result:
    check_finished(output, manifest, describe_job(checkpoint, plan.settings), checkpoint)
    remove_stale_lock(output)
    size = sum(entry["size"] for entry in manifest["shards"].values())
    return Result(
        output,
        plan,
        already_done=True,
        shards_reused=len(plan.shards),
        output_bytes=size,
        summary=dict(manifest["summary"]),
        kept_tensors=list(manifest["kept_tensors"]),
    )


def _clear(output: Path, plan: Plan, checkpoint: Checkpoint) -> None:
    found = look(output)
    check_in_the_way(output, found, files_of(plan, copied_files(checkpoint, plan)))
    clear(output, found)


def clear_output(checkpoint: Checkpoint, plan: Plan, output: Path) -> None:
    """Remove a former conversion, for runs that share the work and cannot each do it. Errors as in `run_conversion`."""
    if output.is_dir():
        with locked(output):
            _clear(output, plan, checkpoint)


def check_part(
    checkpoint: Checkpoint,
    plan: Plan,
    output: Path,
    resources: Resources,
    part: Part,
    advance: Progress = ignore,
) -> list[str]:
    """Read what a part has written again. Names of its shards that are whole, and made from what the source is now."""
    past = read_journal(output)
    if past is None:
        return []
    with ThreadPoolExecutor(resources.workers) as pool:
        return list(usable_shards(output, past, deal(plan, part.count)[part.index], checkpoint, pool, advance))


def run_conversion(
    checkpoint: Checkpoint,
    plan: Plan,
    output: Path,
    resources: Resources,
    overwrite: bool = False,
    advance: Progress = ignore,
    part: Part | None = None,
    finish: bool = False,
    confirmed: Collection[str] = (),
) -> Result:
    """Convert an opened checkpoint into `output` as planned, or continue doing so, or find it done.

    advance: counts data bytes as they are written, or found whole from a former run; they add up to the data of
    the plan (or of the part).
    part: write only this part's shards; a run without `part` (with `finish`, one that writes no shards) publishes.
    confirmed: finished shards that another process has just read again (see `check_part`).
    Raises Dsv4Error: UsageError for a folder that is not ours or holds another conversion, InputError for a source
    that is not what it claims, MachineError for disk and lock, Interrupted on a signal.
    """
    started = time.monotonic()
    if isinstance(checkpoint.storage, Folder):
        check_separate(checkpoint.storage.path, output)
    if overwrite and (part or finish):
        raise UsageError("--overwrite does not go with parts", "Remove the former output first.")
    check_configs(checkpoint, plan)
    found = look(output)
    if found.manifest is not None and not overwrite:
        return _already_done(checkpoint, plan, output, found.manifest)
    result, run = Result(output, plan), _Run(checkpoint, plan, output, resources, part, finish, confirmed)
    if overwrite or not found.journal:  # a continued run is checked when it is known what of it can be used
        missing = 0 if finish else sum(shard.size for shard in run.shards)
        check_disk(checkpoint, missing - owned_bytes(output, found) - _unfinished_bytes(run), output)
    create_folder(output)
    try:
        with locked(output, part.tag if part else ""):
            remove_leftovers(output, [shard.file for shard in run.shards] if part else ("*",))
            if overwrite:
                _clear(output, plan, checkpoint)
            _work(run, result, advance)
    finally:
        for threads in (run.pool, run.hasher, run.writer):
            threads.shutdown(wait=True, cancel_futures=True)
    result.seconds = time.monotonic() - started
    return result


def convert(
    source: Path | str,
    output: Path | str,
    *,
    to: To = "fp8",
    layout: Layout = "hf",
    model_parallel: int | None = None,
    target: TargetName | None = None,
    scale_dtype: ScaleDtype | None = None,
    wo_a: WoA | None = None,
    on_inexact: OnInexact = "error",
    max_shard_size: int = DEFAULT_MAX_SHARD_BYTES,
    max_workers: int | None = None,
    max_memory: int | None = None,
    overwrite: bool = False,
    progress: Progress = ignore,
) -> Result:
    """`dsv4 convert SOURCE OUTPUT` as a function, with the same options, defaults and errors.

    source, output: folders; the output is new, empty or an unfinished conversion of the same kind, which is continued.
    max_shard_size, max_memory: bytes. progress: called with the number of bytes just written, or 0; what it raises ends
    the conversion.
    Returns a `Result`: `already_done`, `summary` (blocks, spans, what was inexact), `kept_tensors`, `to_json()`.
    Raises UsageError for options that do not fit, InputError for a bad source or a block without an exact form,
    MachineError for disk, permission or a lock.
    """
    settings = resolve(
        to,
        layout=layout,
        model_parallel=model_parallel,
        target=target,
        scale_dtype=scale_dtype,
        wo_a=wo_a,
        on_inexact=on_inexact,
        max_shard_bytes=max_shard_size,
    )
    checkpoint = Checkpoint.open(source)
    try:
        resources = decide_resources(max_workers, max_memory)
        plan = make_plan(checkpoint, settings)
        return run_conversion(checkpoint, plan, Path(output), resources, overwrite, progress)
    finally:
        checkpoint.close()
