"""Recognises by its first bytes a file that is not what its name says, for the error message."""

from collections.abc import Mapping

from dsv4.errors import InputError

from .storage import Storage

POINTER = b"version https://git-lfs.github.com/spec/"
MAX_POINTER_BYTES = 1024  # by git-LFS's own specification
PULL = "Fetch the files themselves: git lfs pull"
AGAIN = "Download the file again."

# First bytes (of text in lower case): kind of file, hint.
KINDS = (
    (POINTER, "a git-LFS pointer, not the file it stands for", PULL),
    (b"<!doctype html", "a web page, such as a proxy or a login sends", AGAIN),
    (b"<html", "a web page, such as a proxy or a login sends", AGAIN),
    (b"gguf", "a GGUF file, not safetensors", "Name a .safetensors file, or a folder of GGUF files."),
    (b"pk\x03\x04", "a zip archive, such as torch.save writes", "dsv4 reads safetensors: take the release."),
)
OTHER_WEIGHTS = (".bin", ".pt", ".pth")
PREFIX_BYTES = 64  # more than the longest, and some white space before it


def refuse_other_kinds(start: bytes, where: str) -> None:
    """Raises InputError if the first bytes of a file, which `where` names, are those of another kind of file."""
    found = start[:PREFIX_BYTES].lstrip().lower()
    for prefix, kind, hint in KINDS:
        if found.startswith(prefix):
            raise InputError(f"{where}: {kind}", hint)


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
