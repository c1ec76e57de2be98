"""`dsv4 verify` as a Python function, and what the command line shares with it: opening folders and repositories."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from dsv4.convert.hub.open import DEFAULT_SCRATCH, HubOptions
from dsv4.convert.hub.source import HubSource, named_sides
from dsv4.convert.hub.storage import HubFiles, open_hub_storage
from dsv4.convert.plan.settings import check_count
from dsv4.convert.proof.files import Files, LocalFiles

if TYPE_CHECKING:
    from dsv4.convert.proof.result import Verification


@contextmanager
def open_sides(sides: list[Path | HubSource], hub: HubOptions) -> Iterator[list[Files]]:
    """Both sides: folders, or repositories whose shards are fetched into temporary folders. Commits are pinned here.

    The temporary folders are in the output, if that is a folder, else where the program was started.
    """
    with ExitStack() as stack:
        opened: list[Files] = []
        beside = sides[-1] if len(sides) > 1 and isinstance(sides[-1], Path) else Path.cwd()
        for side in sides:
            if isinstance(side, Path):
                opened.append(stack.enter_context(closing(LocalFiles(side))))
                continue
            scratch = stack.enter_context(TemporaryDirectory(prefix=".dsv4-verify-", dir=beside))
            storage = open_hub_storage(side, Path(scratch) / "shards", hub)
            opened.append(HubFiles(stack.enter_context(closing(storage))))
        yield opened


def verify(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    tensor: str | None = None, shard: int | None = None, sample: str | float | None = None, seed: int = 0,
    strict: bool = False, inverse: bool = False,
    max_workers: int | None = None, max_memory: int | str | None = None,
    report: str | os.PathLike[str] | None = None,
    revision: str | None = None, token: str | None = None, cache_dir: Path | str | None = None,
    scratch: int = DEFAULT_SCRATCH,
) -> "Verification":  # fmt: skip
    """Compare two checkpoints: does `output` hold the same model as `source`? Or check one alone.

    Both may be a folder, "hf:org/name" or "ms:org/name".
    tensor: a glob of tensor names. shard: one shard of `output`, counted from 1. sample: the fraction of the blocks to
    compare, "5%" or 0.05, drawn by `seed`; the verdict is then never IDENTICAL. strict: a changed sign of zero is a
    difference. inverse: rebuild the source's FP4 codes from the output's values. max_memory: bytes that the whole
    process may use, or text such as "16GB". max_workers: threads; default: the cores that this process may use.
    report: a file for the page with the proof, complete when this function returns; where its file system cannot
    fsync, with a Python warning. revision, token, cache_dir, scratch: of a repository; scratch is the most shards of
    it that are on disk at once.

    Returns a `Verification`: `exit_code`, `verdict`, `to_json()`, `to_html()`.
    Raises InputError if a folder holds no checkpoint, UsageError if nothing is selected or the report cannot be
    written, MachineError for the network; every other fault of the files is in the result.
    """
    check_count("--scratch", scratch)
    named = named_sides(os.fspath(source), None if output is None else os.fspath(output), revision)
    hub = HubOptions(token, None if cache_dir is None else Path(cache_dir), scratch)
    from dsv4.convert.proof import run  # imports torch: after what can be wrong with the arguments

    with open_sides(named, hub) as sides:
        return run.verify(
            *sides, tensor=tensor, shard=shard, sample=sample, seed=seed, strict=strict, inverse=inverse,
            max_workers=max_workers, max_memory=max_memory, report=report,
        )  # fmt: skip
