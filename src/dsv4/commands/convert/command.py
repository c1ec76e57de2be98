"""`dsv4 convert SOURCE OUTPUT`: in one process, as one part of several, or as the ranks of a launcher."""

from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import typer

from dsv4 import output, signals
from dsv4.errors import EXIT_MACHINE, UsageError
from dsv4.machine import free_bytes, peak_memory, usable_cores
from dsv4.options import command, example

from .options import ConvertOptions
from .words import engine_caveats, print_part, print_plan, print_result

if TYPE_CHECKING:
    from dsv4.commands.distributed import Ranks
    from dsv4.convert.plan.partition import Part, Work
    from dsv4.convert.plan.settings import Settings
    from dsv4.convert.write.run import Job, Result

EPILOG = example(
    "dsv4 convert ./DeepSeek-V4-Flash ./Flash-FP8",
    "dsv4 convert ./DeepSeek-V4-Flash ./Flash-FP8 --target vllm --dry-run",
    "dsv4 convert ./DeepSeek-V4-Flash ./Flash-mp8 --layout mp --model-parallel 8",
    "dsv4 convert hf:deepseek-ai/DeepSeek-V4-Flash ./Flash-FP8",
    "torchrun --nproc-per-node 4 -m dsv4 convert ./DeepSeek-V4-Pro ./Pro-FP8",
)


def _remote(job: "Job") -> dict[str, Any]:
    """Repository, disk and time for a source on a hub, {} for a folder."""
    from dsv4.convert.hub.storage import HubStorage

    storage = job.checkpoint.storage
    if not isinstance(storage, HubStorage):
        return {}
    source = storage.identity()
    names = {name for shard in job.plan.shards for name in shard.source_shards}
    fetched = sum(job.checkpoint.shards[name].size for name in names)
    return {
        "source": f"{source['hub']}:{source['repository']}@{source['commit']}",
        "scratch_bytes": storage.disk_bytes(),
        "seconds_to_fetch": round(storage.seconds_for(fetched), 1),
    }


@dataclass(frozen=True)
class _Conversion:
    """A conversion, ready to run, with bars."""

    job: "Job"
    out: output.Output

    def run(self, work: "Work") -> "Result":
        """Run all or part of it in this process."""
        from dsv4.convert.plan.partition import shards_of
        from dsv4.convert.write.run import run_conversion

        total = sum(shard.data_bytes for shard in shards_of(self.job.plan, work))
        with self.out.progress(total, "convert") as bar:
            result = run_conversion(self.job, work, bar.advance)
            if result.already_done:
                bar.vanish()
        return result

    def check(self, part: "Part") -> list[str]:
        """Read a part's shards again. Returns the names of the whole ones."""
        from dsv4.convert.plan.partition import shards_of
        from dsv4.convert.write.run import check_part

        total = sum(shard.data_bytes for shard in shards_of(self.job.plan, part))
        with self.out.progress(total, "check") as bar:
            return check_part(self.job, part, bar.advance)

    def run_as_rank(self, ranks: "Ranks", overwrite: bool) -> "Result":
        """Write this rank's part. Then each rank reads its neighbour's part again, and the first rank publishes.

        The neighbour's and not its own: another machine reads the shared disk and not the writer's cache.
        """
        from dsv4.commands.distributed import process_group
        from dsv4.convert.plan.partition import Part, Publish
        from dsv4.convert.write.run import clear_output

        with process_group(ranks):
            if overwrite:
                if ranks.is_first:
                    clear_output(self.job)
                ranks.barrier()
            result = self.run(Part(ranks.index, ranks.count))
            written, seconds = zip(*ranks.gather((result.shards_written, result.seconds)), strict=True)
            whole: list[str] = []
            if not result.already_done:
                whole = self.check(Part((ranks.index + 1) % ranks.count, ranks.count))
            confirmed = frozenset(file for files in ranks.gather(whole) for file in files)
            if ranks.is_first and not result.already_done:
                result = self.run(Publish(confirmed))
                result.shards_written, result.seconds = sum(written), max(seconds) + result.seconds
                result.shards_reused = len(self.job.plan.shards) - sum(written)
            ranks.barrier()
        return result


def _work(options: ConvertOptions, ranks: "Ranks | None") -> "Work":
    """The work of this process. Raises UsageError for options that share the work in two ways."""
    from dsv4.convert.plan.partition import All, Part, parse_work

    work = parse_work(options.part, options.finish, options.overwrite)
    if ranks is None:
        return work
    if not isinstance(work, All):
        raise UsageError("--part, --finish and torchrun are three ways to share the work", "Use one of them.")
    return Part(ranks.index, ranks.count)


def _open(options: ConvertOptions, settings: "Settings", work: "Work", cores: int, out: output.Output) -> "Job":
    """The source and the plan, with a bar over the headers."""
    from dsv4.convert.api import open_job
    from dsv4.convert.hub.open import HubOptions

    with out.opening() as headers:
        hub = HubOptions(
            options.token, options.cache_dir, options.scratch, options.keep_source, out.warn, out.detail, headers,
            signals.look,
        )  # fmt: skip
        return open_job(
            options.source, options.output_folder, settings, work, hub,
            revision=options.revision, any_model=options.any_model,
            cores=cores, max_workers=options.max_workers, max_memory=options.memory(),
        )  # fmt: skip


@command
def convert(options: ConvertOptions) -> None:
    """Convert a DeepSeek-V4 checkpoint: FP4 experts to FP8 without changing a value, or to BF16, or back.

    Interrupted, the same command continues and ends in the same bytes. A source on a hub is streamed: the plan comes
    from its headers, and only --scratch of its shards are on disk at once.
    """
    from dsv4.commands.distributed import torchrun_rank
    from dsv4.convert.hub.source import existing_source

    ranks = torchrun_rank()
    out = output.configure(options.json, options.quiet, options.verbose, ranks)
    existing_source(options.source, options.revision)
    settings, work = options.settings(), _work(options, ranks)
    options.memory()
    from dsv4.convert.plan.partition import Part, share_of
    from dsv4.convert.write.estimate import measure  # imports NumPy: after what can be wrong
    from dsv4.convert.write.run import check_job
    from dsv4.convert.write.shards.resources import keep_freed_memory

    job = _open(options, settings, work, ranks.workers if ranks else usable_cores(), out)
    with closing(job.checkpoint):
        share = replace(job, plan=share_of(job.plan, work))
        remote = _remote(share)
        if options.dry_run:
            check_job(job)
            rates = measure(job.checkpoint, share.plan, options.output_folder)
            if not print_plan(out, share, work, free_bytes(options.output_folder), remote, rates):
                raise typer.Exit(EXIT_MACHINE)
            return
        signals.begin_work()
        keep_freed_memory()
        conversion = _Conversion(job, out)
        result = conversion.run_as_rank(ranks, options.overwrite) if ranks else conversion.run(work)
    if isinstance(work, Part) and (ranks is None or not ranks.is_first):
        print_part(out, result, work)
        return
    known = engine_caveats(job.checkpoint, job.plan.settings)
    print_result(out, result, remote["source"] if remote else options.source, known)
    out.result({**result.to_json(), "peak_memory_bytes": peak_memory(), "traps": list(known)})
