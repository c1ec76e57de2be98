"""The output of `dsv4 convert`: the plan of a dry run, and the closing lines of a run."""

import shlex
from typing import TYPE_CHECKING, Any

from dsv4 import output
from dsv4.convert.checkpoint.names import draft_stages, is_routed_expert
from dsv4.convert.plan.engines import Stored, caveats_of
from dsv4.convert.plan.settings import CONVERSIONS, Settings
from dsv4.machine import peak_memory
from dsv4.text import aligned, counted, human_bytes, human_seconds

if TYPE_CHECKING:
    from dsv4.convert.checkpoint.reader import Checkpoint
    from dsv4.convert.plan.partition import Part, Work
    from dsv4.convert.write.estimate import Rates
    from dsv4.convert.write.run import Job, Result


def _remote_rows(remote: dict[str, Any]) -> list[tuple[str, str, str]]:
    if not remote:
        return []
    time = human_seconds(remote["seconds_to_fetch"])
    return [
        ("fetched from", "", remote["source"]),
        ("scratch disk", human_bytes(remote["scratch_bytes"]), "beside the output"),
        ("time to fetch", time, "if it goes on as fast as the headers came"),
    ]


def _time_row(seconds: float, rates: "Rates") -> tuple[str, str, str]:
    disks = [("read", rates.read), ("written", rates.write)]
    measured = [f"{human_bytes(rate)}/s {what}" for what, rate in disks if rate]
    return "time", human_seconds(seconds), "at " + ", ".join([*measured, f"{human_bytes(rates.sha256)}/s hashed"])


def print_plan(out: output.Output, job: "Job", work: "Work", free: int, remote: dict[str, Any], rates: "Rates") -> bool:
    """Print the plan; returns whether the disk has room for it.

    job: with the plan of `work`, which is one part or all. free: bytes on the disk of the output. remote: see
    `command._remote`. rates: as measured.
    """
    from dsv4.convert.plan.partition import Part
    from dsv4.convert.write.estimate import estimated_seconds

    part = {"part": work.index + 1, "parts": work.count} if isinstance(work, Part) else {}
    plan, resources = job.plan, job.resources
    seconds = estimated_seconds(plan, rates, resources.workers)
    needed = plan.output_bytes + remote.get("scratch_bytes", 0)
    rows = [
        *([("part", str(part["part"]), f"of {part['parts']}: the rows below are of this part alone")] if part else []),
        ("source", human_bytes(plan.source_bytes), f"{plan.source_bytes:,} bytes"),
        ("output", human_bytes(plan.output_bytes), f"{plan.output_bytes:,} bytes"),
        ("shards", str(len(plan.shards)), counted(plan.tensors, "tensor")),
        ("free disk", human_bytes(free), "enough" if free > needed else f"{human_bytes(needed - free)} short"),
        ("peak memory", human_bytes(resources.peak_memory_bytes), counted(resources.workers, "worker")),
        _time_row(seconds, rates),
        *_remote_rows(remote),
    ]
    for line in aligned(rows, right=[1]):
        out.text(line)
    for shard in plan.shards:
        out.detail(f"{shard.file}  {human_bytes(shard.size)}  {len(shard.tensors)} tensors")
    for note in plan.notes:
        out.say(f"note: {note}")
    out.result(
        {
            "dry_run": True,
            "source_bytes": plan.source_bytes,
            "output_bytes": plan.output_bytes,
            "shards": len(plan.shards),
            "tensors": plan.tensors,
            "peak_memory_bytes": resources.peak_memory_bytes,
            "free_bytes": free,
            "estimated_seconds": round(seconds, 1),
            "short_bytes": max(0, needed - free),
            "options": plan.settings.to_json(),
            "files": {shard.file: shard.size for shard in plan.shards},
            "notes": list(plan.notes),
            **part,
            **remote,
        }
    )
    return bool(free > needed)


def _verdict(summary: dict[str, int], kept: list[str], settings: Settings) -> str:
    if kept:
        return f"no exact form for {counted(len(kept), 'tensor')}: kept as in the source (--on-inexact keep)"
    if summary["inexact_blocks"] or summary["changed_elements"]:
        asked = "--on-inexact round" if settings.dense == "bf16" else f"--dense {settings.dense}"
        return f"NOT exact: {summary['changed_elements']:,} elements were rounded ({asked})"
    if summary["blocks"] and settings.to == "fp8":
        return f"every block exact: {counted(summary['blocks'], 'block')}, scales span at most 2^{summary['max_span']}"
    if summary["blocks"]:
        return f"every block exact: {counted(summary['blocks'], 'block')}"
    return "every value exact"


def _warn_of_mixture(out: output.Output, result: "Result") -> None:
    """Warn of the result of --on-inexact keep: its values are right, but engines cannot load it."""
    settings, count = result.plan.settings, len(result.kept_tensors)
    if not count or CONVERSIONS[settings.to].keeps_codes:
        return
    kept = counted(count, "tensor")
    out.warn(f"{kept} kept the source's format among {settings.to.upper()} ones: no config.json can describe that")
    out.warn("engines expect one format: they will refuse this output or compute something else with it")
    out.say(f"dsv4 run reads this mix; for an engine convert again with {CONVERSIONS[settings.to].instead}")


def _warn(out: output.Output, result: "Result", caveats: tuple[str, ...]) -> None:
    summary = result.summary
    if summary["moved_blocks"]:
        out.say(f"{counted(summary['moved_blocks'], 'block')} needed another scale than the reference converter's")
    if summary["nan_codes"]:
        out.warn(f"{summary['nan_codes']:,} E4M3 NaN codes were copied: the source holds them")
    for name in result.kept_tensors[:10]:
        out.warn(f"kept: {name}")
    if len(result.kept_tensors) > 10:
        out.warn(f"kept: and {len(result.kept_tensors) - 10} more, which --json and dsv4.json name")
    _warn_of_mixture(out, result)
    for warning in result.notes:
        out.warn(warning)
    for note in (*result.plan.notes, *caveats):
        out.say(f"note: {note}")


def _next_step(result: "Result", source: str) -> str:
    """The command that proves the output; of one that is not exact, the command that lists what differs.

    Of experts in two formats all values are equal, and the proof finds fault with `expert_dtype` in config.json, which
    the reference engine's config does not have.
    """
    mixes_experts = result.plan.settings.layout == "hf" and any(map(is_routed_expert, result.kept_tensors))
    if not result.is_exact:
        words = "list what is not exact (ends with 1)"
    else:
        words = "values are equal, config.json is at fault (ends with 1)" if mixes_experts else "next"
    return f"{words}: {shlex.join(['dsv4', 'verify', source, str(result.output)])}"


def print_result(out: output.Output, result: "Result", source: str, caveats: tuple[str, ...]) -> None:
    """The closing lines of a whole conversion. source: as `dsv4 verify` takes it. caveats: of the engine."""
    next_step = _next_step(result, source)
    if result.already_done:
        out.say(f"nothing to do: {result.output} is complete and from this source")
        out.hint(next_step)
        return
    seconds, shards = max(result.seconds, 1e-9), counted(len(result.plan.shards), "shard")
    rate = human_bytes(result.output_bytes / seconds)
    out.say(
        f"{human_bytes(result.plan.source_bytes)} -> {human_bytes(result.output_bytes)} in {shards}, "
        f"{human_seconds(seconds)}, {rate}/s, peak memory {human_bytes(peak_memory())}"
    )
    if result.shards_reused:
        out.say(f"{result.shards_reused} shards were there already and are whole")
    out.say(_verdict(result.summary, result.kept_tensors, result.plan.settings))
    _warn(out, result, caveats)
    out.hint(next_step)


def print_part(out: output.Output, result: "Result", part: "Part") -> None:
    """The closing lines of one part of a conversion."""
    out.say(
        f"part {part.index + 1} of {part.count}: {result.shards_written} shards written, {result.shards_reused} were "
        f"there already, {human_bytes(result.output_bytes)} in {human_seconds(result.seconds)}"
    )
    out.hint("when every part is done: the same command with --finish instead of --part")
    out.result({**result.to_json(), "peak_memory_bytes": peak_memory(), "part": part.index + 1, "parts": part.count})


def engine_caveats(checkpoint: "Checkpoint", settings: Settings) -> tuple[str, ...]:
    """Caveats of the target's engine for FP8 experts."""
    if settings.layout != "hf" or settings.to != "fp8":
        return ()
    mtp = bool(draft_stages(checkpoint.tensors))
    stored = Stored(layout="hf", experts={"fp8"}, wo_a={settings.wo_a or ""}, quantized=True, mtp=mtp)
    return tuple(caveat.text for caveat in caveats_of(settings.target, stored))
