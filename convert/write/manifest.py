"""`dsv4.json`, the record of a finished conversion: source, settings, and the hash of every file and tensor.

Files have SHA-256, which hubs list and `sha256sum` prints: it shows whether a file is whole. A tensor has the SHA-256
of its file from the first byte to the tensor's last, `prefix_sha256`: hashing the file computes it on the way, so that
no byte is hashed twice, and the first one that is wrong shows where a damaged file changed. "digests" names both.

It holds no dates, host names or paths: the same source and options give the same bytes anywhere.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from dsv4 import __version__
from dsv4.convert.checkpoint.forms import recorded_scales
from dsv4.convert.checkpoint.header import strict_json
from dsv4.convert.checkpoint.reader import CONFIG_NAME, Checkpoint
from dsv4.convert.plan.settings import Settings
from dsv4.errors import InputError

from .atomic_file import read_small
from .journal import FORMAT, FinishedShard

MANIFEST_NAME = "dsv4.json"
READABLE_FORMATS = (1, 2, FORMAT)
MAX_MANIFEST_BYTES = 10**9


def describe_job(checkpoint: Checkpoint, settings: Settings) -> dict[str, Any]:
    """The job as data: format and program version, source, options. Equal jobs give equal output."""
    config = checkpoint.storage.read(CONFIG_NAME, 0, checkpoint.files[CONFIG_NAME])
    shards = {s.name: {"size": s.size, "header_sha256": s.header_sha256} for s in checkpoint.shards.values()}
    source = {**checkpoint.storage.identity(), "config_sha256": hashlib.sha256(config).hexdigest(), "shards": shards}
    source |= recorded_scales.identity(checkpoint.recorded_scales)
    return {
        "format": FORMAT,
        "dsv4_version": __version__,
        "source": source,
        "options": settings.to_json(),
    }


def summarize(tensors: dict[str, dict[str, Any]]) -> dict[str, int]:
    """Totals over the manifest entries of all tensors."""

    def total(key: str) -> int:
        return sum(entry.get(key, 0) for entry in tensors.values())

    return {
        "tensors": len(tensors),
        "cast_tensors": sum("blocks" in entry for entry in tensors.values()),
        "blocks": total("blocks"),
        "max_span": max((entry.get("max_span", 0) for entry in tensors.values()), default=0),
        "moved_blocks": total("moved_blocks"),
        "inexact_blocks": total("inexact_blocks"),
        "changed_elements": total("changed_elements"),
        "negative_zeros": total("negative_zeros"),
        "nan_codes": total("nan_codes"),
    }


def _prefixes(entry: dict[str, Any]) -> dict[str, str]:
    """The digest of a tensor in each shard that has it; none of one without bytes."""
    alone = {entry["shard"]: entry["prefix_sha256"]} if "prefix_sha256" in entry else {}
    return dict(entry.get("prefix_sha256_by_shard", alone))


def _with_shard(first: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    """The entry of a tensor that another shard has too: a copy, or a slice, whose counts are added."""
    counts: dict[str, int] = {
        key: first.get(key, 0) + entry.get(key, 0)
        for key in ("nan_codes", "changed_elements")
        if "slice" in entry and (key in first or key in entry)
    }
    key = recorded_scales.KEY
    scales = recorded_scales.merged(first.get(key, {}), entry.get(key, {})) if "slice" in entry else {}
    digests = {"prefix_sha256_by_shard": _prefixes(first) | _prefixes(entry)}
    return {**first, **counts, **digests, **({key: scales} if scales else {})}


def merge_shards(shards: list[FinishedShard]) -> dict[str, dict[str, Any]]:
    """The entries of all tensors by name.

    In the reference engine's layout a name can be in several shards, as copies or as slices. The entry is then the
    first shard's; slices add their counts to it, and `prefix_sha256_by_shard` has the digest in each shard.
    """
    merged: dict[str, dict[str, Any]] = {}
    for shard in shards:
        for name, entry in shard.tensors.items():
            first = merged.setdefault(name, entry)
            if first is not entry:
                merged[name] = _with_shard(first, entry)
    return merged


def make_manifest(
    job: dict[str, Any], shards: list[FinishedShard], files: dict[str, bytes], kept: list[str]
) -> dict[str, Any]:
    """The manifest of a finished output. kept: tensors that were copied because they have no exact form."""
    tensors = merge_shards(shards)
    return {
        **job,
        "digests": {"files": "sha256", "tensors": "sha256 of the file up to the tensor's last byte"},
        "summary": summarize(tensors),
        "kept_tensors": kept,
        "shards": {s.file: {"size": s.size, "sha256": s.sha256} for s in shards},
        "files": {
            name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
        },
        "tensors": tensors,
    }


def dump_manifest(manifest: dict[str, Any]) -> list[bytes]:
    """The bytes of dsv4.json in pieces: one tensor per line, so that `diff` compares two manifests."""
    head = {key: value for key, value in manifest.items() if key != "tensors"}
    parts = [json.dumps(head, indent=1, ensure_ascii=False)[:-2].encode(), b',\n "tensors": {\n']
    comma = b""
    for name, entry in manifest["tensors"].items():
        parts.append(comma + f"  {json.dumps(name, ensure_ascii=False)}: {json.dumps(entry)}".encode())
        comma = b",\n"
    return [*parts, b"\n }\n}\n"]


def _is_manifest(value: Any) -> bool:
    """Whether it has the keys that this program reads."""
    if not isinstance(value, dict) or value.get("format") not in READABLE_FORMATS:
        return False
    if not all(isinstance(value.get(key), dict) for key in ("shards", "files", "tensors", "summary")):
        return False
    entries = [*value["shards"].values(), *value["files"].values()]
    sizes = all(isinstance(entry, dict) and type(entry.get("size")) is int for entry in entries)
    return sizes and isinstance(value.get("kept_tensors"), list)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of an output folder; None if it has none. Raises InputError if it is not one of ours."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return None
    manifest = strict_json(read_small(path, MAX_MANIFEST_BYTES), str(path))
    if not _is_manifest(manifest):
        raise InputError(f"{path}: not a manifest of this version of dsv4", "Choose another folder.")
    return dict(manifest)


def _stays_inside(name: Any) -> bool:
    """Whether a relative name cannot lead out of its folder."""
    parts = name.split("/") if isinstance(name, str) else [".."]
    return all(part not in ("", ".", "..") for part in parts) and name.isprintable() and "\\" not in name


def check_owned(names: list[Any]) -> list[str]:
    """File names from a manifest or journal, refused if one could lead out of the folder. Raises InputError."""
    for name in names:
        if not _stays_inside(name):
            text = f"manifest or journal names a file '{str(name)[:80]}'"
            raise InputError(text, "It was tampered with: use a new folder.")
    return names
