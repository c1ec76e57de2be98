"""What `dsv4 verify` prints: the findings, the plan of a dry run, and what crosses the network."""

from typing import TYPE_CHECKING, Any

from dsv4 import output
from dsv4.text import aligned, counted, human_bytes, human_seconds, some_of

if TYPE_CHECKING:
    from dsv4.convert.proof.result import Verification
    from dsv4.convert.proof.work.fetches import Fetch
    from dsv4.convert.proof.work.preview import Preview

SHOWN = 20  # differing tensors listed without -v
BLOCKS_SHOWN = 8


def _describe(difference: dict[str, Any], verbose: bool) -> list[str]:
    """A tensor that differs, in a few lines: where, how much, which blocks, the first element (`-v`: more of each)."""
    limit = len(difference.get("blocks", [])) if verbose else BLOCKS_SHOWN
    words = [difference["reason"]] if difference.get("reason") else []
    if count := difference.get("different_elements"):
        words.append(f"{count:,} of {difference['elements']:,} elements differ")
    head = f"{difference['status']} {difference['name']}"
    lines = ["  ".join(filter(None, (head, ", ".join(words))))]
    if blocks := difference.get("blocks"):
        size = "x".join(map(str, difference["block"]))
        some = " ".join(f"({row},{column})" for row, column, _ in blocks[:limit])
        more = difference["different_blocks"] - limit
        lines.append(f"    in {size} blocks {some}" + (f" and {more} more" if more > 0 else ""))
    for number, first in enumerate(difference.get("first_differences", [])[: None if verbose else 1]):
        a, b = first["source"], first["output"]
        at = ", ".join(map(str, first["at"]))
        shown = [s["code"] + (f" * {s['scale']}" if s["scale"] else "") + f" = {s['value']}" for s in (a, b)]
        lines.append(f"    {'then' if number else 'first'} at [{at}]: source {shown[0]}, output {shown[1]}")
    return lines


def _print_differences(out: output.Output, differences: list[dict[str, Any]]) -> None:
    names = {difference["name"] for difference in differences}
    # A scale differs because its weight does: one line for both.
    differences = [d for d in differences if d["name"].removesuffix("scale") + "weight" not in names]
    listed = differences if out.verbose else differences[:SHOWN]
    for difference in listed:
        for line in _describe(difference, out.verbose):
            out.text(line)
    if len(differences) > len(listed):
        out.text(f"  and {len(differences) - len(listed)} more (-v lists all, --json has the details)")


def _print_blocks(out: output.Output, found: dict[str, Any]) -> None:
    if blocks := found["statistics"].get("fp8_blocks"):
        out.text(
            f"FP8 blocks from FP4: {blocks['count']:,}, largest scale span 2^{max(map(int, blocks['spans']))} of "
            f"2^{blocks['span_limit']}, smallest headroom {blocks['smallest_headroom']}"
        )
        if moved := blocks["other_scale_than_reference"]:
            out.text(f"{moved:,} of them with another scale than the reference converter's")


def _print_signs(out: output.Output, found: dict[str, Any]) -> None:
    for key, words in (
        ("negative_zeros_became_positive", "negative zeros became positive"),
        ("positive_zeros_became_negative", "positive zeros became negative"),
    ):
        if found[key]:
            out.text(f"{found[key]:,} {words} (equal in value; --strict makes this a difference)")


def _print_errors(out: output.Output, found: dict[str, Any]) -> None:
    """How far values are apart, by the kind of tensor."""
    if not found["errors"]:
        return
    head = ["tensors that differ", "number", "largest error", "mean error"]
    rows = [
        [kind, str(e["tensors"]), f"{e['largest_error']:.3g}", f"{e['mean_error']:.3g}"]
        for kind, e in list(found["errors"].items())[:SHOWN]
    ]
    for line in aligned([head, *rows], right=[1, 2, 3]):
        out.text(line)


def _print_inverse(out: output.Output, found: dict[str, Any]) -> None:
    inverse = found.get("inverse")
    if inverse is None:
        return
    if not inverse["codes"]:
        out.text("inverse: no FP4 weight was stored in another format, nothing to rebuild")
    elif not inverse["sign"] and not inverse["wrong"]:
        out.text(f"inverse: all {inverse['codes']:,} FP4 codes were rebuilt: the source could be deleted")
    else:
        back = inverse["codes"] - inverse["sign"] - inverse["wrong"]
        out.text(f"inverse: {back:,} of {inverse['codes']:,} FP4 codes were rebuilt")
    for key, why in (("sign_of_zero_lost_in", "the sign of zero is gone"), ("not_rebuilt", "values differ")):
        if names := inverse[key]:
            out.text(f"  {why} in {len(names)} tensors: {some_of(names, SHOWN)}")


def _print_problems(out: output.Output, found: dict[str, Any]) -> None:
    for problem in found["problems"]:
        if problem["severity"] != "note" or out.verbose:
            out.text(f"{problem['where']} {problem['area']}: {problem['text']}")


def print_findings(out: output.Output, result: "Verification", found: dict[str, Any]) -> None:
    """Differences, problems, counts, and the verdict last."""
    from dsv4.convert.proof.index import ignored_lines

    _print_differences(out, found["differences"])
    _print_errors(out, found)
    for line in ignored_lines(found["ignored"]):
        out.text(line)
    _print_problems(out, found)
    rows = [[s, f"{found['counts'][s]:,}", w] for s, w in found["statuses"].items() if found["counts"][s]]
    for line in aligned(rows, right=[1]) if rows and result.source is not None else []:
        out.text(line)
    _print_blocks(out, found)
    _print_signs(out, found)
    _print_inverse(out, found)
    out.text(result.verdict)
    rate = (result.read_bytes - result.continued_bytes) / max(result.seconds, 1e-9)
    if result.continued_bytes:
        earlier = human_bytes(result.continued_bytes)
        out.say(f"{earlier} of it was compared by a run that was interrupted; its files have not changed since")
    what = f"{human_bytes(result.read_bytes)} of {result.what_was_read} read"
    out.say(f"{what} in {human_seconds(result.seconds)}, {human_bytes(rate)}/s")


def _fetch_words(fetch: "Fetch") -> str:
    size = human_bytes(fetch.size)
    if fetch.ranges:
        return f"{size} in {fetch.ranges:,} range requests"
    again = f", {fetch.again} of them a second time" if fetch.again else ""
    return f"{size} in {counted(fetch.shards, 'shard')}{again}, at most {human_bytes(fetch.disk_bytes)} on disk"


def print_kept(out: output.Output, proved: int, files: int) -> None:
    """How many files an interrupted run has found whole, on stderr, before the others are read."""
    out.say(f"continues: {proved} of {files} files were proved before")


def print_fetches(out: output.Output, fetched: "list[Fetch]") -> None:
    """What crosses the network, on stderr, before it does."""
    for fetch in fetched:
        out.say(f"fetching the {fetch.side}: {_fetch_words(fetch)}, about {human_seconds(fetch.seconds)}")


def _preview_rows(preview: "Preview") -> list[list[str]]:
    rows = [
        [side, one.label, f"{human_bytes(one.size)} in {counted(one.shards, 'shard')}"]
        for side, one in preview.sides.items()
    ]
    audit = preview.known.audit
    what = audit.described if audit else f"{preview.tensors:,} tensors"
    rows.append(["compare", what, human_bytes(preview.read_bytes)])
    if preview.continued_bytes:
        rows.append(["done", "compared by a run that was interrupted", human_bytes(preview.continued_bytes)])
    rows += [["fetch", fetch.side, _fetch_words(fetch)] for fetch in preview.fetches]
    if preview.seconds is not None:
        how = "at the rate at which the headers arrived" if preview.fetches else "measured for a second"
        rows.append(["time", how, human_seconds(preview.seconds)])
    return rows


def print_preview(out: output.Output, preview: "Preview", found: dict[str, Any]) -> None:
    """The plan, and what is known already."""
    out.lines(aligned(_preview_rows(preview)))
    _print_differences(out, found["differences"])
    _print_problems(out, found)
    out.text(preview.verdict)
