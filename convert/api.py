"""`dsv4 convert` as a Python function, and what the command line shares with it: opening the source, and the plan."""

from contextlib import closing
from pathlib import Path

from dsv4.convert.checkpoint.editions.table import require_known_edition
from dsv4.convert.checkpoint.rank_files import open_checkpoint
from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.hub.open import DEFAULT_SCRATCH, HubOptions
from dsv4.convert.hub.storage import HubStorage, open_storage
from dsv4.convert.plan.engines import Layout, ScaleDtype, TargetName, To, WoA
from dsv4.convert.plan.input_scale import read_input_scale
from dsv4.convert.plan.partition import Part, Work, parse_work, share_of
from dsv4.convert.plan.plan import make_plan
from dsv4.convert.plan.settings import Dense, OnInexact, Settings, check_count, resolve
from dsv4.convert.write.atomic_file import SCRATCH_NAME
from dsv4.convert.write.run import Job, Result, check_job, run_conversion
from dsv4.convert.write.shards.resources import decide_resources
from dsv4.machine import parse_size, usable_cores
from dsv4.progress import Progress, ignore


def open_job(
    source: str,
    output: Path,
    settings: Settings,
    work: Work,
    hub: HubOptions,
    *,
    revision: str | None = None,
    any_model: bool = False,
    cores: int | None = None,
    max_workers: int | None = None,
    max_memory: int | None = None,
) -> Job:
    """Open the source, which the caller closes (`job.checkpoint.close()`), and plan its conversion.

    source: a folder, `hf:org/name` or `ms:org/name`. cores, max_workers: threads, by default one for each core that
    may be used. max_memory: bytes. Raises UsageError, InputError and MachineError, and has closed the source then.
    """
    scratch = f"{SCRATCH_NAME}-{work.tag}" if isinstance(work, Part) else SCRATCH_NAME
    storage = open_storage(source, revision, output / scratch, hub)
    try:
        # Rank files are read from folders only: on a hub every shard would need all of them at once.
        opened = Checkpoint.open if isinstance(storage, HubStorage) else open_checkpoint
        checkpoint = opened(storage, hub.headers)
        if not any_model:
            require_known_edition(checkpoint.config)
        plan = make_plan(checkpoint, settings)
        resources = decide_resources(plan, cores or usable_cores(), max_workers, max_memory)
        if isinstance(storage, HubStorage):
            storage.check_needs([shard.source_shards for shard in plan.shards])
    except BaseException:
        storage.close()
        raise
    return Job(checkpoint, plan, output, resources)


def convert(
    source: Path | str,
    output: Path | str,
    *,
    to: To = "fp8", layout: Layout = "hf", model_parallel: int | None = None,
    target: TargetName | None = None, scale_dtype: ScaleDtype | None = None, wo_a: WoA | None = None,
    on_inexact: OnInexact = "error", dense: Dense = "bf16",
    input_scale: float | str | Path | None = None, max_shard_size: int | str = "5GB",
    max_workers: int | None = None, max_memory: int | str | None = None,
    overwrite: bool = False, any_model: bool = False,
    part: str | None = None, finish: bool = False, dry_run: bool = False,
    revision: str | None = None, token: str | None = None, cache_dir: Path | str | None = None,
    scratch: int = DEFAULT_SCRATCH, keep_source: bool = False,
    progress: Progress = ignore,
) -> Result:  # fmt: skip
    """`dsv4 convert SOURCE OUTPUT` as a function, with the same options, defaults and errors.

    source: a folder, "hf:org/name" or "ms:org/name". output: a folder, new, empty or an unfinished conversion of the
    same kind, which is continued. max_shard_size, max_memory: bytes, or text such as "5GB".
    any_model: also convert a checkpoint that is not DeepSeek-V4's, by dtypes and names alone.
    input_scale: of --to nvfp4, a number or a file.
    part: "2/8" writes the second of eight shares of the shards; finish: check what all parts wrote and publish it.
    dry_run: only plan. revision, token, cache_dir, scratch, keep_source: of a source on a hub; scratch is the most
    shards of it that are on disk at once. progress: called with the bytes of output that were scanned and written (half
    each) since the last call; what it raises ends the conversion.
    Returns a `Result`: `already_done`, `summary` (blocks, spans, what was inexact), `kept_tensors`, `plan`, and
    `to_json()`.
    Raises UsageError for options that have other values or do not fit, InputError for a bad source or a block without
    an exact form, MachineError for disk, permission, a lock or the network.
    """
    settings = resolve(
        to,
        layout=layout,
        model_parallel=model_parallel,
        target=target,
        scale_dtype=scale_dtype,
        wo_a=wo_a,
        on_inexact=on_inexact,
        dense=dense,
        input_scale=None if input_scale is None else read_input_scale(input_scale),
        max_shard_bytes=parse_size(max_shard_size),
    )
    for option, count in (("--max-workers", max_workers), ("--scratch", scratch)):
        if count is not None:
            check_count(option, count)
    memory = None if max_memory is None else parse_size(max_memory)
    work = parse_work(part, finish, overwrite)
    hub = HubOptions(token, None if cache_dir is None else Path(cache_dir), scratch, keep_source)
    job = open_job(
        str(source), Path(output), settings, work, hub,
        revision=revision, any_model=any_model, max_workers=max_workers, max_memory=memory,
    )  # fmt: skip
    with closing(job.checkpoint):
        if dry_run:
            check_job(job)
            plan = share_of(job.plan, work)
            return Result(job.output, plan, output_bytes=plan.output_bytes, dry_run=True)
        return run_conversion(job, work, progress)
