"""`dsv4.json`, when a checkpoint has one: the sizes and hashes that were written down when it was made.

Only used when a checkpoint is verified alone. With the source at hand the manifest proves nothing that the tensors
do not.
"""

from typing import Any

from dsv4.errors import printable

from .verify_config import file_hash, read_config
from .verify_files import INDEX_NAME
from .verify_layout import Checkpoint, canonical

MANIFEST = "dsv4.json"
FORMAT = 1


def _check_file(checkpoint: Checkpoint, name: str, said: Any, sizes: dict[str, int]) -> bool:
    """Whether one file is as the manifest has it. Writes a problem when it is not."""
    shown = printable(name)
    if not isinstance(said, dict):
        checkpoint.problem("manifest", f"its entry for {shown} cannot be understood")
    elif name not in sizes:
        checkpoint.problem("manifest", f"lists {shown}, which is not there")
    elif said.get("size") != sizes[name]:
        checkpoint.problem("manifest", f"{shown} has {sizes[name]} bytes, the manifest says {said.get('size')}")
    elif said.get("sha256") != file_hash(checkpoint.files, name, sizes[name]):
        checkpoint.problem("manifest", f"{shown} has another SHA-256 than the manifest says")
    else:
        return True
    return False


def _check_tensors(checkpoint: Checkpoint, said: dict[str, Any], broken: set[str]) -> None:
    """Every tensor is listed with its dtype and shape; in a shard whose hash is wrong, which tensors changed?"""
    import hashlib

    listed = {canonical(name): value for name, value in said.items() if isinstance(value, dict)}
    for name in sorted(listed.keys() ^ (checkpoint.tensors.keys() | checkpoint.unreadable.keys())):
        word = "lists" if name in listed else "does not list"
        there = "which is not there" if name in listed else "which is there"
        checkpoint.problem("manifest", f"{word} {printable(name)}, {there}")
    for name, tensor in checkpoint.tensors.items():
        value, shown = listed.get(name), printable(name)
        if value is None or checkpoint.layout == "mp":
            continue
        if value.get("dtype") != tensor.dtype or value.get("shape") != list(tensor.shape):
            found = f"{tensor.dtype} {list(tensor.shape)}"
            checkpoint.problem("manifest", f"{shown} is {found}, the manifest says {value.get('dtype')} {value.get('shape')}")
        if broken & tensor.shards and "sha256" in value:
            entry, digest = tensor.parts[0], hashlib.sha256()
            for start in range(0, entry.size, 1 << 20):
                buffer = bytearray(min(1 << 20, entry.size - start))
                checkpoint.files.read_into(entry.shard, entry.offset + start, memoryview(buffer))
                digest.update(buffer)
            if digest.hexdigest() != value["sha256"]:
                checkpoint.problem("manifest", f"{shown} has another SHA-256 than the manifest says")


def check_manifest(checkpoint: Checkpoint) -> None:
    """Sizes and hashes of shards and side files, dtypes and shapes of tensors."""
    sizes = checkpoint.files.sizes()
    if MANIFEST not in sizes:
        checkpoint.problem("manifest", f"there is no {MANIFEST}, so no hashes to compare", "note")
        return
    manifest = read_config(checkpoint, MANIFEST)
    if manifest is None:
        return
    parts = [manifest.get(key, {}) for key in ("shards", "files", "tensors")]
    if manifest.get("format") != FORMAT or not all(isinstance(part, dict) for part in parts):
        checkpoint.problem("manifest", f"{MANIFEST} has a format that this version does not know", "unreadable")
        return
    shards, files, tensors = parts
    broken = {name for name, said in shards.items() if not _check_file(checkpoint, name, said, sizes)}
    for name, said in files.items():
        _check_file(checkpoint, name, said, sizes)
    for name in sorted(set(checkpoint.shards) - shards.keys()):
        checkpoint.problem("manifest", f"does not list {printable(name)}")
    _check_tensors(checkpoint, tensors, broken)


__all__ = ["INDEX_NAME", "check_manifest"]
