"""Reading a checkpoint: every tensor, whole and by rows, equal to what safetensors reads."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from hostile import EMBED, GEOMETRY, INDEX, good_checkpoint
from raw_safetensors import scatter
from safetensors import safe_open

from dsv4.convert.checkpoint import storage
from dsv4.convert.checkpoint.header import build_header
from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.synthetic.checkpoint import make_checkpoint
from dsv4.errors import InputError


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return good_checkpoint(tmp_path_factory.mktemp("good"))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize("shards", [None, 3])
def test_every_tensor_equals_what_safetensors_reads(tmp_path: Path, shards: int | None) -> None:
    folder = make_checkpoint(tmp_path / "x", geometry=GEOMETRY)
    if shards is not None:
        scatter(folder, shards)
    checkpoint = Checkpoint.open(folder)
    seen = set()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                expected, info = file.get_tensor(name), checkpoint.tensors[name]
                tensor = checkpoint.read_tensor(name)
                assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape) and info.shard == path.name
                assert torch.equal(bits(tensor), bits(expected))
                assert bytes(checkpoint.read_bytes(name)) == bits(expected).numpy().tobytes()
                seen.add(name)
    assert seen == set(checkpoint.tensors)
    checkpoint.close()


def test_progress_counts_the_headers(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    folder = scatter(make_checkpoint(tmp_path / "x", geometry=GEOMETRY), 3)
    Checkpoint.open(folder, lambda *now: seen.append(now)).close()
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_rows(good: Path) -> None:
    checkpoint = Checkpoint.open(good)
    name = "layers.0.ffn.experts.1.w2.weight"
    whole = checkpoint.read_tensor(name)
    rows = whole.shape[0]
    for start, stop in ((0, 1), (5, 9), (rows - 1, rows), (0, rows), (3, rows + 50), (7, 7)):
        assert torch.equal(checkpoint.read_tensor(name, start, stop), whole[start:stop])
    assert torch.equal(checkpoint.read_tensor(name, 100), whole[100:])
    checkpoint.close()


def test_scalars_empty_tensors_and_packed_f4(tmp_path: Path) -> None:
    tensors = {"scalar": ("F32", ()), "none": ("BF16", (0, 4)), "packed": ("F4", (2, 6))}
    data = torch.tensor([1.5]).numpy().tobytes() + bytes(range(6))
    (tmp_path / "model.safetensors").write_bytes(build_header(tensors) + data)
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.read_tensor("scalar").item() == 1.5
    assert checkpoint.read_tensor("none").shape == (0, 4)
    assert checkpoint.read_tensor("packed").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert checkpoint.read_tensor("packed", 1, 2).tolist() == [[3, 4, 5]]
    checkpoint.close()


def test_a_shard_may_be_a_link_to_a_regular_file(good: Path, tmp_path: Path) -> None:
    # That is what the caches of the hubs consist of.
    folder = Path(shutil.copytree(good, tmp_path / "snapshot"))
    (folder / EMBED).rename(tmp_path / "blob")
    (folder / EMBED).symlink_to(tmp_path / "blob")
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.read_tensor("embed.weight").shape == (64, 128)
    checkpoint.close()


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="a system without this call")
def test_the_system_reads_ahead_only_where_most_of_a_file_is_read(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, advice = Checkpoint.open(good), []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, *rest: advice.append(rest))
    every = [(name, 0, info.nbytes) for name, info in checkpoint.tensors.items()]
    one = every[list(checkpoint.tensors).index("layers.0.ffn.experts.1.w2.weight")]
    monkeypatch.setattr(storage, "SMALL_BYTES", one[2] - 1)
    for spans in (every, [one], [one], every):
        checkpoint.expect(spans)
    assert advice[0] == (0, 0, os.POSIX_FADV_RANDOM) and set(advice[1:]) == {(0, 0, os.POSIX_FADV_NORMAL)}
    checkpoint.close()


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="a system without this call")
def test_small_parts_are_requested_before_they_are_read(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, advice = Checkpoint.open(good), []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, *rest: advice.append(rest))
    spans = [("layers.0.ffn.experts.1.w2.weight", at, at + 7) for at in (5, 50)]
    checkpoint.expect(spans)
    extents = list(checkpoint.extents(spans))
    assert advice[1:] == [(extent.offset, 7, os.POSIX_FADV_WILLNEED) for extent in extents] and len(extents) == 2
    checkpoint.close()


def test_one_shard_without_an_index(good: Path, tmp_path: Path) -> None:
    folder = scatter(make_checkpoint(tmp_path / "x", geometry=GEOMETRY), 1)
    (folder / "model-00001-of-00001.safetensors").rename(folder / "model.safetensors")
    (folder / INDEX).unlink()
    checkpoint = Checkpoint.open(folder)
    assert len(checkpoint.shards) == 1 and "head.weight" in checkpoint.tensors
    checkpoint.close()


def test_a_shard_that_shrinks_while_it_is_read(good: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "x"))
    checkpoint = Checkpoint.open(folder)
    os.truncate(folder / EMBED, 1000)
    with pytest.raises(InputError, match=rf"{EMBED} ends at byte 1000"):
        checkpoint.read_tensor("embed.weight")
    checkpoint.close()


@pytest.mark.parametrize("name", ["nowhere", "config.json"])
def test_not_a_folder(good: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"does not exist|is not a folder"):
        Checkpoint.open(good / name)


def test_a_refused_checkpoint_leaves_no_open_files(good: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(good, tmp_path / "x")
    shard = max(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    before = len(os.listdir("/dev/fd"))
    with pytest.raises(InputError):
        Checkpoint.open(folder)
    assert len(os.listdir("/dev/fd")) == before
