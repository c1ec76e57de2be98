"""Checks dsv4 on checkpoints that others made, with results that others computed, where those lie beside the project.

    python .ci/shared_checkpoints.py FOLDER

Each folder in FOLDER with an `expected/reference_hashes.json` is converted to the Hugging Face layout and verified, and
to the reference engine's layout, whose tensors must have the reference converter's hashes. Two differences are
intended: dsv4 keeps the sign of zero in up-cast experts, and finds exact forms for blocks that the reference rounds.
"""

import hashlib
import json
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from dsv4.cli import run

NEGATIVE_ZERO = 0x80


def raw_tensors(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    data = content[8 + length :]
    header = json.loads(content[8 : 8 + length])
    return {n: (e["dtype"], e["shape"], data[slice(*e["data_offsets"])]) for n, e in header.items()}


def check_hashes(folder: Path, expected: dict[str, Any], may_differ: set[str]) -> int:
    """Compare one mp conversion with the reference's hashes; returns how many tensors were equal."""
    equal = 0
    for file, tensors in expected.items():
        found = raw_tensors(folder / file)
        assert found.keys() == tensors.keys(), (file, found.keys() ^ tensors.keys())
        for name, (dtype, shape, sha256) in tensors.items():
            if name.removesuffix(".weight").removesuffix(".scale") in may_differ:
                continue
            data = found[name][2]
            if ".ffn.experts." in name and dtype == "F8_E4M3":
                data = data.replace(bytes([NEGATIVE_ZERO]), b"\0")
            assert found[name][:2] == (dtype, shape), (name, found[name][:2], dtype, shape)
            assert hashlib.sha256(data).hexdigest() == sha256, f"{file}: {name} differs from the reference's"
            equal += 1
    return equal


def check(source: Path, work: Path) -> None:
    truth = json.loads((source / "expected" / "fp8_truth.json").read_text())["tensors"]
    lossy = {name.removesuffix(".weight") for name, tensor in truth.items() if tensor["lossy_blocks"]}
    rounding = ["--on-inexact", "round"] if lossy else []
    assert run(["convert", str(source), str(work / "fp8"), "-q", *rounding]) == 0
    verified = run(["verify", str(source), str(work / "fp8"), "-q"])
    assert verified == (1 if lossy else 0), verified
    references = json.loads((source / "expected" / "reference_hashes.json").read_text())["converted"]
    for key, expected in references.items():
        experts, ranks = key.split("-mp")
        layout = ["--layout", "mp", "--model-parallel", ranks, "--to", "fp8" if experts == "fp8" else "same"]
        assert run(["convert", str(source), str(work / key), "-q", *layout, *rounding]) == 0
        equal = check_hashes(work / key, expected, lossy if experts == "fp8" else set())
        print(f"{source.name} {key}: {equal} tensors equal the reference's", flush=True)


def check_run(shared: Path) -> None:
    """The engine against the reference's logits, judged by the program that comes with them.

    The simulated logits are those computed with one rounding of each reciprocal square root, as on a GPU.
    """
    exact = shared.glob("*/expected/logits.exact.npz")
    simulated = shared.glob("*/expected/float_rsqrt/logits.simulated.npz")
    for golden in sorted([*exact, *simulated]):
        checkpoint, kind = shared / golden.relative_to(shared).parts[0], golden.name.split(".")[1]
        noise = [] if kind == "exact" else ["--noise", str(shared / "noise.json"), f"{checkpoint.name}.{kind}"]
        command = [sys.executable, str(shared / "check_run.py"), str(checkpoint), str(golden), *noise]
        subprocess.run(command, check=True)


def main() -> None:
    shared = Path(sys.argv[1])
    for source in sorted(path.parent.parent for path in shared.glob("*/expected/reference_hashes.json")):
        with tempfile.TemporaryDirectory() as work:
            check(source, Path(work))
    if (shared / "check_run.py").exists():
        check_run(shared)


if __name__ == "__main__":
    main()
