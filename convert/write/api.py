"""`dsv4 convert` as a Python function."""

from pathlib import Path

from dsv4.convert.checkpoint.editions.table import require_known_edition
from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.plan.engines import Layout, ScaleDtype, TargetName, WoA
from dsv4.convert.plan.input_scale import read_input_scale
from dsv4.convert.plan.partition import All
from dsv4.convert.plan.plan import make_plan
from dsv4.convert.plan.settings import Dense, OnInexact, To, check_count, resolve
from dsv4.convert.write.shards.resources import decide_resources
from dsv4.machine import parse_size, usable_cores
from dsv4.progress import Progress, ignore

from .run import Job, Result, run_conversion


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
    dense: Dense = "bf16",
    input_scale: float | str | Path | None = None,
    max_shard_size: int | str = "5GB",
    max_workers: int | None = None,
    max_memory: int | str | None = None,
    overwrite: bool = False,
    any_model: bool = False,
    progress: Progress = ignore,
) -> Result:
    """`dsv4 convert SOURCE OUTPUT` as a function, with the same options, defaults and errors.

    source, output: folders; the output is new, empty or an unfinished conversion of the same kind, which is continued.
    any_model: also convert a checkpoint that is not DeepSeek-V4's, by dtypes and names alone.
    input_scale: of --to nvfp4, a number or a file.
    max_shard_size, max_memory: bytes, or text such as "5GB". progress: called with the number of bytes written since
    the last call; what it raises ends the conversion.
    Returns a `Result`: `already_done`, `summary` (blocks, spans, what was inexact), `kept_tensors`, `to_json()`.
    Raises UsageError for options that have other values or do not fit, InputError for a bad source or a block without
    an exact form, MachineError for disk, permission or a lock.
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
    if max_workers is not None:
        check_count("--max-workers", max_workers)
    memory = None if max_memory is None else parse_size(max_memory)
    checkpoint = Checkpoint.open(source)
    try:
        if not any_model:
            require_known_edition(checkpoint.config)
        plan = make_plan(checkpoint, settings)
        resources = decide_resources(plan, usable_cores(), max_workers, memory)
        return run_conversion(Job(checkpoint, plan, Path(output), resources), All(overwrite), progress)
    finally:
        checkpoint.close()
