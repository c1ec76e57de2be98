"""Records what an interrupted `verify` has compared or found whole, so that the same command skips it.

One file for each pair, or checkpoint that is verified alone, in a cache folder of the user and never in a checkpoint.
Its name is a hash of all that decides what a comparison finds: the code of `proof/`, the paths, the headers, and the
settings. Each line is one piece of a tensor with its tally, and each run first adds a line with the stamp of every
file: device, inode, size, time of modification and time of change, which no program can set. A piece is skipped only if
the stamps of all its shards are the same: shards that were changed, replaced or restored since are compared again.

A file that is read whole, for the hash in the manifest, is one line with the tallies of all its pieces. It is recorded
only if it has that hash, and skipped only while the manifest says the same: a damaged file is read again.

A stamp cannot show a change within the clock's tick of an earlier one, so pieces of shards that were changed less than
two seconds before they were read are not recorded. Each line carries its own hash; one that is torn or damaged is
ignored. The journal is removed when the verification ends, with any verdict, and after a month without use.
"""

import contextlib
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from dsv4.convert.proof.compare_tensor import Piece
from dsv4.convert.proof.files import Files
from dsv4.convert.proof.layout import Checkpoint
from dsv4.convert.proof.plan import ComparedTensor
from dsv4.convert.proof.tally import Tally
from dsv4.convert.proof.values.formats import Array
from dsv4.convert.proof.whole_files import WholeFile

fcntl = import_module("fcntl") if find_spec("fcntl") else None  # not on Windows

Stamps = dict[str, dict[str, list[int | str]]]  # side -> shard -> stamp

SETTLED_NS = 2 * 10**9
UNUSED_SECONDS = 30 * 24 * 3600
_CODE = Path(__file__).resolve().parents[1]
_ENDING = ".jsonl"


def default_folder() -> Path | None:
    """Where the journals of this user are; None for a user without a home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "dsv4" / "verify"
    except RuntimeError:
        return None


def code_hash() -> str:
    """SHA-256 of all that decides what a comparison finds: the files of `proof/`."""
    digest = hashlib.sha256()
    for path in sorted(_CODE.rglob("*.py")):
        digest.update(path.relative_to(_CODE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def stamps_of(files: Mapping[str, Files], shards: Mapping[str, list[str]]) -> Stamps:
    """The stamp of each shard, by side."""
    return {side: {name: files[side].stamp(name) for name in names} for side, names in shards.items()}


def _counts(uses: Array) -> list[Any]:
    """A histogram as its length and the pairs (position, count) that are not zero."""
    return [len(uses), [[int(at), int(uses[at])] for at in np.flatnonzero(uses)]]


def _histogram(counts: list[Any]) -> Array:
    uses = np.zeros(counts[0], np.int64)
    for at, count in counts[1]:
        uses[at] = count
    return uses


def tally_to_json(tally: Tally) -> dict[str, Any]:
    """A tally as plain data; what is empty is left out."""
    found = {name: value for name, value in vars(tally).items() if value}
    for name in ("blocks", "spans", "bad_filling"):
        if name in found:
            found[name] = [[key, count] for key, count in found[name].items()]
    if "copies_differ" in found:
        found["copies_differ"] = sorted(found["copies_differ"])
    for name in ("codes", "scale_codes"):
        if name in found:
            found[name] = [[key, _counts(uses)] for key, uses in found[name].items()]
    return found


def tally_from_json(found: dict[str, Any]) -> Tally:
    """The tally that `tally_to_json` made plain."""
    values = dict(found)
    values["copies_differ"] = set(found.get("copies_differ", []))
    for name in ("special", "bad_scales", "odd_scales", "rebuilt"):
        values[name] = Counter(found.get(name, {}))
    values["blocks"] = Counter({(row, column): count for (row, column), count in found.get("blocks", [])})
    values["bad_filling"] = Counter({tuple(key): count for key, count in found.get("bad_filling", [])})
    values["spans"] = Counter(dict(found.get("spans", [])))
    values["codes"] = {(side, kind): _histogram(uses) for (side, kind), uses in found.get("codes", [])}
    values["scale_codes"] = {side: _histogram(uses) for side, uses in found.get("scale_codes", [])}
    return Tally(**values)


def _line(value: Any) -> bytes:
    text = json.dumps(value).encode()
    return hashlib.sha256(text).hexdigest()[:16].encode() + b" " + text + b"\n"


def _parsed(line: bytes) -> Any:
    """What a line holds; None if it is not whole."""
    digest, _, text = line.partition(b" ")
    return json.loads(text) if hashlib.sha256(text).hexdigest()[:16].encode() == digest else None


def _hash(place: tuple[Any, ...]) -> str:
    return hashlib.sha256(repr(place).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _key(compared: ComparedTensor, piece: Piece) -> str:
    """Hash of a piece: which rows of which tensors, where they lie, and as what they are compared."""
    weights = [
        (weight.number_format.name, weight.rows, weight.columns, weight.block)
        for weight in (compared.source_weight, compared.output_weight)
        if weight is not None
    ]
    place = (
        compared.name,
        compared.kind,
        compared.scale_name,
        list(compared.tensors()),
        weights,
        piece.start,
        piece.stop,
    )
    return _hash(place)


def _file_key(file: WholeFile, sha256: str, compared: Sequence[ComparedTensor]) -> str:
    """Hash of a file: its name, size, SHA-256 in the manifest, and the pieces that are checked in it."""
    return _hash((file.name, file.size, sha256, [_key(compared[piece.tensor], piece) for piece in file.pieces]))


def _shards_of(compared: Iterable[ComparedTensor]) -> set[tuple[str, str]]:
    return {(side, name) for one in compared for side, tensor in one.tensors() for name in tensor.shards}


class Journal:
    """The journal of one pair or checkpoint, open for reading and adding. `open_journal` makes one.

    Use as a context manager: left without an error, the file is removed. holds: whether it has any line that counts.
    """

    def __init__(self, path: Path, files: Mapping[str, Files], shards: Mapping[str, list[str]]) -> None:
        self._path, self._files = path, files
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            if fcntl is not None:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # two runs would remove it from each other
            self._stamps = stamps_of(files, shards)
            self._proved = self._read()
            self.holds = bool(self._proved)
            self._write({"stamps": self._stamps}, after=b"\n")  # should the last line be torn
        except BaseException:
            os.close(self._descriptor)
            raise

    def _read(self) -> dict[str, tuple[int, int]]:
        """Where the lines are (offset, length) of pieces and files whose shards have the stamps that they had then."""
        proved: dict[str, tuple[int, int]] = {}
        then: Stamps = {}
        offset = 0
        with os.fdopen(os.dup(self._descriptor), "rb") as file:
            file.seek(0)
            for line in file:
                entry = _parsed(line.rstrip(b"\n"))
                if entry is not None and "stamps" in entry:
                    then = entry["stamps"]
                elif entry is not None and self._are_unchanged(entry["shards"], then):
                    proved[entry["item"]] = offset, len(line)
                offset += len(line)
        return proved

    def _are_unchanged(self, shards: list[tuple[str, str]], then: Stamps) -> bool:
        return all(self._stamps.get(s, {}).get(name, []) == then.get(s, {}).get(name) for s, name in shards)

    def _write(self, value: Any, after: bytes = b"") -> None:
        """Add a line. One that does not fit on the disk is compared again by the next run."""
        with contextlib.suppress(OSError):
            os.write(self._descriptor, after + _line(value))

    def proved(self, compared: ComparedTensor, piece: Piece) -> Tally | None:
        """The tally of an earlier run for a piece that cannot have changed since; None if it must be compared."""
        tallies = self._tallies(_key(compared, piece))
        return None if tallies is None else tallies[0]

    def proved_file(self, file: WholeFile, sha256: str, compared: Sequence[ComparedTensor]) -> list[Tally] | None:
        """The tallies of the pieces of a file that an earlier run found whole; None if it must be read.

        sha256: what the manifest says now, in hex. compared: all tensors.
        """
        return self._tallies(_file_key(file, sha256, compared))

    def _tallies(self, key: str) -> list[Tally] | None:
        place = self._proved.get(key)
        if place is None:
            return None
        entry = _parsed(os.pread(self._descriptor, place[1], place[0]).rstrip(b"\n"))
        return None if entry is None else [tally_from_json(tally) for tally in entry["tallies"]]

    def _is_settled(self, side: str, shard: str, began_ns: int) -> bool:
        """Whether a shard is what it was when the run began, and no change can have escaped its stamp."""
        try:
            stamp = self._files[side].stamp(shard)
        except OSError:
            return False
        changed = stamp[-1]
        settled = isinstance(changed, str) or changed + SETTLED_NS < began_ns
        return settled and stamp == self._stamps[side][shard]

    def add(self, compared: ComparedTensor, piece: Piece, tally: Tally, began_ns: int) -> None:
        """Record a piece that was compared. began_ns: when it began to be read, in ns since 1970."""
        self._add(_key(compared, piece), _shards_of([compared]), [tally], began_ns)

    def add_file(
        self, file: WholeFile, sha256: str, compared: Sequence[ComparedTensor], tallies: list[Tally], began_ns: int
    ) -> None:
        """Record a file that has the SHA-256 of the manifest, and the tallies of its pieces in their order."""
        shards = {("output", file.name)} | _shards_of(compared[piece.tensor] for piece in file.pieces)
        self._add(_file_key(file, sha256, compared), shards, tallies, began_ns)

    def _add(self, key: str, shards: set[tuple[str, str]], tallies: list[Tally], began_ns: int) -> None:
        if all(self._is_settled(side, name, began_ns) for side, name in shards):
            plain = [tally_to_json(tally) for tally in tallies]
            self._write({"item": key, "shards": sorted(shards), "tallies": plain})
            self.holds = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(finished=error is None)

    def close(self, finished: bool) -> None:
        """Close it; remove the file if the verification has ended."""
        if finished:
            self._path.unlink(missing_ok=True)
        os.close(self._descriptor)


def _remove_unused(folder: Path) -> None:
    for path in folder.glob(f"*{_ENDING}"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > UNUSED_SECONDS:
                path.unlink()


def open_journal(
    folder: Path, sides: Sequence[Checkpoint], whole: Iterable[WholeFile], how: dict[str, Any]
) -> Journal | None:
    """The journal of a pair, or of one checkpoint.

    None if the folder cannot be used, or another run has the journal: then nothing is kept.
    whole: the files that are read whole. how: all beside the code and the checkpoints that decides what a piece's tally
    is, as plain data.
    """
    identity = {
        "code": code_hash(),
        "sides": {side.where: [side.files.label, side.headers_sha256] for side in sides},
        "working folder": os.getcwd(),  # labels may be relative paths
        "how": how,
    }
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_unused(folder)
        files, shards = {side.where: side.files for side in sides}, {side.where: list(side.shards) for side in sides}
        shards["output"] = sorted({*shards["output"], *(file.name for file in whole)})
        return Journal(folder / f"{name}{_ENDING}", files, shards)
    except OSError:
        return None
