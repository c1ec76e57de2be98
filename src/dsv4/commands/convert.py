"""`dsv4 convert SOURCE OUTPUT`."""

import shlex
from collections.abc import Collection
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsv4 import output, signals
from dsv4.convert.checkpoint.names import draft_stages
from dsv4.convert.plan.engines import Layout, ScaleDtype, Stored, TargetName, WoA, caveats_of
from dsv4.convert.plan.settings import OnInexact, Settings, To, resolve
from dsv4.errors import UsageError, printable
from dsv4.machine import free_bytes, peak_memory
from dsv4.opening import opening
from dsv4.options import (
    CacheDir,
    Json,
    MaxMemory,
    MaxWorkers,
    Quiet,
    Revision,
    Scratch,
    Token,
    Verbose,
    as_folder,
    example,
    named,
    parse_size,
)
from dsv4.text import aligned, human_bytes, human_seconds

if TYPE_CHECKING:
    from dsv4.convert.checkpoint.reader import Checkpoint
    from dsv4.convert.checkpoint.storage import Storage
    from dsv4.convert.plan.partition import Part
    from dsv4.convert.plan.plan import Plan
    from dsv4.convert.write.resources import Resources
    from dsv4.convert.write.run import Result
    from dsv4.distributed import Ranks

EPILOG = example(
    "dsv4 convert ./DeepSeek-V4-Flash ./Flash-FP8",
    "dsv4 convert ./DeepSeek-V4-Flash ./Flash-FP8 --target vllm --dry-run",
    "dsv4 convert ./DeepSeek-V4-Flash ./Flash-mp8 --layout mp --model-parallel 8",
    "dsv4 convert hf:deepseek-ai/DeepSeek-V4-Flash ./Flash-FP8",
    "torchrun --nproc-per-node 4 -m dsv4 convert ./DeepSeek-V4-Pro ./Pro-FP8",
)


def _check_remote(storage: "Storage", plan: "Plan") -> dict[str, Any]:
    """What reading from a hub takes, {} for a folder. Raises UsageError if --scratch is too little for the plan."""
    from dsv4.convert.hub.storage import HubStorage

    if not isinstance(storage, HubStorage):
        return {}
    storage.check_needs([shard.source_shards for shard in plan.shards])
    source = storage.identity()
    return {
        "source": f"{source['hub']}:{source['repository']}@{source['commit']}",
        "scratch_bytes": storage.disk_bytes(),
        "seconds_to_fetch": round(storage.seconds_to_fetch(), 1),
    }


def _remote_rows(remote: dict[str, Any]) -> list[tuple[str, str, str]]:
    if not remote:
        return []
    time = human_seconds(remote["seconds_to_fetch"])
    return [
        ("fetched from", "", remote["source"]),
        ("scratch disk", human_bytes(remote["scratch_bytes"]), "beside the output"),
        ("time to fetch", time, "if it goes on as fast as the headers came"),
    ]


def _print_plan(out: output.Output, plan: "Plan", resources: "Resources", free: int, remote: dict[str, Any]) -> None:
    needed = plan.output_bytes + remote.get("scratch_bytes", 0)
    tensors = sum(len(shard.tensors) for shard in plan.shards)
    rows = [
        ("source", human_bytes(plan.source_bytes), f"{plan.source_bytes:,} bytes"),
        ("output", human_bytes(plan.output_bytes), f"{plan.output_bytes:,} bytes"),
        ("shards", str(len(plan.shards)), f"{tensors:,} tensors"),
        ("free disk", human_bytes(free), "enough" if free > needed else "TOO LITTLE"),
        ("peak memory", human_bytes(resources.peak_memory_bytes), f"{resources.workers} workers"),
        *_remote_rows(remote),
    ]
    for line in aligned(rows, right=[1]):
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
            **remote,
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


# What has room for every value, by what a conversion was to.
INSTEAD = {
    "fp8": "--to bf16 or --on-inexact round",
    "bf16": "--on-inexact round",
    "fp4": "--on-inexact round",
}


def _warn_of_mixture(out: output.Output, result: "Result") -> None:
    """What --on-inexact keep leaves behind: true to the value, and of no use to an engine."""
    settings, count = result.plan.settings, len(result.kept_tensors)
    if not count or settings.to == "same":
        return
    out.warn(f"{count} tensors kept their format among {settings.to.upper()} ones: no config.json can describe that")
    out.warn("engines decide once for all experts: they will refuse this output or compute something else with it")
    out.warn("dsv4 verify will find all values equal, and the config at fault where it names a format (exit code 1)")
    out.say(f"dsv4 run reads it as it is; for an engine convert again, with {INSTEAD[settings.to]}")


def _warn(out: output.Output, result: "Result", traps: tuple[str, ...]) -> None:
    summary = result.summary
    if summary["moved_blocks"]:
        out.say(f"{summary['moved_blocks']:,} blocks needed another scale than the reference converter's")
    if summary["nan_codes"]:
        out.warn(f"{summary['nan_codes']:,} E4M3 NaN codes were copied: the source holds them")
    for name in result.kept_tensors[:10]:
        out.warn(f"kept: {printable(name)}")
    if len(result.kept_tensors) > 10:
        out.warn(f"kept: and {len(result.kept_tensors) - 10} more, which --json and dsv4.json name")
    _warn_of_mixture(out, result)
    for note in (*result.plan.notes, *traps):
        out.warn(note)


def _print_result(out: output.Output, result: "Result", source: str, traps: tuple[str, ...]) -> None:
    next_step = f"prove it: {printable(shlex.join(['dsv4', 'verify', source, str(result.output)]))}"
    if result.already_done:
        out.say(f"nothing to do: {printable(str(result.output))} is complete and from this source")
        out.hint(next_step)
        return
    seconds = max(result.seconds, 1e-9)
    rate = human_bytes(result.output_bytes / seconds)
    out.say(
        f"{human_bytes(result.plan.source_bytes)} -> {human_bytes(result.output_bytes)} in {len(result.plan.shards)} "
        f"shards, {human_seconds(seconds)}, {rate}/s, peak memory {human_bytes(peak_memory())}"
    )
    if result.shards_reused:
        out.say(f"{result.shards_reused} shards were there already and are whole")
    out.say(_verdict(result.summary, result.kept_tensors))
    _warn(out, result, traps)
    out.hint(next_step)


def _print_part(out: output.Output, result: "Result", share: "Part") -> None:
    out.say(
        f"part {share.index + 1} of {share.count}: {result.shards_written} shards written, {result.shards_reused} were "
        f"there, {human_bytes(result.output_bytes)} in {human_seconds(result.seconds)}"
    )
    out.hint("when every part is done: the same command with --finish instead of --part")
    out.result({**result.to_json(), "peak_memory_bytes": peak_memory(), "part": share.index + 1, "parts": share.count})


@dataclass(frozen=True)
class _Job:
    """A conversion, ready to run."""

    out: output.Output
    checkpoint: "Checkpoint"
    plan: "Plan"
    output_folder: Path
    resources: "Resources"

    def run(self, share: "Part | None", finish: bool, overwrite: bool, confirmed: Collection[str] = ()) -> "Result":
        """All of it, one share of it, or only the end of it, in this process."""
        from dsv4.convert.plan.partition import deal
        from dsv4.convert.write.run import run_conversion

        shards = deal(self.plan, share.count)[share.index] if share else self.plan.shards
        folder = self.output_folder
        with self.out.progress(sum(shard.data_bytes for shard in shards), "convert") as bar:
            result = run_conversion(
                self.checkpoint, self.plan, folder, self.resources, overwrite, bar.advance, share, finish, confirmed
            )
            if result.already_done:
                bar.vanish()
        return result

    def check(self, part: "Part") -> list[str]:
        """Names of a part's shards that are whole, read again with a bar."""
        from dsv4.convert.plan.partition import deal
        from dsv4.convert.write.run import check_part

        total = sum(shard.data_bytes for shard in deal(self.plan, part.count)[part.index])
        with self.out.progress(total, "check") as bar:
            return check_part(self.checkpoint, self.plan, self.output_folder, self.resources, part, bar.advance)

    def run_as_rank(self, ranks: "Ranks", share: "Part", overwrite: bool) -> "Result":
        """This rank's share; when all are done, each reads its neighbour's again, and the first rank publishes.

        The neighbour's and not its own: what another machine reads is on the shared disk, and not only in a cache.
        """
        from dsv4.convert.plan.partition import Part
        from dsv4.convert.write.run import clear_output
        from dsv4.distributed import process_group

        with process_group(ranks):
            if overwrite:
                if ranks.is_first:
                    clear_output(self.checkpoint, self.plan, self.output_folder)
                ranks.barrier()
            result = self.run(share, finish=False, overwrite=False)
            written, seconds = zip(*ranks.gather((result.shards_written, result.seconds)), strict=True)
            whole: list[str] = []
            if not result.already_done:
                whole = self.check(Part((share.index + 1) % share.count, share.count))
            confirmed = [file for files in ranks.gather(whole) for file in files]
            if ranks.is_first and not result.already_done:
                result = self.run(None, finish=True, overwrite=False, confirmed=confirmed)
                result.shards_written, result.seconds = sum(written), max(seconds) + result.seconds
                result.shards_reused = len(self.plan.shards) - sum(written)
            ranks.barrier()
        return result


def _caveats(checkpoint: "Checkpoint", settings: Settings) -> tuple[str, ...]:
    """What to know before starting the target's engine on FP8 experts."""
    if settings.layout != "hf" or settings.to != "fp8":
        return ()
    mtp = bool(draft_stages(checkpoint.tensors))
    stored = Stored(layout="hf", experts={"fp8"}, wo_a={settings.wo_a or ""}, quantized=True, mtp=mtp)
    return tuple(caveat.text for caveat in caveats_of(settings.target, stored))


def convert(
    source: Annotated[
        str, typer.Argument(parser=named, metavar="SOURCE", help="Folder, org/name, hf:org/name or ms:org/name.")
    ],
    output_folder: Annotated[
        Path, typer.Argument(parser=as_folder, metavar="OUTPUT", help="Folder to write; new, empty or ours.")
    ],
    to: Annotated[
        To,
        typer.Option(
            help="fp8: routed experts to FP8. bf16: all to BF16. fp4: FP8 experts to FP4. same: no numbers change."
        ),
    ] = "fp8",
    layout: Annotated[
        Layout, typer.Option(help="hf: one Hugging Face folder. mp: the reference engine's rank files.")
    ] = "hf",
    model_parallel: Annotated[int | None, typer.Option(metavar="N", min=1, help="Ranks of --layout mp.")] = None,
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
    revision: Revision = None,
    cache_dir: CacheDir = None,
    scratch: Scratch = 2,
    keep_source: Annotated[
        bool, typer.Option("--keep-source", help="Leave a hub's shards in its library's cache.")
    ] = False,
    token: Token = None,
    part: Annotated[
        str | None, typer.Option(metavar="I/N", help="Write only the I-th of N shares of the shards; then --finish.")
    ] = None,
    finish: Annotated[
        bool, typer.Option("--finish", help="Check what all parts wrote, and publish index, config and manifest.")
    ] = False,
    max_workers: MaxWorkers = None,
    max_memory: MaxMemory = None,
    json_mode: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Convert a DeepSeek-V4 checkpoint: FP4 experts to FP8 without changing a value, or to BF16, or back.

    Interrupted, the same command continues and ends in the same bytes. A source on a hub is streamed: the plan comes
    from its headers, and only --scratch of its shards are on disk at once.
    """
    from dsv4.distributed import torchrun_rank

    ranks = torchrun_rank()
    out = output.configure(json_mode, quiet, verbose, ranks)
    if (part or finish) and (ranks or (part and finish)):
        raise UsageError("--part, --finish and torchrun are three ways to share the work", "Use one of them.")
    from dsv4.convert.checkpoint.reader import Checkpoint
    from dsv4.convert.hub.open import HubOptions
    from dsv4.convert.hub.storage import open_storage
    from dsv4.convert.plan.partition import Part, parse_part
    from dsv4.convert.plan.plan import make_plan
    from dsv4.convert.write.atomic_file import SCRATCH_NAME
    from dsv4.convert.write.resources import decide_resources

    settings = resolve(
        to,
        layout=layout,
        model_parallel=model_parallel,
        target=target,
        scale_dtype=scale_dtype,
        wo_a=wo_a,
        on_inexact=on_inexact,
        max_shard_bytes=parse_size(max_shard_size),
    )
    max_workers = max_workers or (ranks.workers if ranks else None)
    resources = decide_resources(max_workers, parse_size(max_memory) if max_memory else None)
    share = Part(ranks.index, ranks.count) if ranks else parse_part(part) if part else None
    scratch_folder = output_folder / (f"{SCRATCH_NAME}-{share.tag}" if share else SCRATCH_NAME)
    with ExitStack() as stack:
        with opening(out) as headers:
            options = HubOptions(token, cache_dir, scratch, keep_source, out.warn, out.detail, headers, signals.look)
            storage = stack.enter_context(closing(open_storage(source, revision, scratch_folder, options)))
            checkpoint = Checkpoint.open(storage, headers)
            plan = make_plan(checkpoint, settings)
        remote = _check_remote(storage, plan)
        if dry_run:
            _print_plan(out, plan, resources, free_bytes(output_folder), remote)
            return
        signals.begin_work()
        job = _Job(out, checkpoint, plan, output_folder, resources)
        result = job.run_as_rank(ranks, share, overwrite) if ranks and share else job.run(share, finish, overwrite)
    if share and (ranks is None or not ranks.is_first):
        _print_part(out, result, share)
        return
    source = remote["source"] if remote else source
    traps = _caveats(checkpoint, settings)
    _print_result(out, result, source, traps)
    out.result({**result.to_json(), "peak_memory_bytes": peak_memory(), "traps": list(traps)})
