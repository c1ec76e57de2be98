"""Block scales that do not follow from the values, as `dsv4.json` records them for a checkpoint that has dropped them.

`--to bf16` and `--to fp8` drop scales, and the way back chooses new ones by the release's rule. Where that would be
another than the source's (quant/scale_choice.py), the manifest's entry of the weight says which it was:

    "scales": {"fp4 1x32": "eJw…", …}

A key is a form that the weight had: the format and its block. The string is base64 of the zlib stream of n gaps
(uint32, little-endian) and n E8M0 bytes. The first gap is the place of the first block, counted row by row from 0, each
further one the distance to the next.

A record is a hint, and never decides a value: a scale is taken where every element of the block is a code under it.
So one that is damaged, or stands beside weights that were trained since, does no harm, and what cannot be understood
counts as absent.
"""

import base64
import hashlib
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dsv4.convert.checkpoint.header import strict_json
from dsv4.convert.checkpoint.storage import Storage
from dsv4.errors import InputError
from dsv4.quant.blocks import Block

MANIFEST_NAME = "dsv4.json"
MAX_BYTES = 2 * 10**8  # of a manifest; that of V4-Pro has 50 MB
KEY = "scales"
_GAP = np.dtype("<u4")
_ITEM = _GAP.itemsize + 1
_MOST = int(np.iinfo(_GAP).max)

Texts = dict[str, str]
"""The recorded scales of one weight as the manifest has them, by form."""


def form_key(format_name: str, block: Block) -> str:
    """`fp4 1x32`, `fp8 128x128`."""
    return f"{format_name} {block.rows}x{block.columns}"


def block_of(form: str) -> Block | None:
    """The block of a form; None if it is none."""
    found = re.fullmatch(r"fp[48] ([1-9]\d{0,4})x([1-9]\d{0,4})", form)
    return Block(int(found[1]), int(found[2])) if found else None


class PlacedScales(NamedTuple):
    """places int64 [n], of blocks of a tensor, counted row by row, ascending; scale_bytes uint8 [n], E8M0."""

    places: np.ndarray[Any, np.dtype[np.int64]]
    scale_bytes: np.ndarray[Any, np.dtype[np.uint8]]


Record = dict[str, PlacedScales]
"""The recorded scales of one weight, or of some of its rows, by form."""
NONE = PlacedScales(np.empty(0, np.int64), np.empty(0, np.uint8))


def joined(parts: Sequence[PlacedScales]) -> PlacedScales:
    """The scales of several parts of a tensor, in order."""
    return PlacedScales(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def dump(scales: PlacedScales) -> str:
    """The string for some scales; "" for none, and for a tensor that has more blocks than a gap can count."""
    if not len(scales.places) or scales.places[-1] > _MOST:
        return ""
    gaps = np.diff(scales.places, prepend=0).astype(_GAP)
    return base64.b64encode(zlib.compress(gaps.tobytes() + scales.scale_bytes.tobytes())).decode()


def _load(text: str, blocks: int) -> PlacedScales:
    """As `load`. Raises ValueError for a string that is damaged."""
    try:
        stream = zlib.decompressobj()
        raw = stream.decompress(base64.b64decode(text, validate=True), blocks * _ITEM + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    count, rest = divmod(len(raw), _ITEM)
    if rest or not stream.eof:
        raise ValueError("it is cut short or names more blocks than there are")
    places = np.frombuffer(raw, _GAP, count).cumsum(dtype=np.int64)
    if count and places[-1] >= blocks:
        raise ValueError("it names a block that there is not")
    return PlacedScales(places, np.frombuffer(raw, np.uint8, count, count * _GAP.itemsize))


def load(text: str, blocks: int) -> PlacedScales:
    """The scales of a string about a tensor with that many blocks; none if it is damaged."""
    try:
        return _load(text, blocks)
    except ValueError:
        return NONE


def merged(one: Texts, other: Texts) -> Texts:
    """The records of two slices of a tensor, which have no block in common."""
    found = dict(one)
    for form, text in other.items():
        both = joined([load(side, _MOST) for side in (found.get(form, ""), text)])
        order = np.argsort(both.places)
        found[form] = dump(PlacedScales(both.places[order], both.scale_bytes[order]))
    return found


def _texts_of(entry: Any) -> Texts:
    """The record in a manifest's entry of a tensor."""
    scales = entry.get(KEY) if isinstance(entry, dict) else None
    return {k: text for k, text in scales.items() if isinstance(text, str)} if isinstance(scales, dict) else {}


def read(storage: Storage, files: Mapping[str, int]) -> dict[str, Texts]:
    """The records of a checkpoint by the weight's name; {} without a manifest that has any."""
    size = files.get(MANIFEST_NAME, 0)
    if not 0 < size <= MAX_BYTES:
        return {}
    try:
        manifest = strict_json(storage.read(MANIFEST_NAME, 0, size), MANIFEST_NAME)
    except InputError:
        return {}
    entries = manifest.get("tensors") if isinstance(manifest, dict) else None
    found = {name: _texts_of(entry) for name, entry in entries.items()} if isinstance(entries, dict) else {}
    return {name: texts for name, texts in found.items() if texts}


def identity(records: Mapping[str, Texts]) -> dict[str, str]:
    """What a job says of the records that it may use; {} for none."""
    if not records:
        return {}
    return {"recorded_scales_sha256": hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()}
