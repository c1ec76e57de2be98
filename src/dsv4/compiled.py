"""The one loader of compiled code: the casts of `quant/`, the kernels of `model/`, the hash of shards that
are written, and the comparison of the proof.

`setup.py` builds one library of them when dsv4 is installed, if there is a C compiler. It is C without Python's
headers, so one library serves every Python version, ctypes loads it, and it runs without the interpreter's lock. Where
it is missing or does not load, `library` is None, `problem` says why, and the forms in torch and numpy do the work.

This file imports nothing but the standard library: `setup.py` runs it before anything is installed.
"""

import ctypes
import hashlib
import re
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
FILE = PACKAGE / "quant" / "_compiled.so"
# Of C, in the package.
FOLDERS = ("quant/c", "model/kernels/c", "model/kernels/c/decode", "convert/write/c", "convert/proof/c")
NOT_BUILT = "dsv4 was installed without a C compiler"
ELF_HEADER = 64  # bytes, of the 64-bit form
SECTIONS = slice(0x28, 0x30), slice(0x3A, 0x3C), slice(0x3C, 0x3E)  # of the header: offset, entry size, entries


def sources(package: Path) -> list[Path]:
    """Every C file and header in the folder of the package `dsv4`."""
    return sorted(path for folder in FOLDERS for path in (package / folder).glob("*.[ch]"))


def fingerprint(package: Path) -> str:
    """Sixteen hex digits for the contents of all C files. The library carries those that it was built from."""
    contents = hashlib.sha256()
    for path in sources(package):
        contents.update(path.read_bytes() + b"\0")
    return contents.hexdigest()[:16]


def constant(name: str) -> int:
    """The number that a C file defines under a name. From the source, because the forms in torch need it, too, where
    no library was built. Raises KeyError.
    """
    for path in sources(PACKAGE):
        if found := re.search(rf"^#define {name} (\d+)\b", path.read_text(encoding="utf-8"), re.MULTILINE):
            return int(found[1])
    raise KeyError(name)


def _is_cut_short(file: Path) -> bool:
    """Whether an ELF file ends before its table of sections, its last part: to load it can end the process (SIGBUS)."""
    with file.open("rb") as opened:
        head = opened.read(ELF_HEADER)
    if not head.startswith(b"\x7fELF"):
        return False
    offset, entry, count = (int.from_bytes(head[field], "little") for field in SECTIONS)
    return len(head) < ELF_HEADER or offset + entry * count > file.stat().st_size


def _load(file: Path) -> tuple[ctypes.CDLL | None, str | None]:
    if not file.exists():
        return None, NOT_BUILT
    try:
        if _is_cut_short(file):
            return None, f"{file.name} is incomplete"
        loaded = ctypes.CDLL(str(file))
        loaded.dsv4_fingerprint.restype = ctypes.c_char_p
        built_from = loaded.dsv4_fingerprint().decode()
    except (OSError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or str(error).removeprefix(f"{file}: ")
        return None, f"{file.name} does not load: {reason}"
    if built_from != fingerprint(PACKAGE):
        return None, f"{file.name} was built from other C files than those that are installed"
    return loaded, None


@cache
def _loaded() -> tuple[ctypes.CDLL | None, str | None]:
    return _load(FILE)


def library() -> ctypes.CDLL | None:
    """The compiled library; None where it was not built or does not load."""
    return _loaded()[0]


def problem() -> str | None:
    """Why there is no library, in a sentence; None where there is one."""
    return _loaded()[1]
