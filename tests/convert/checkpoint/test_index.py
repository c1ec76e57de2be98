"""The index decides, as for every loader: overlays, stale entries, extra files; and what the model needs must be there.

What is compared is the result: a folder with something to leave out becomes the same bytes as the folder without it.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from exact_values import INDEX, convert, dsv4, read_json, tensors_of
from hub_servers import HubServer, run_dsv4
from raw_safetensors import Raw, Tensors, read_file, write_file

from dsv4.convert.checkpoint.rank_files import open_checkpoint
from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.synthetic.checkpoint import Geometry, make_checkpoint
from dsv4.errors import InputError

SMALL = Geometry(vocab_size=64, compress_ratios=(4, 0), n_routed_experts=4, index_n_heads=4, o_groups=4)
OVERLAY = "model-overlay-00001.safetensors"
REPOSITORY = "acme/Tiny-V4"
Change = Callable[[Path], None]


def change_map(folder: Path, **entries: str | None) -> None:
    index = read_json(folder / INDEX)
    kept = {name: shard for name, shard in (index["weight_map"] | entries).items() if shard is not None}
    (folder / INDEX).write_text(json.dumps(index | {"weight_map": kept}))


def overlay(folder: Path, tensors: Tensors) -> None:
    write_file(folder / OVERLAY, tensors)
    change_map(folder, **dict.fromkeys(tensors, OVERLAY))


def negated(tensor: Raw) -> Raw:
    """Other bytes of the same dtype: the sign of every FP8 or bfloat16 number, or of one of two FP4 codes."""
    return Raw(tensor.dtype, tensor.shape, bytes(byte ^ 0x80 for byte in tensor.data))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("index") / "source", geometry=SMALL)


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "folder"))


NEWER = {
    "one weight": ["layers.0.attn.wo_b.weight"],
    "a weight and its scale": ["layers.0.attn.wo_b.weight", "layers.0.attn.wo_b.scale"],
    "an expert": ["layers.0.ffn.experts.3.w2.weight", "layers.0.ffn.experts.3.w2.scale"],
    "of several shards": ["norm.weight", "embed.weight", "mtp.0.attn.wkv.weight"],
}


@pytest.mark.parametrize("names", NEWER.values(), ids=NEWER)
@pytest.mark.fast_cases(1)
def test_an_overlay_is_what_counts(names: list[str], folder: Path, tmp_path: Path) -> None:
    old = tensors_of(folder)
    new = {n: negated(old[n]) if n.endswith(".weight") else old[n] for n in names}
    overlay(folder, new)
    checkpoint = Checkpoint.open(folder)
    for name in names:
        assert checkpoint.tensors[name].shard == OVERLAY
        assert checkpoint.read_bytes(name) == new[name].data
    (note,) = (note for note in checkpoint.notes if "an older copy of" in note)
    assert names[0] in note
    said = convert(folder, tmp_path / "out", "--to", "same")
    assert "an older copy of" in said
    assert tensors_of(tmp_path / "out") == old | new


def test_an_overlay_of_another_dtype(folder: Path, tmp_path: Path) -> None:
    """wo_a decoded to BF16 in a new shard; its old scale is in the old shard still, and the index does not name it."""
    convert(folder, tmp_path / "bf16", "--to", "same", "--wo-a", "bf16")
    decoded = tensors_of(tmp_path / "bf16")
    names = [name for name in decoded if name.endswith(".attn.wo_a.weight")]
    assert names and all(decoded[name].dtype == "BF16" for name in names)
    overlay(folder, {name: decoded[name] for name in names})
    change_map(folder, **{name.replace(".weight", ".scale"): None for name in names})
    notes = Checkpoint.open(folder).notes
    assert len(notes) == 2 and any("the index does not name it" in note for note in notes)
    convert(folder, tmp_path / "out", "--to", "same")
    assert tensors_of(tmp_path / "out") == decoded


def bf16_with_stale_scales(folder: Path) -> None:
    """As SGLang's FP8 folders are published: wo_a in BF16, its scale gone from the shards, not from the index."""
    decoded = folder.parent / "decoded"
    convert(folder, decoded, "--to", "same", "--wo-a", "bf16")
    weight_map = read_json(decoded / INDEX)["weight_map"]
    stale = {n.replace(".weight", ".scale"): s for n, s in weight_map.items() if n.endswith("wo_a.weight")}
    shutil.rmtree(folder)
    decoded.rename(folder)
    (folder / "dsv4.json").unlink()
    change_map(folder, **stale)


def extra_files(folder: Path) -> None:
    shard = min(folder.glob("*.safetensors"))
    for name in ("consolidated.safetensors", "adapter_model.safetensors", "model0-mp2.safetensors"):
        shutil.copy(shard, folder / name)
    (folder / "broken.safetensors").write_bytes(b"not read, so not refused")


HARMLESS: dict[str, tuple[Change, str]] = {
    "stale scales": (bf16_with_stale_scales, "no shard has it"),
    "extra files": (extra_files, "no index names it: adapter_model.safetensors, broken.safetensors"),
}


@pytest.mark.parametrize("command", ["convert", "inspect", "run", "doctor"])
@pytest.mark.parametrize("kind", HARMLESS)
@pytest.mark.fast_cases(2)
def test_every_command_reads_it_and_says_so_in_a_line(kind: str, command: str, folder: Path, tmp_path: Path) -> None:
    change, words = HARMLESS[kind]
    change(folder)
    arguments = {
        "convert": ["convert", folder, tmp_path / "out"],
        "inspect": ["inspect", folder],
        "run": ["run", folder, "--tokens", "1,2", "--logits", tmp_path / "logits"],
        "doctor": ["doctor", folder, "--for", "sglang"],
    }[command]
    code, out, err = dsv4(*arguments)
    assert code == 0, out + err
    assert " ".join((out + err).split()).count(words) == 1, out + err


def test_extra_files_change_nothing(folder: Path, source: Path, tmp_path: Path) -> None:
    extra_files(folder)
    for path, name in ((folder, "found"), (source, "expected")):
        convert(path, tmp_path / name)
    assert tensors_of(tmp_path / "found") == tensors_of(tmp_path / "expected")
    assert {p.name for p in (tmp_path / "found").iterdir()} == {p.name for p in (tmp_path / "expected").iterdir()}


def test_extra_files_beside_rank_files(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "mp", "--layout", "mp", "--model-parallel", 2)
    shutil.copy(tmp_path / "mp" / "model0-mp2.safetensors", tmp_path / "mp" / "extra.safetensors")
    checkpoint = open_checkpoint(tmp_path / "mp")
    assert checkpoint.notes == ["ignored, because no index names it: extra.safetensors"]


NEEDED = [
    "norm.weight",
    "layers.0.ffn.experts.2.w3.weight",
    "layers.0.attn.attn_sink",
    "mtp.0.enorm.weight",
    "hc_head_fn",
]


def drop(folder: Path, name: str) -> None:
    """Take a tensor out of its shard only."""
    path = folder / read_json(folder / INDEX)["weight_map"][name]
    write_file(path, {n: tensor for n, tensor in read_file(path).items() if n != name})


@pytest.mark.parametrize("command", ["convert", "inspect", "run", "doctor"])
@pytest.mark.parametrize("name", NEEDED)
@pytest.mark.parametrize("where", ["in no shard", "not in the index"])
@pytest.mark.fast_cases(12)
def test_what_the_model_needs_must_be_there(where: str, name: str, command: str, folder: Path, tmp_path: Path) -> None:
    if where == "in no shard":
        drop(folder, name)
    else:
        change_map(folder, **{name: None})
    arguments = {
        "convert": ["convert", folder, tmp_path / "out"],
        "inspect": ["inspect", folder],
        "run": ["run", folder, "--tokens", "1,2", "--logits", tmp_path / "logits"],
        "doctor": ["doctor", folder, "--for", "sglang"],
    }[command]
    code, out, err = dsv4(*arguments)
    assert code == (1 if command == "doctor" else 3) and name in out + err


@pytest.mark.parametrize("name", ["layers.0.attn.wkv.scale", "layers.0.ffn.experts.1.w1.scale"])
def test_a_scale_that_its_weight_needs(name: str, folder: Path, tmp_path: Path) -> None:
    drop(folder, name)
    code, _, err = dsv4("convert", folder, tmp_path / "out")
    assert code == 3 and name in err and "missing" in err


def test_a_tensor_in_another_shard_than_the_index_says(folder: Path) -> None:
    """Nobody overlays by leaving the name where it was: index and shards are of two revisions."""
    change_map(folder, **{"norm.weight": read_json(folder / INDEX)["weight_map"]["embed.weight"]})
    with pytest.raises(InputError, match=r"not in their shard: norm\.weight"):
        Checkpoint.open(folder)


def test_an_edition_that_is_not_written_down(folder: Path) -> None:
    """Where the config names no known edition, only scales may be missing."""
    config = read_json(folder / "config.json") | {"model_type": "deepseek_v9"}
    (folder / "config.json").write_text(json.dumps(config))
    change_map(folder, **{"layers.0.attn.wkv.scale": None})
    assert len(Checkpoint.open(folder).notes) == 1
    change_map(folder, **{"layers.0.attn.something": None, "norm.weight": None})
    with pytest.raises(InputError, match=r"norm\.weight"):
        Checkpoint.open(folder)


@pytest.mark.slow
def test_on_a_hub_extra_shards_are_not_fetched(folder: Path, source: Path, tmp_path: Path) -> None:
    shard = min(folder.glob("*.safetensors"))
    (folder / "consolidated.safetensors").write_bytes(shard.read_bytes() + bytes(50_000_000))
    with HubServer() as server:
        server.publish(REPOSITORY, folder)
        planned = run_dsv4(server, tmp_path, "convert", f"hf:{REPOSITORY}", "out", "--dry-run", "--json")
        assert planned.returncode == 0, planned.stderr
        assert json.loads(planned.stdout)["scratch_bytes"] < 50_000_000
        done = run_dsv4(server, tmp_path, "convert", f"hf:{REPOSITORY}", "out")
        assert done.returncode == 0 and "no index names it: consolidated.safetensors" in done.stderr, done.stderr
        assert not any("consolidated" in request.path for request in server.requests)
    convert(source, tmp_path / "expected")
    assert tensors_of(tmp_path / "out") == tensors_of(tmp_path / "expected")
