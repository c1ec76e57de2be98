"""Scales that do not follow from the values: recorded by the way to BF16, in any number of runs, and used on the way
back where they fit. Whatever a manifest says, the values are those of the source."""

import base64
import json
import os
import zlib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoint_variants import SMALL
from exact_values import convert, different_values, dsv4, edit_tensors, read_json, tensors_of, tree
from folder_hub import COMMIT, FolderHub
from jobs import job_of
from raw_safetensors import raw

from dsv4.convert.checkpoint.forms import recorded_scales
from dsv4.convert.checkpoint.forms.recorded_scales import PlacedScales
from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.hub.client import Snapshot
from dsv4.convert.hub.open import HubOptions
from dsv4.convert.hub.source import HubSource
from dsv4.convert.hub.storage import HubStorage
from dsv4.convert.plan.plan import make_plan
from dsv4.convert.plan.settings import resolve
from dsv4.convert.synthetic.checkpoint import make_checkpoint
from dsv4.convert.write.run import Job, run_conversion
from dsv4.convert.write.shards.resources import decide_resources

pytestmark = pytest.mark.slow  # conversions of whole checkpoints, many times

SHARDS = ("--max-shard-size", "1MB")
DENSE = "layers.0.attn.wq_b.weight"


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("recorded") / "release", geometry=SMALL)


@pytest.fixture(scope="module")
def bf16(release: Path) -> Path:
    folder = release.parent / "bf16"
    convert(release, folder, "--to", "bf16", *SHARDS)
    return folder


def records(folder: Path) -> dict[str, dict[str, str]]:
    entries = read_json(folder / "dsv4.json")["tensors"]
    return {name: entry["scales"] for name, entry in entries.items() if "scales" in entry}


def with_manifest(folder: Path, copy: Path, manifest: object) -> Path:
    """A copy with another manifest. The other files are links."""
    copy.mkdir()
    for path in folder.iterdir():
        if path.name != "dsv4.json":
            (copy / path.name).symlink_to(path)
    text = manifest if isinstance(manifest, str) else json.dumps(manifest)
    (copy / "dsv4.json").write_text(text, encoding="utf-8")
    return copy


def differing(release: Path, folder: Path) -> set[str]:
    """Tensors that have other bytes than the release's."""
    before, after = tensors_of(release), tensors_of(folder)
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {n: (t.dtype, t.shape) for n, t in after.items()}
    return {name for name in before if before[name].data != after[name].data}


def test_without_the_record_scales_differ_and_values_do_not(release: Path, bf16: Path, tmp_path: Path) -> None:
    """So the other tests show something: weights of both formats are among them."""
    assert {form for texts in records(bf16).values() for form in texts} == {"fp4 1x32", "fp8 128x128"}
    copy = with_manifest(bf16, tmp_path / "bf16", {})
    convert(copy, tmp_path / "back", "--to", "fp4")
    scales = {name for name in differing(release, tmp_path / "back") if name.endswith("scale")}
    assert {name.removesuffix("scale") + "weight" for name in scales} <= set(records(bf16)) and len(scales) > 10
    assert different_values(tensors_of(release), tensors_of(tmp_path / "back")) == []


def test_parts_and_runs_that_go_on_write_the_same_record(release: Path, bf16: Path, tmp_path: Path) -> None:
    for part in (2, 1):
        convert(release, tmp_path / "parts", "--to", "bf16", *SHARDS, "--part", f"{part}/2")
    convert(release, tmp_path / "parts", "--to", "bf16", *SHARDS, "--finish")
    convert(release, tmp_path / "resumed", "--to", "bf16", *SHARDS, "--part", "1/2")
    convert(release, tmp_path / "resumed", "--to", "bf16", *SHARDS)
    assert len(list(bf16.glob("*.safetensors"))) > 2
    assert tree(tmp_path / "parts") == tree(tmp_path / "resumed") == tree(bf16)


def test_the_way_back_in_parts(release: Path, bf16: Path, tmp_path: Path) -> None:
    for part in (1, 2):
        convert(bf16, tmp_path / "back", "--to", "fp4", *SHARDS, "--part", f"{part}/2")
    convert(bf16, tmp_path / "back", "--to", "fp4", *SHARDS, "--finish")
    assert differing(release, tmp_path / "back") == set()
    for folder in (bf16, tmp_path / "back"):
        assert dsv4("verify", folder)[0] == dsv4("inspect", folder)[0] == 0
    assert dsv4("verify", release, tmp_path / "back")[0] == 0


def test_from_a_hub(release: Path, bf16: Path, tmp_path: Path) -> None:
    hub = FolderHub(bf16, tmp_path / "cache")
    source = HubSource("hf", "acme/tiny-bf16", None)
    snapshot = Snapshot(source, hub, COMMIT, hub.listing())  # type: ignore[arg-type]
    options = HubOptions(None, tmp_path / "cache", keep=True)
    with closing(HubStorage(snapshot, tmp_path / "scratch", options)) as storage:
        checkpoint = Checkpoint.open(storage)
        plan = make_plan(checkpoint, resolve("fp4"))
        run_conversion(Job(checkpoint, plan, tmp_path / "back", decide_resources(plan, 1)))
    assert differing(release, tmp_path / "back") == set()


def other_bytes(text: str, change: Callable[[np.ndarray], np.ndarray]) -> str:
    """A record with other scales at the same places."""
    found = recorded_scales.load(text, 10**9)
    return recorded_scales.dump(PlacedScales(found.places, change(found.scale_bytes).astype(np.uint8)))


def packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data)).decode()


DAMAGE: dict[str, Callable[[str], Any]] = {
    "no text": lambda text: 17,
    "no base64": lambda text: text[:-1] + "\ud800",
    "cut short": lambda text: base64.b64encode(base64.b64decode(text)[:-3]).decode(),
    "a byte more": lambda text: packed(zlib.decompress(base64.b64decode(text)) + b"\0"),
    "a bomb": lambda text: packed(bytes(10**7)),
    "places beyond the tensor": lambda text: packed(np.uint32(4_000_000_000).tobytes() + b"\x70"),
    "NaN": lambda text: other_bytes(text, lambda scales: scales | 255),
    "scales that do not fit": lambda text: other_bytes(text, lambda scales: scales ^ 0x80),
    "the next scale": lambda text: other_bytes(text, lambda scales: scales + 1),
    "the scale before": lambda text: other_bytes(text, lambda scales: scales - 1),
}


def test_damaged_records_change_no_value(release: Path, bf16: Path, tmp_path: Path) -> None:
    """Each kind of damage at several tensors; those that are not damaged have the release's bytes."""
    manifest, kinds = read_json(bf16 / "dsv4.json"), list(DAMAGE.values())
    for number, name in enumerate(records(bf16)):
        texts = manifest["tensors"][name]["scales"]
        if number % (len(kinds) + 1):
            damage = kinds[number % (len(kinds) + 1) - 1]
            manifest["tensors"][name]["scales"] = {form: damage(text) for form, text in texts.items()}
        else:
            intact = {name}
    copy = with_manifest(bf16, tmp_path / "bf16", manifest)
    convert(copy, tmp_path / "back", "--to", "fp4")
    different = differing(release, tmp_path / "back")
    assert different_values(tensors_of(release), tensors_of(tmp_path / "back")) == []
    assert different and not intact & different and len(records(bf16)) > 2 * len(kinds)


@pytest.mark.parametrize(
    "manifest", ["{", [1], {"tensors": [2]}, {"tensors": {DENSE: 3}}, {"tensors": {DENSE: {"scales": 4}}}]
)
def test_a_manifest_without_records_counts_as_none(manifest: object, bf16: Path, tmp_path: Path) -> None:
    copy = with_manifest(bf16, tmp_path / "bf16", manifest)
    with closing(Checkpoint.open(copy)) as checkpoint:
        assert checkpoint.recorded_scales == {}


def test_weights_that_were_changed_since_are_decided_by_their_values(bf16: Path, tmp_path: Path) -> None:
    """An element that no code has, in a block with a recorded scale: found and named as ever."""
    folder = with_manifest(bf16, tmp_path / "bf16", read_json(bf16 / "dsv4.json"))
    found = recorded_scales.load(records(bf16)[DENSE]["fp8 128x128"], 10**6)
    wide = -(-tensors_of(bf16)[DENSE].shape[1] // 128)
    row, column = divmod(int(found.places[-1]), wide)
    bits = tensors_of(bf16)[DENSE].array().copy()
    exact = bits.view(ml_dtypes.bfloat16)
    exact[128 * row, 128 * column] = ml_dtypes.bfloat16(1.0078125)  # 8 significant bits
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data)
    edit_tensors(folder, {DENSE: raw("BF16", bits)})
    code, _, err = dsv4("convert", folder, tmp_path / "out", "--to", "fp4")
    assert code == 3 and f"{DENSE}: block ({row}, {column}): " in err and "no exact form for 1 tensor:" in err


def test_another_record_is_another_job(bf16: Path, tmp_path: Path) -> None:
    copy = with_manifest(bf16, tmp_path / "bf16", read_json(bf16 / "dsv4.json"))
    convert(copy, tmp_path / "back", "--to", "fp4", *SHARDS, "--part", "1/2")
    os.unlink(copy / "dsv4.json")
    code, _, err = dsv4("convert", copy, tmp_path / "back", "--to", "fp4", *SHARDS)
    assert code == 2 and "dsv4.json is not this one's" in err


def test_what_exceeds_the_limit_is_left_out(
    release: Path, bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole tensors, in the order of the file, so that any number of threads leaves out the same."""
    limit = 150
    monkeypatch.setattr("dsv4.convert.plan.shards.LEAST_RECORD", limit)
    for workers in (1, 3):
        job = job_of(release, resolve("bf16", max_shard_bytes=10**6), tmp_path / f"bf16-{workers}", workers)
        assert {shard.record_limit for shard in job.plan.shards} == {0, limit}  # 0: nothing is cast there
        run_conversion(job)
        job.checkpoint.close()
    assert tree(tmp_path / "bf16-1") == tree(tmp_path / "bf16-3")
    whole, some = records(bf16), records(tmp_path / "bf16-1")
    assert some.items() < whole.items() and some
    sizes = dict[str, int]()
    for name, texts in some.items():
        shard = read_json(tmp_path / "bf16-1" / "dsv4.json")["tensors"][name]["shard"]
        sizes[shard] = sizes.get(shard, 0) + sum(map(len, texts.values()))
    assert max(sizes.values()) <= limit
    convert(tmp_path / "bf16-1", tmp_path / "back", "--to", "fp4")
    assert differing(release, tmp_path / "back")
    assert different_values(tensors_of(release), tensors_of(tmp_path / "back")) == []
