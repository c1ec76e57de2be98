"""Checks the wheels in a folder: the tag, the library's processor, its forms, and that it was built from these sources.

    .ci/check_wheels.py FOLDER

A library for another processor is loaded in qemu where that is installed.
"""

import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from dsv4 import compiled

ROOT = Path(__file__).resolve().parents[1]
# The ELF header's number of a processor, and the forms of the kernels.
MACHINES = {"x86_64": (62, ("plain", "avx2", "avx512", "avx512bf16")), "aarch64": (183, ("plain", "neon"))}
LOADER = """
#include <dlfcn.h>
#include <stdio.h>
int main(int count, char **words) {
    void *library = dlopen(words[1], RTLD_NOW);
    if (!library) return puts(dlerror()), 1;
    const char *(*fingerprint)(void) = (const char *(*)(void))dlsym(library, "dsv4_fingerprint");
    return fingerprint ? (puts(fingerprint()), 0) : 1;
}
"""


def in_qemu(library: Path, machine: str, work: Path) -> str | None:
    """What the library says its sources are, when it is loaded by an emulated processor; None without an emulator."""
    compiler, emulator = shutil.which(f"{machine}-linux-gnu-gcc"), shutil.which(f"qemu-{machine}")
    if compiler is None or emulator is None:
        return None
    (work / "loader.c").write_text(LOADER)
    subprocess.run([compiler, "loader.c", "-o", "loader"], cwd=work, check=True)
    command = [emulator, "-L", f"/usr/{machine}-linux-gnu", str(work / "loader"), str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def check(wheel: Path, work: Path) -> str:
    """One wheel; a sentence about it."""
    python, abi, tags = wheel.stem.split("-")[-3:]
    machine = next(name for name in MACHINES if tags.endswith(name))
    number, forms = MACHINES[machine]
    assert (python, abi) == ("py3", "none") and all(tag.startswith("manylinux") for tag in tags.split(".")), wheel.name
    with zipfile.ZipFile(wheel) as opened:
        names = [name for name in opened.namelist() if ".so" in name]
        assert names == [f"dsv4/quant/{compiled.FILE.name}"], names
        library = Path(opened.extract(names[0], work))
    raw = library.read_bytes()
    assert int.from_bytes(raw[18:20], "little") == number, "the library is for another processor"
    for form in forms:
        assert f"dsv4_linears_{form}\0".encode() in raw, form
    expected = compiled.fingerprint(ROOT / "src" / "dsv4")
    assert expected.encode() in raw, "the library was built from other sources"
    if machine == platform.machine():
        return f"{wheel.name}: {', '.join(forms)}"
    found = in_qemu(library, machine, work)
    assert found in (None, expected), found
    return f"{wheel.name}: {', '.join(forms)}; {'not loaded: no qemu' if found is None else 'loads in qemu'}"


def main(folder: Path) -> None:
    wheels = sorted(folder.glob("*.whl"))
    assert wheels, f"no wheel in {folder}"
    for wheel in wheels:
        with tempfile.TemporaryDirectory() as work:
            print(check(wheel, Path(work)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
