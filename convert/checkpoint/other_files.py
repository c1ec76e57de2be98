"""Files of other kinds in a checkpoint's storage: weights that are no safetensors, git-LFS pointers, web pages."""

from collections.abc import Mapping

from dsv4.files import MAX_POINTER_BYTES, OTHER_WEIGHTS, POINTER, PREFIX_BYTES, Kind, kind_of, refuse_other_kinds

from .storage import Storage

TEXTS = (".json", ".jinja", ".py")  # which no web page can be


def refuse_other_weights(storage: Storage, files: Mapping[str, int]) -> None:
    """Raises InputError, naming the file and its kind, if a folder without safetensors has weights of another kind."""
    if any(name.endswith(".safetensors") for name in files):
        return
    for name in sorted(files):
        if name.endswith(OTHER_WEIGHTS):
            refuse_other_kinds(storage.read(name, 0, min(PREFIX_BYTES, files[name])), f"{storage.label}/{name}")


def misnamed(storage: Storage, files: Mapping[str, int]) -> dict[str, Kind]:
    """The files that are not what their names say, and what they are: git-LFS pointers, and web pages in place of JSON.

    Files on a hub are not looked at: a hub resolves pointers itself, and dsv4 checks the hash of what it sends.
    """
    if storage.identity():
        return {}
    looked_at = {
        name: storage.read(name, 0, min(PREFIX_BYTES, size))
        for name, size in files.items()
        if name.endswith(TEXTS) or len(POINTER) <= size <= MAX_POINTER_BYTES
    }
    found = {name: kind_of(start) for name, start in looked_at.items()}
    return {name: kind for name, kind in found.items() if kind and (kind.prefix == POINTER or name.endswith(TEXTS))}
