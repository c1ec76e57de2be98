"""`dsv4.json`, if a checkpoint has one: the sizes and hashes that were recorded when the checkpoint was written.

Files have SHA-256; tensors have BLAKE3, or SHA-256 in manifests of format 1.

It is used only when a checkpoint is verified alone: a comparison with the source proves more.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from blake3 import blake3

from .config import file_hash, read_config
from .files import Entry, RemoteFiles
from .layout import Checkpoint, canonical
from .schedule import UNSHARED, Share

MANIFEST = "dsv4.json"
# Digest of a tensor's bytes, by the manifest's format: its key, and the hash.
TENSOR_DIGESTS: dict[Any, tuple[str, Callable[[], Any]]] = {1: ("sha256", hashlib.sha256), 2: ("blake3", blake3)}
HASH_NAMES = {"sha256": "SHA-256", "blake3": "BLAKE3"}
MAX_BYTES = 10**9  # about 400 for each tensor: 50 MB for V4-Pro, more where every rank has hashes of its own
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Manifest:
    """The recorded sizes and hashes. `own_files`: the files that this process hashes. Empty if it cannot be parsed."""

    shards: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Any] = field(default_factory=dict)
    own_files: dict[str, int] = field(default_factory=dict)  # name -> size
    hashed_files: frozenset[str] = frozenset()  # by this process or another
    format: int = 1
    understood: bool = True


def read_manifest(checkpoint: Checkpoint, share: Share = UNSHARED) -> Manifest | None:
    """The manifest of a checkpoint, None if it has none. Files whose size differs from the manifest are not hashed."""
    sizes = checkpoint.files.sizes()
    if MANIFEST not in sizes:
        return None
    value = read_config(checkpoint, MANIFEST, MAX_BYTES)
    if value is None:
        return Manifest(understood=False)
    parts = [value.get(key, {}) for key in ("shards", "files", "tensors")]
    if value.get("format") not in (1, 2) or not all(isinstance(part, dict) for part in parts):
        checkpoint.problem("manifest", f"{MANIFEST} has a format that this version does not know", "unreadable")
        return Manifest(understood=False)
    shards, files, tensors = parts
    said = {**shards, **files}
    names = [n for n, entry in said.items() if n in sizes and isinstance(entry, dict) and entry.get("size") == sizes[n]]
    own = share.of(names, [sizes[name] for name in names])
    return Manifest(shards, files, tensors, {name: sizes[name] for name in own}, frozenset(names), value["format"])


def _check_file(checkpoint: Checkpoint, name: str, said: Any, sizes: dict[str, int], hashes: dict[str, str]) -> bool:
    """Whether one file is as the manifest says. If not, records a problem."""
    if not isinstance(said, dict):
        checkpoint.problem("manifest", f"its entry for {name} cannot be understood")
    elif name not in sizes:
        checkpoint.problem("manifest", f"lists {name}, which is not there")
    elif said.get("size") != sizes[name]:
        checkpoint.problem("manifest", f"{name} has {sizes[name]} bytes, the manifest says {said.get('size')}")
    elif said.get("sha256") != hashes[name]:
        checkpoint.problem("manifest", f"{name} has another SHA-256 than the manifest says")
    else:
        return True
    return False


def _tensor_hash(checkpoint: Checkpoint, entry: Entry, new: Callable[[], Any]) -> str:
    digest = new()
    for start in range(0, entry.size, _CHUNK):
        buffer = bytearray(min(_CHUNK, entry.size - start))
        checkpoint.files.read_into(entry.shard, entry.offset + start, memoryview(buffer))
        digest.update(buffer)
    return str(digest.hexdigest())


def _check_tensor(
    checkpoint: Checkpoint, entry: Entry, said: dict[str, Any], shard_differs: bool, manifest_format: int
) -> None:
    """Compare dtype and shape; in a shard whose hash is wrong also the tensor's hash, to find which tensor changed."""
    if said.get("dtype") != entry.dtype or said.get("shape") != list(entry.shape):
        claimed = f"{said.get('dtype')} {said.get('shape')}"
        text = f"{entry.name} is {entry.dtype} {list(entry.shape)}, the manifest says {claimed}"
        checkpoint.problem("manifest", text)
    key, new = TENSOR_DIGESTS[manifest_format]
    if shard_differs and key in said and _tensor_hash(checkpoint, entry, new) != said[key]:
        checkpoint.problem("manifest", f"{entry.name} has another {HASH_NAMES[key]} than the manifest says")


def _check_tensors(checkpoint: Checkpoint, manifest: Manifest, broken: set[str]) -> None:
    """The manifest must list exactly the checkpoint's tensors. Slices of ranks are not compared one by one."""
    there = checkpoint.tensors.keys() | checkpoint.unreadable.keys()
    listed = {canonical(name): value for name, value in manifest.tensors.items()}
    for name in sorted(listed.keys() - there):
        checkpoint.problem("manifest", f"lists {name}, which is not there")
    for name in sorted(there - listed.keys()):
        checkpoint.problem("manifest", f"does not list {name}")
    for name, tensor in checkpoint.tensors.items():
        value = listed.get(name)
        if isinstance(value, dict) and len(tensor.slices) == 1 and not tensor.copies:
            _check_tensor(checkpoint, tensor.slices[0], value, bool(broken & tensor.shards), manifest.format)


def listed_hashes(checkpoint: Checkpoint, manifest: Manifest) -> dict[str, str]:
    """SHA-256 of the manifest's files as the hub lists them; files without one in its listing, small ones, are read.

    Empty for a folder, of which nothing is listed.
    """
    files, sizes = checkpoint.files, checkpoint.files.sizes()
    if not isinstance(files, RemoteFiles):
        return {}
    return {
        name: files.listed_sha256(name) or file_hash(files, name, sizes[name]) for name in sorted(manifest.hashed_files)
    }


def check_manifest(checkpoint: Checkpoint, manifest: Manifest, hashes: dict[str, str], locate: bool = True) -> None:
    """Compare sizes and hashes of shards and side files, dtypes and shapes of tensors. `hashes`: of all processes.

    locate: read the tensors of a shard whose hash is wrong, to find those that changed.
    """
    if not manifest.understood:
        return
    sizes, shards = checkpoint.files.sizes(), manifest.shards
    broken = {name for name, said in shards.items() if not _check_file(checkpoint, name, said, sizes, hashes)}
    for name, said in manifest.files.items():
        _check_file(checkpoint, name, said, sizes, hashes)
    for name in sorted(set(checkpoint.shards) - shards.keys()):
        checkpoint.problem("manifest", f"does not list {name}")
    if not checkpoint.repacked:  # else the hashes of its files cover them
        _check_tensors(checkpoint, manifest, broken if locate else set())
