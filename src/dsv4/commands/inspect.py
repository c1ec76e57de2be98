"""`dsv4 inspect`: what is in a checkpoint, from its headers alone."""

import shlex
from collections.abc import Sequence
from contextlib import ExitStack, closing
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsv4 import output
from dsv4.errors import UsageError
from dsv4.options import CacheDir, Json, Revision, Token, example, named
from dsv4.progress import Reached
from dsv4.text import aligned, human_bytes, human_count, natural_order, some_of

if TYPE_CHECKING:
    from dsv4.convert.checkpoint.reader import Checkpoint, TensorInfo
    from dsv4.convert.hub.open import HubOptions
    from dsv4.convert.inspect.findings import Finding
    from dsv4.convert.inspect.inspection import Inspection
    from dsv4.convert.inspect.tensor_view import TensorView

BAR = 40  # characters of the longest bar of a histogram
ATTENTION = {"sliding": "sliding", "csa": "CSA", "hca": "HCA", "compressed": "compressed"}


def _section(out: output.Output, title: str, rows: list[list[str]], right: tuple[int, ...] = ()) -> None:
    out.text()
    out.section(title, rows, right)


def _layers_line(counts: dict[str, int]) -> str:
    kinds = ", ".join(f"{counts[kind]} {name}" for kind, name in ATTENTION.items() if counts[kind])
    routing = ", ".join(f"{counts[kind]} {kind}-routed" for kind in ("hash", "score") if counts[kind])
    return f"{counts['total']}: {kinds}" + (f"; {routing}" if routing else "")


def _facts(inspection: "Inspection", facts: dict[str, Any]) -> list[list[str]]:
    parameters = inspection.parameters
    active = (
        ""
        if parameters.active is None or not inspection.config
        else f", {human_count(parameters.active)} active per token"
    )
    rows = [["checkpoint", inspection.label]]
    if facts["architecture"]:
        rows.append(["architecture", f"{facts['architecture']} ({facts['model_type']})"])
    if inspection.form:
        rows.append(["form", f"{inspection.form}, shown under the release's names and dtypes"])
    rows.append(["parameters", f"{human_count(parameters.total)} in total{active}"])
    if inspection.mtp_blocks:
        blocks = "block" if inspection.mtp_blocks == 1 else "blocks"
        rows.append(["", f"{inspection.mtp_blocks} draft {blocks} (MTP) on top: {human_count(parameters.mtp_total)}"])
    if inspection.layers:
        rows.append(["layers", _layers_line(facts["layers"])])
        experts = max(layer.experts for layer in inspection.layers)
        chosen = inspection.config.get("num_experts_per_tok")
        each = f", {chosen} for each token" if type(chosen) is int else ""
        rows.append(["experts", f"{experts} routed a layer{each}; stored as {', '.join(inspection.expert_formats)}"])
    total = inspection.total
    shards = "shard" if inspection.shards == 1 else "shards"
    size = human_bytes(total.bytes)
    return [*rows, ["storage", f"{size} in {total.tensors:,} tensors, {inspection.shards} {shards}"]]


def _amounts(out: output.Output, title: str, amounts: dict[str, Any]) -> None:
    head = [title, "tensors", "parameters", "bytes"]
    rows = [[n, f"{a.tensors:,}", human_count(a.parameters), human_bytes(a.bytes)] for n, a in amounts.items()]
    out.text()
    out.lines(aligned([head, *rows], (1, 2, 3)))


def _cache(out: output.Output, inspection: "Inspection") -> None:
    from dsv4.convert.inspect.kv_cache import (
        LENGTH_NAMES,
        LENGTHS,
        V3_2_STORAGE,
        cache_sizes,
        shares_of_v3_2,
        v3_2_bytes,
    )

    cache = inspection.cache
    if cache is None:
        return
    sizes = cache_sizes(cache)
    _section(
        out,
        f"KV cache of one sequence ({cache.formats})",
        [["tokens", *LENGTH_NAMES.values()], ["bytes", *(human_bytes(sizes[n]) for n in LENGTHS)]],
        (1, 2, 3, 4),
    )
    rows = [
        [how, human_bytes(v3_2_bytes(V3_2_STORAGE[how], LENGTHS[-1])), f"{100 * share:.1f}%"]
        for how, share in shares_of_v3_2(cache).items()
    ]
    _section(out, "Share of DeepSeek-V3.2's cache at 1M tokens, if that is stored as", rows, (1, 2))


def _sizes(out: output.Output, inspection: "Inspection") -> None:
    if inspection.sizes is None:
        return
    from dsv4.convert.checkpoint.editions.table import is_another_model

    title, now = "What dsv4 convert would make of it", inspection.total.bytes
    if is_another_model(inspection.config):
        title += ", only with --any-model"
    rows = [[how, human_bytes(size), f"{size / now:.2f} x"] for how, size in inspection.sizes.items()]
    _section(out, title, rows, (1, 2))


def _headline(findings: "Sequence[Finding]") -> str:
    if not findings:
        return "Nothing looks wrong."
    return "Notes" if all(finding.level == "note" for finding in findings) else "What looks wrong"


def _findings(out: output.Output, inspection: "Inspection") -> None:
    out.text()
    if not inspection.config:
        out.text("One file without its checkpoint: nothing to compare its tensors with.")
        return
    out.text(_headline(inspection.findings))
    for finding in inspection.findings:
        out.paragraph(f"{finding.level}: {finding.text}.", "  ", "    ")
        out.paragraph(finding.hint, "    ", "    ")


def _report(out: output.Output, inspection: "Inspection", source: str, names: str) -> None:
    """names: a glob that some tensors match."""
    from dsv4.convert.inspect.inspection import as_json

    facts = as_json(inspection)
    out.result(facts)
    out.lines(aligned(_facts(inspection, facts)))
    _amounts(out, "dtype", inspection.dtypes)
    _amounts(out, "part", inspection.families)
    _cache(out, inspection)
    _sizes(out, inspection)
    _findings(out, inspection)
    out.hint(f"list the tensors: dsv4 inspect {shlex.quote(source)} --tensors {shlex.quote(names)}")


def _shards(info: "TensorInfo") -> str:
    """The files that hold a tensor: several where ranks share it."""
    return some_of(list(dict.fromkeys(extent.shard for extent in info.extents)), 2)


def _tensor_json(info: "TensorInfo") -> dict[str, Any]:
    fields = {"name": info.name, "dtype": info.dtype, "shape": list(info.shape)}
    return {**fields, "shard": info.shard, "bytes": info.nbytes}


def _list(out: output.Output, checkpoint: "Checkpoint", pattern: str) -> None:
    found = [info for name, info in checkpoint.tensors.items() if fnmatchcase(name, pattern)]
    if not found:
        raise UsageError(
            f"no tensor is called '{pattern}', there are {len(checkpoint.tensors):,}",
            f"The first is {min(checkpoint.tensors, key=natural_order, default='none')}. * stands for any characters.",
        )
    total = sum(info.nbytes for info in found)
    out.result({"count": len(found), "bytes": total, "tensors": [_tensor_json(info) for info in found]})
    groups: dict[str, list[TensorInfo]] = {}
    for info in sorted(found, key=lambda info: natural_order(info.name)):
        groups.setdefault(_shards(info), []).append(info)
    for shards, infos in sorted(groups.items(), key=lambda group: natural_order(group[0])):
        rows = [[i.name, i.dtype, str(list(i.shape)), human_bytes(i.nbytes)] for i in infos]
        _section(out, shards, rows, (3,))
    out.say(f"{len(found):,} of {len(checkpoint.tensors):,} tensors, {human_bytes(total)}")


def _histogram(out: output.Output, title: str, counts: dict[str, int]) -> None:
    if not counts:
        return
    most, total = max(counts.values()), sum(counts.values())
    rows = [[key, f"{100 * n / total:.2f}%", "#" * max(1, round(BAR * n / most))] for key, n in counts.items()]
    _section(out, title, rows, (0, 1))


def _grid(out: output.Output, title: str, rows: list[list[str]]) -> None:
    if rows:
        _section(out, title, rows, tuple(range(len(rows[0]))))


def _numbers(view: "TensorView") -> list[list[str]]:
    zeros = f"{view.zeros:,} ({view.negative_zeros:,} of them -0)" if view.negative_zeros else f"{view.zeros:,}"
    rows = [["elements", f"{view.elements:,}"], ["zeros", zeros]]
    if view.nans:
        rows.append(["NaN", f"{view.nans:,}"])
    if view.minimum is not None:
        rows.append(["range", f"{view.minimum:.6g} to {view.maximum:.6g}"])
        rows.append(["root mean square", f"{view.root_mean_square:.6g}"])
    return rows


def _view(out: output.Output, checkpoint: "Checkpoint", name: str) -> None:
    from dsv4.convert.inspect.tensor_view import as_json, view_tensor
    from dsv4.quant.e2m1 import VALUES

    size = checkpoint.tensors[name].nbytes if name in checkpoint.tensors else 0
    with out.progress(size, "reading", passing=True) as progress:
        view = view_tensor(checkpoint, name, progress.advance)
    out.result(as_json(view))
    facts = [["tensor", name], ["stored as", f"{view.format} ({view.info.dtype})"],
             ["shape", str(list(view.shape))], ["shard", _shards(view.info)]]  # fmt: skip
    if view.scale and view.block:
        block = f"{view.block.rows} x {view.block.columns}"
        facts.append(["scale", f"{view.scale.dtype} {list(view.scale.shape)}, one per {block}"])
    out.lines(aligned([*facts, *_numbers(view)]))
    _grid(out, "First values", [[f"{value:.6g}" for value in row] for row in view.values])
    _grid(out, "Their codes", [[f"0x{code:02x}" for code in row] for row in view.codes])
    _grid(out, "First scales", [[f"{value:.6g}" for value in row] for row in view.scales])
    codes = {f"{VALUES[code]:g}": count for code, count in sorted(view.code_counts.items())}
    _histogram(out, "FP4 codes, by value", codes)
    _histogram(out, "Scales", {f"2**{e}": n for e, n in sorted(view.scale_counts.items())})
    _histogram(out, "Magnitudes from", {f"2**{e}": n for e, n in sorted(view.exponent_counts.items())})


def _open(source: str, revision: str | None, options: "HubOptions", progress: "Reached") -> "Checkpoint":
    from dsv4.convert.checkpoint.rank_files import open_checkpoint
    from dsv4.convert.checkpoint.reader import open_file
    from dsv4.convert.hub.storage import open_storage
    from dsv4.convert.write.atomic_file import SCRATCH_NAME

    if Path(source).is_file():
        return open_file(Path(source))
    storage = open_storage(source, revision, Path(SCRATCH_NAME), options)  # headers need no scratch area: none is made
    try:
        return open_checkpoint(storage, progress)
    except BaseException:
        storage.close()
        raise


def inspect(
    checkpoint: Annotated[
        str,
        typer.Argument(
            parser=named, metavar="CHECKPOINT", help="Folder, hf:org/name, ms:org/name or .safetensors file."
        ),
    ],
    pattern: Annotated[str | None, typer.Argument(metavar="GLOB", help="With --tensors: which names.")] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List the tensors, those that match GLOB.")] = False,
    tensor: Annotated[str | None, typer.Option("--tensor", metavar="NAME", help="Look into one tensor.")] = None,
    revision: Revision = None,
    cache_dir: CacheDir = None,
    token: Token = None,
    json: Json = False,
) -> None:
    """Show what is in a checkpoint, from its headers alone: parameters, layers, storage, KV cache, faults.

    Of a checkpoint on a hub only the headers are fetched, a few MB.
    """
    out = output.configure(json)
    if pattern is not None and not tensors:
        raise UsageError(f"'{pattern}' needs --tensors", "dsv4 inspect CHECKPOINT --tensors 'layers.0.*'")
    if tensors and tensor is not None:
        raise UsageError("--tensors and --tensor exclude each other", "One lists names, the other looks into a tensor.")
    from dsv4.convert.hub.source import existing_source

    if not Path(checkpoint).is_file():
        existing_source(checkpoint, revision)
    from dsv4.convert.hub.open import HubOptions  # imports NumPy: after what can be wrong
    from dsv4.convert.inspect.inspection import inspect_checkpoint

    with ExitStack() as stack:
        with out.opening() as progress:
            options = HubOptions(token, cache_dir, warn=out.warn, detail=out.detail, headers=progress)
            opened = stack.enter_context(closing(_open(checkpoint, revision, options, progress)))
            inspection = None if tensors or tensor is not None else inspect_checkpoint(opened)
        if inspection is not None:
            first = "layers.0.*"
            has_layers = any(fnmatchcase(name, first) for name in opened.tensors)
            _report(out, inspection, checkpoint, first if has_layers else "*")
        elif tensor is not None:
            _view(out, opened, tensor)
        else:
            _list(out, opened, pattern or "*")


EPILOG = example(
    "dsv4 inspect ./DeepSeek-V4-Flash",
    "dsv4 inspect hf:deepseek-ai/DeepSeek-V4-Pro",
    "dsv4 inspect ./DeepSeek-V4-Flash --tensors 'layers.0.ffn.experts.0.*'",
    "dsv4 inspect ./DeepSeek-V4-Flash --tensor layers.0.ffn.experts.0.w1.weight",
)
