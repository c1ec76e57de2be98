"""Finds files of other kinds in a checkpoint's storage: weights that are no safetensors, and git-LFS pointers."""

from collections.abc import Mapping

from dsv4.files import MAX_POINTER_BYTES, OTHER_WEIGHTS, POINTER, PREFIX_BYTES, refuse_other_kinds

from .storage import Storage


def refuse_other_weights(storage: Storage, files: Mapping[str, int]) -> None:
    """Raises InputError, naming the file and its kind, if a folder without safetensors has weights of another kind."""
    if any(name.endswith(".safetensors") for name in files):
        return
    for name in sorted(files):
        if name.endswith(OTHER_WEIGHTS):
            refuse_other_kinds(storage.read(name, 0, min(PREFIX_BYTES, files[name])), f"{storage.label}/{name}")


def lfs_pointers(storage: Storage, files: Mapping[str, int]) -> list[str]:
    """Which files are git-LFS pointers. Files on a hub are not looked at: a hub resolves pointers itself."""
    if storage.identity():
        return []
    small = (name for name, size in files.items() if len(POINTER) <= size <= MAX_POINTER_BYTES)
    return [name for name in small if storage.read(name, 0, len(POINTER)) == POINTER]
