"""The index decides which tensors of a folder count; what no loader reads is no difference; pointers are named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from raw_safetensors import Raw, Tensors, raw, read_folder, write_file, write_folder

from dsv4.cli import run
from dsv4.convert.proof.result import Verification
from dsv4.convert.proof.run import verify
from dsv4.convert.synthetic.checkpoint import make_checkpoint

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
OVERLAY = "model-overlay.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "a" * 64 + "\nsize 6367146\n"
QUANTIZATION = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}
SIDES = ["source", "output"]


def make_tensors() -> Tensors:
    """FP8 weights with scales, and what has none."""
    random = np.random.default_rng(1)
    found: Tensors = {"embed.weight": raw("BF16", random.integers(0, 1 << 15, (6, 4), dtype=np.uint16))}
    for name in ("layers.0.attn.wq_a", "layers.0.attn.wo_a", "layers.1.attn.wq_a"):
        found[f"{name}.weight"] = raw("F8_E4M3", random.integers(0, 120, (3, 8), dtype=np.uint8))
        found[f"{name}.scale"] = raw("F8_E8M0", np.full((1, 1), 120, np.uint8))
    return found


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Two equal checkpoints in two shards each, by side."""
    tensors = list(make_tensors().items())
    for side in SIDES:
        write_folder(tmp_path / side, {SHARDS[0]: dict(tensors[:4]), SHARDS[1]: dict(tensors[4:])})
        (tmp_path / side / "config.json").write_text(json.dumps({"quantization_config": QUANTIZATION}))
        (tmp_path / side / "tokenizer.json").write_text("{}")
    return {side: tmp_path / side for side in SIDES}


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def place(folder: Path, shard: str, *names: str) -> None:
    """Have the index name this shard for these tensors."""
    edit_index(folder, lambda index: index["weight_map"].update(dict.fromkeys(names, shard)))


def harmed(tensor: Raw) -> Raw:
    return Raw(tensor.dtype, tensor.shape, bytes([tensor.data[0] ^ 1]) + tensor.data[1:])


def compare(folders: dict[str, Path]) -> Verification:
    return verify(folders["source"], folders["output"])


def faults(result: Verification) -> list[str]:
    return [problem.text for problem in result.problems if problem.severity != "note"]


def notes(result: Verification) -> str:
    return "\n".join(problem.text for problem in result.problems if problem.severity == "note")


def test_the_twins_are_equal(folders: dict[str, Path]) -> None:
    result = compare(folders)
    assert (result.exit_code, result.counts["="], result.ignored) == (0, 7, {})


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("old_copy", ["good", "harmed", "unreadable"])
def test_a_newer_shard_supersedes_tensors_of_an_older(folders: dict[str, Path], side: str, old_copy: str) -> None:
    """Whatever the superseded copy holds, it is neither equal nor different; but no library opens a file cut short."""
    names, folder = ("layers.0.attn.wq_a.weight", "layers.0.attn.wq_a.scale"), folders[side]
    tensors = read_folder(folder)[SHARDS[0]]
    write_file(folder / OVERLAY, {name: tensors[name] for name in names})
    place(folder, OVERLAY, *names)
    if old_copy == "harmed":
        write_file(folder / SHARDS[0], tensors | {name: harmed(tensors[name]) for name in names})
    if old_copy == "unreadable":  # cut off behind the tensors that count
        assert list(tensors)[2:] == ["layers.0.attn.wq_a.scale", "layers.0.attn.wo_a.weight"]
        moved = {name: tensors[name] for name in (*list(tensors)[:1], list(tensors)[3], *names)}
        write_file(folder / SHARDS[0], moved)
        (folder / SHARDS[0]).write_bytes((folder / SHARDS[0]).read_bytes()[:-1])
    result = compare(folders)
    broken = old_copy == "unreadable"
    assert (result.exit_code, result.counts["="], len(faults(result))) == (int(broken), 7, int(broken))
    assert not broken or "ends at byte" in faults(result)[0]
    assert result.ignored == {side: {"superseded": sorted(names)}}
    write_file(folder / OVERLAY, {names[0]: harmed(tensors[names[0]]), names[1]: tensors[names[1]]})
    result = compare(folders)
    assert (result.exit_code, result.counts["*"], result.counts["="]) == (1, 1, 6)


@pytest.mark.parametrize("side", SIDES)
def test_a_tensor_that_the_index_does_not_list(folders: dict[str, Path], side: str) -> None:
    """It is not part of the checkpoint: what the other side has is missing, or extra."""
    edit_index(folders[side], lambda index: index["weight_map"].pop("embed.weight"))
    result = compare(folders)
    assert result.ignored == {side: {"not_listed": ["embed.weight"]}} and result.exit_code == 1
    assert [r.status for r in result.results if r.name == "embed.weight"] == ["+" if side == "source" else "-"]
    other = folders[SIDES[1 - SIDES.index(side)]]
    edit_index(other, lambda index: index["weight_map"].pop("embed.weight"))
    result = compare(folders)
    assert (result.exit_code, result.counts["="], len(result.results)) == (0, 6, 6)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("content", ["tensors", "rubbish", "pointer"])
@pytest.mark.fast_cases(2)
def test_shards_beside_the_indexed_ones(folders: dict[str, Path], side: str, content: str) -> None:
    extra = folders[side] / "older.safetensors"
    if content == "tensors":
        write_file(
            extra, {"embed.weight": raw("F32", np.zeros(2, np.float32)), "y": raw("F32", np.zeros(2, np.float32))}
        )
    else:
        extra.write_text(POINTER if content == "pointer" else "rubbish")
    result = compare(folders)
    assert (result.exit_code, result.counts["="], faults(result)) == (0, 7, [])
    assert result.ignored == {side: {"files": ["older.safetensors"]}}
    assert verify(folders[side]).exit_code == 0
    assert verify(folders["source"], folders["output"], shard=2).counts["="] == 4  # counted among the indexed ones


@pytest.mark.parametrize("side", SIDES)
def test_names_that_no_shard_holds(folders: dict[str, Path], side: str) -> None:
    """As in a folder whose wo_a became BF16: its scale is listed still."""
    folder = folders[side]
    place(folder, SHARDS[0], "layers.7.norm.weight")
    result = compare(folders)
    assert (result.exit_code, faults(result)) == (0, [])
    assert result.ignored == {side: {"absent": ["layers.7.norm.weight"]}}
    assert verify(folder).exit_code == 1  # without the source, verify cannot tell that it is not needed
    place(folder, SHARDS[0], "embed.scale")
    edit_index(folder, lambda index: index["weight_map"].pop("layers.7.norm.weight"))
    assert verify(folder).exit_code == 0  # no weight that is not quantized needs one
    assert verify(folder).ignored == {"output": {"absent": ["embed.scale"]}}


def test_a_scale_that_a_quantized_weight_needs(folders: dict[str, Path]) -> None:
    """It is an error even where both sides lack it."""
    for folder in folders.values():
        tensors = read_folder(folder)[SHARDS[1]]
        del tensors["layers.1.attn.wq_a.scale"]
        write_file(folder / SHARDS[1], tensors)
    result = compare(folders)
    text = "lists 1 tensor that no shard holds: layers.1.attn.wq_a.scale"
    assert result.exit_code == 1 and faults(result) == [text, text]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda i: i.update(metadata={"made_by": "x"}), "has no total_size"),
        (lambda i: i.update(metadata={"total_size": float(i["metadata"]["total_size"]) + 0.5}), "total_size says"),
        (lambda i: i.update(metadata={"total_size": 1}), "total_size says 1 bytes, the tensors have "),
        (lambda i: i.update(metadata={"total_size": "many\x1b"}), "total_size says 'many\\x1b' bytes"),
        (lambda i: i.update(metadata={"total_size": None}), "has no total_size"),
        (lambda i: i.update(metadata=None), "has no total_size"),
        (lambda i: i.update(metadata=[1, 2]), "has no total_size"),
        (lambda i: i.pop("metadata"), "has no total_size"),
        (lambda i: i.update(made_by="x"), "has the key made_by"),
    ],
)
@pytest.mark.parametrize("side", SIDES)
def test_what_no_loader_reads_is_a_note(
    folders: dict[str, Path], side: str, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    edit_index(folders[side], change)
    result = compare(folders)
    assert (result.exit_code, faults(result)) == (0, []) and said in notes(result)
    assert verify(folders[side]).exit_code == 0


def test_an_index_that_lists_nothing(folders: dict[str, Path]) -> None:
    edit_index(folders["output"], lambda index: index["weight_map"].clear())
    assert verify(folders["output"]).exit_code == 3


def test_what_is_ignored_is_said_in_one_line(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(folders["source"] / SHARDS[0], folders["source"] / OVERLAY)
    assert run(["verify", str(folders["source"]), str(folders["output"])]) == 0
    assert f"source index: ignored 1 shards that it does not name: {OVERLAY}" in capsys.readouterr().out.splitlines()
    assert run(["verify", str(folders["source"]), str(folders["output"]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ignored"] == {"source": {"files": [OVERLAY]}}
    assert OVERLAY in compare(folders).to_html()


@pytest.mark.parametrize("name", [SHARDS[1], INDEX, "config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("how", ["source", "output", "alone"])
def test_pointers_of_git_lfs(folders: dict[str, Path], name: str, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    broken = folders["source" if how == "source" else "output"]
    (broken / name).write_text(POINTER)
    code = run(["verify", str(broken)] if how == "alone" else ["verify", *map(str, folders.values())])
    said = [line for line in capsys.readouterr().out.splitlines() if name in line and "git-LFS pointer" in line]
    assert code == 3 and len(said) == 1 and "git lfs pull" in said[0]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_web_page_in_place_of_a_file_that_loaders_need(
    name: str, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """On both sides, where their bytes are equal."""
    for folder in folders.values():
        (folder / name).write_text("<html><title>Log in</title>" + " " * 5000)
    assert run(["verify", *map(str, folders.values())]) == 3
    said = capsys.readouterr().out
    assert f"{name} is a web page" in said and "Download the file again" in said


def test_a_pointer_that_no_loader_needs(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        (folder / "picture.png").write_text(POINTER)
    result = compare(folders)
    assert result.exit_code == 0 and "picture.png is a git-LFS pointer" in notes(result)


def as_u8(tensors: Tensors, *dtypes: str) -> Tensors:
    return {n: Raw("U8" if t.dtype in dtypes else t.dtype, t.shape, t.data) for n, t in tensors.items()}


@pytest.mark.parametrize("dtypes", [("I8",), ("F8_E8M0",), ("I8", "F8_E8M0")])
@pytest.mark.fast_cases(1)
def test_codes_and_scales_as_u8(tmp_path: Path, dtypes: tuple[str, ...]) -> None:
    source = make_checkpoint(tmp_path / "source")
    output = Path(shutil.copytree(source, tmp_path / "output"))
    shards = {shard: as_u8(tensors, *dtypes) for shard, tensors in read_folder(source).items()}
    write_folder(output, shards)
    changed = sum(t.dtype == "U8" for tensors in shards.values() for t in tensors.values())
    for one, other in ((source, output), (output, source)):
        result = verify(one, other, inverse=True)
        assert (result.exit_code, result.counts["≈"], faults(result)) == (0, changed, [])
    assert verify(output).exit_code == 0
    kind = ".experts." if "I8" in dtypes else ".scale"
    shard, name = next(
        (s, n) for s, tensors in shards.items() for n in tensors if kind in n and tensors[n].dtype == "U8"
    )
    write_folder(output, shards | {shard: shards[shard] | {name: harmed(shards[shard][name])}})
    result = verify(source, output)
    assert result.exit_code == 1 and 1 <= result.counts["*"] <= 2


def test_u8_of_another_shape_is_no_scale(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        shards = read_folder(folder)
        shards[SHARDS[1]]["layers.1.attn.wq_a.scale"] = raw("U8", np.full((5, 1), 120, np.uint8))
        write_folder(folder, shards)
    result = verify(folders["output"])
    reasons = [r.reason for r in result.results if r.name == "layers.1.attn.wq_a.weight"]
    assert result.exit_code == 3 and "fits no known block size" in reasons[0]
