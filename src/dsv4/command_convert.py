"""`dsv4 convert SOURCE OUTPUT`."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsv4 import output
from dsv4.convert.settings import TARGETS, Layout, OnInexact, ScaleDtype, TargetName, To, WoA, resolve
from dsv4.errors import printable
from dsv4.options import Json, MaxMemory, MaxWorkers, Quiet, Verbose, example, parse_size
from dsv4.output import human_bytes, human_seconds

if TYPE_CHECKING:
    from dsv4.convert.conversion import Resources, Result
    from dsv4.convert.plan import Plan

EPILOG = example(
    "dsv4 convert ./DeepSeek-V4-Flash ./Flash-FP8",
    "dsv4 convert ./DeepSeek-V4-Flash ./Flash-FP8 --target vllm --dry-run",
    "dsv4 convert ./DeepSeek-V4-Flash ./Flash-mp8 --layout mp --model-parallel 8",
)


def _print_plan(out: output.Output, plan: "Plan", resources: "Resources", free: int) -> None:
    tensors = sum(len(shard.tensors) for shard in plan.shards)
    rows = [
        ("source", human_bytes(plan.source_bytes), f"{plan.source_bytes:,} bytes"),
        ("output", human_bytes(plan.output_bytes), f"{plan.output_bytes:,} bytes"),
        ("shards", str(len(plan.shards)), f"{tensors:,} tensors"),
        ("free disk", human_bytes(free), "enough" if free > plan.output_bytes else "TOO LITTLE"),
        ("peak memory", human_bytes(resources.peak_memory_bytes), f"{resources.workers} workers"),
    ]
    for line in output.aligned(rows, right=[1]):
        out.text(line)
    for shard in plan.shards:
        out.detail(f"{shard.file}  {human_bytes(shard.size)}  {len(shard.tensors)} tensors")
    for note in plan.notes:
        out.warn(note)
    out.result(
        {
            "dry_run": True,
            "source_bytes": plan.source_bytes,
            "output_bytes": plan.output_bytes,
            "shards": len(plan.shards),
            "tensors": tensors,
            "peak_memory_bytes": resources.peak_memory_bytes,
            "free_bytes": free,
            "options": plan.settings.to_json(),
            "files": {shard.file: shard.size for shard in plan.shards},
            "notes": list(plan.notes),
        }
    )


def _verdict(summary: dict[str, int], kept: list[str]) -> str:
    if kept:
        return f"{len(kept)} tensors have no exact form and were kept as they are"
    if summary["inexact_blocks"] or summary["changed_elements"]:
        return f"NOT exact: {summary['changed_elements']:,} elements were rounded (--on-inexact round)"
    if summary["blocks"]:
        return f"every block exact: {summary['blocks']:,} blocks, scales span at most 2^{summary['max_span']}"
    return "every value exact"


def _warn(out: output.Output, result: "Result", traps: tuple[str, ...]) -> None:
    summary = result.summary
    if summary["moved_blocks"]:
        out.say(f"{summary['moved_blocks']:,} blocks needed another scale than the reference converter's")
    if summary["nan_codes"]:
        out.warn(f"{summary['nan_codes']:,} E4M3 NaN codes were copied: the source holds them")
    for name in result.kept_tensors[:10]:
        out.warn(f"kept: {printable(name)}")
    if result.kept_tensors and result.plan.settings.to != "same":
        out.warn("no engine is known to load a mixture of expert formats")
    for note in (*result.plan.notes, *traps):
        out.warn(note)


def _print_result(out: output.Output, result: "Result", source: str, traps: tuple[str, ...], peak: int) -> None:
    if result.already_done:
        out.say(f"nothing to do: {printable(str(result.output))} is complete and from this source")
        return
    seconds = max(result.seconds, 1e-9)
    rate = human_bytes(result.output_bytes / seconds)
    out.say(
        f"{human_bytes(result.plan.source_bytes)} -> {human_bytes(result.output_bytes)} in {len(result.plan.shards)} "
        f"shards, {human_seconds(seconds)}, {rate}/s, peak memory {human_bytes(peak)}"
    )
    if result.shards_reused:
        out.say(f"{result.shards_reused} shards were there already, from an interrupted run")
    out.say(_verdict(result.summary, result.kept_tensors))
    _warn(out, result, traps)
    out.hint(f"prove it: {printable(shlex.join(['dsv4', 'verify', source, str(result.output)]))}")


def convert(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Folder of a checkpoint.")],
    output_folder: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder to write; new, empty or ours.")],
    to: Annotated[
        To,
        typer.Option(
            help="fp8: routed experts to FP8. bf16: all to BF16. fp4: FP8 experts to FP4. same: no numbers change."
        ),
    ] = "fp8",
    layout: Annotated[
        Layout, typer.Option(help="hf: one Hugging Face folder. mp: the reference engine's rank files.")
    ] = "hf",
    model_parallel: Annotated[int | None, typer.Option(min=1, help="Ranks of --layout mp.")] = None,
    target: Annotated[TargetName | None, typer.Option(help="Engine to write for. Default: base.")] = None,
    scale_dtype: Annotated[
        ScaleDtype | None, typer.Option(help="Dtype of FP8 block scales, instead of the target's.")
    ] = None,
    wo_a: Annotated[WoA | None, typer.Option(help="Dtype of attn.wo_a, instead of the target's.")] = None,
    on_inexact: Annotated[
        OnInexact, typer.Option(help="What to do with a block without an exact form; keep: leave its tensor as it is.")
    ] = "error",
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest output shard.")] = "5GB",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what dsv4 wrote into OUTPUT before.")] = False,
    max_workers: MaxWorkers = None,
    max_memory: MaxMemory = None,
    json_mode: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Convert a DeepSeek-V4 checkpoint: FP4 experts to FP8 without changing a value, or to BF16, or back.

    Interrupted, the same command continues and ends in the same bytes.
    """
    out = output.configure(json_mode, quiet, verbose)
    from dsv4.convert.checkpoint import Checkpoint
    from dsv4.convert.conversion import decide_resources, peak_memory_bytes, run_conversion
    from dsv4.convert.files import free_bytes
    from dsv4.convert.plan import make_plan

    settings = resolve(to, layout, model_parallel, target, scale_dtype, wo_a, on_inexact, parse_size(max_shard_size))
    resources = decide_resources(max_workers, parse_size(max_memory) if max_memory else None)
    checkpoint = Checkpoint.open(source)
    plan = make_plan(checkpoint, settings)
    if dry_run:
        _print_plan(out, plan, resources, free_bytes(output_folder))
        return
    with out.progress(sum(shard.data_bytes for shard in plan.shards), "convert") as progress:
        result = run_conversion(checkpoint, settings, output_folder, resources, overwrite, progress.advance)
    traps = TARGETS[settings.target].traps if settings.layout == "hf" and settings.to == "fp8" else ()
    _print_result(out, result, source, traps, peak_memory_bytes())
    out.result({**result.to_json(), "traps": list(traps)})
