"""`dsv4.json`, if a checkpoint has one: the sizes and hashes that were recorded when the checkpoint was written.

Files have SHA-256. A tensor has the SHA-256 of its file up to the tensor's last byte, so that the first tensor that
changed can be named; in older manifests it has a digest of its own bytes, BLAKE3 (format 2) or SHA-256 (format 1).

It is used only when a checkpoint is verified alone: a comparison with the source proves more.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Any

from .config import file_hash, read_config
from .files import Entry, RemoteFiles
from .layout import Checkpoint, canonical
from .schedule import UNSHARED, Share

MANIFEST = "dsv4.json"
PREFIX_FORMAT = 3  # of manifests whose tensors have digests of the file up to there
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

    def sha256(self, name: str) -> Any:
        """What a hashed file's SHA-256 should be, in hex; None, or anything, if the manifest is wrong."""
        return (self.files if name in self.files else self.shards)[name].get("sha256")


def read_manifest(checkpoint: Checkpoint, share: Share = UNSHARED) -> Manifest | None:
    """The manifest of a checkpoint, None if it has none. Files whose size differs from the manifest are not hashed."""
    sizes = checkpoint.files.sizes()
    if MANIFEST not in sizes:
        return None
    value = read_config(checkpoint, MANIFEST, MAX_BYTES)
    if value is None:
        return Manifest(understood=False)
    parts = [value.get(key, {}) for key in ("shards", "files", "tensors")]
    if value.get("format") not in range(1, PREFIX_FORMAT + 1) or not all(isinstance(part, dict) for part in parts):
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


def _update(digest: Any, checkpoint: Checkpoint, shard: str, start: int, stop: int) -> None:
    """Hash bytes [start, stop) of a shard."""
    for begin in range(start, stop, _CHUNK):
        buffer = bytearray(min(_CHUNK, stop - begin))
        checkpoint.files.read_into(shard, begin, memoryview(buffer))
        digest.update(buffer)


def _own_digest(manifest_format: int) -> tuple[str, str, Any]:
    """The digest of a tensor's own bytes in an older manifest: its key, its name, and an empty one."""
    if manifest_format == 1:
        return "sha256", "SHA-256", hashlib.sha256()
    from blake3 import blake3  # for these manifests alone

    return "blake3", "BLAKE3", blake3()


def _check_tensor(
    checkpoint: Checkpoint, entry: Entry, said: dict[str, Any], shard_differs: bool, manifest_format: int
) -> None:
    """Compare dtype and shape; in a shard whose hash is wrong also a digest of the tensor's own, if it has one."""
    if said.get("dtype") != entry.dtype or said.get("shape") != list(entry.shape):
        claimed = f"{said.get('dtype')} {said.get('shape')}"
        text = f"{entry.name} is {entry.dtype} {list(entry.shape)}, the manifest says {claimed}"
        checkpoint.problem("manifest", text)
    if not shard_differs or manifest_format >= PREFIX_FORMAT:
        return
    key, name, digest = _own_digest(manifest_format)
    _update(digest, checkpoint, entry.shard, entry.offset, entry.offset + entry.size)
    if key in said and digest.hexdigest() != said[key]:
        checkpoint.problem("manifest", f"{entry.name} has another {name} than the manifest says")


def _prefix_in(shard: str, said: Any) -> Any:
    """The digest of a shard up to the end of a tensor, from the tensor's entry."""
    if not isinstance(said, dict):
        return None
    by_shard = said.get("prefix_sha256_by_shard")
    if isinstance(by_shard, dict):
        return by_shard.get(shard)
    return said.get("prefix_sha256") if said.get("shard") == shard else None


def _prefixes(checkpoint: Checkpoint, manifest: Manifest, shard: str) -> list[tuple[int, str, Any]]:
    """(end of a tensor, its name, digest of the shard up to there), in the order of the file."""
    listed = {canonical(name): _prefix_in(shard, said) for name, said in manifest.tensors.items()}
    return sorted(
        (entry.offset + entry.size, name, listed[name])
        for name, tensor in checkpoint.tensors.items()
        for entry in (*tensor.slices, *tensor.copies)
        if entry.shard == shard and listed.get(name) is not None
    )


def _name_first_changed(checkpoint: Checkpoint, manifest: Manifest, shard: str) -> None:
    """Record in which tensor of a shard the first byte lies that is not as it was written."""
    digest, done = hashlib.sha256(), 0
    for end, name, said in _prefixes(checkpoint, manifest, shard):
        _update(digest, checkpoint, shard, done, end)
        if digest.hexdigest() != said:
            where = name if done else f"its header or {name}"
            checkpoint.problem("manifest", f"{shard}: the first byte that changed is in {where}")
            return
        done = end


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

    locate: read a shard whose hash is wrong again, to find the tensor that changed.
    """
    if not manifest.understood:
        return
    sizes, shards = checkpoint.files.sizes(), manifest.shards
    broken = {name for name, said in shards.items() if not _check_file(checkpoint, name, said, sizes, hashes)}
    for name, said in manifest.files.items():
        _check_file(checkpoint, name, said, sizes, hashes)
    for name in sorted(set(checkpoint.shards) - shards.keys()):
        checkpoint.problem("manifest", f"does not list {name}")
    if checkpoint.repacked:  # the hashes of its files cover them
        return
    _check_tensors(checkpoint, manifest, broken if locate else set())
    for name in sorted(broken & sizes.keys()) if locate and manifest.format >= PREFIX_FORMAT else ():
        _name_first_changed(checkpoint, manifest, name)
