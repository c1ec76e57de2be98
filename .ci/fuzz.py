"""Coverage-guided fuzzing of the readers of headers and index, differential against safetensors' own reader.

    python .ci/fuzz.py SECONDS

Needs atheris (`pip install atheris`), which is not among the test dependencies: it exists for few platforms. What our
readers accept, `safe_open` must accept with the same tensors; nothing but InputError may come out of them.
"""

import json
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["dsv4"]):
    from dsv4.convert.checkpoint.header import build_header, header_length, parse_header
    from dsv4.convert.checkpoint.reader import Checkpoint
    from dsv4.convert.proof.files import LocalFiles, read_shard
    from dsv4.convert.proof.index import read_index
    from dsv4.errors import InputError

from safetensors import SafetensorError, safe_open

MEMORY = Path("/dev/shm")
WORK = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
NAME, INDEX = "model.safetensors", "model.safetensors.index.json"
(WORK / "config.json").write_text("{}")


def theirs(path: Path) -> dict[str, list[int]] | None:
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}
    except SafetensorError:
        return None


def headers(content: bytes) -> None:
    """Both of our readers of a shard's header."""
    path = WORK / NAME
    path.write_bytes(content)
    try:
        length = header_length(content[:8], len(content), "file")
        header = parse_header(content[8 : 8 + length], len(content), "file")
        assert {name: list(entry.shape) for name, entry in header.entries.items()} == theirs(path)
    except InputError:
        pass
    files = LocalFiles(WORK)
    shard = read_shard(files, NAME, len(content))
    files.close()
    if not (shard.broken or shard.unreadable or shard.problems):
        assert {name: list(entry.shape) for name, entry in shard.entries.items()} == theirs(path)


def index(content: bytes) -> None:
    """Both of our readers of the index, beside a good shard."""
    (WORK / NAME).write_bytes(build_header({"a": ("F32", (1,))}) + bytes(4))
    (WORK / INDEX).write_bytes(content)
    try:
        Checkpoint.open(WORK).close()
    except InputError:
        pass
    files = LocalFiles(WORK)
    read_index(files, len(content))
    files.close()
    (WORK / INDEX).unlink()


def one_input(content: bytes) -> None:
    if content[:1] == b"i":
        index(content[1:])
    else:
        text = content[1:].partition(b"\0")[0]
        headers(len(text).to_bytes(8, "little") + text + content[len(text) + 2 :])  # a length field that is right


def main() -> None:
    seeds = WORK / "seeds"
    seeds.mkdir()
    good = build_header({"a.weight": ("F32", (2, 3)), "b": ("I8", (3,))})[8:]
    (seeds / "header").write_bytes(b"h" + good + b"\0" + bytes(27))
    (seeds / "index").write_bytes(
        b"i" + json.dumps({"weight_map": {"a": NAME}, "metadata": {"total_size": 4}}).encode()
    )
    atheris.Setup(
        [
            sys.argv[0],
            f"-max_total_time={sys.argv[1]}",
            "-seed=4",
            "-max_len=2000",
            "-len_control=0",
            "-verbosity=0",
            str(seeds),
        ],
        one_input,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
