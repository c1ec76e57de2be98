"""The reference engine's rank files as one checkpoint: every tensor whole, and nothing believed that does not fit."""

import json
import os
import random
from pathlib import Path

import pytest
import torch
from exact_values import convert
from raw_safetensors import Raw, read_file, write_file

from dsv4.convert.checkpoint.rank_files import open_checkpoint
from dsv4.convert.synthetic.checkpoint import Geometry, make_checkpoint
from dsv4.errors import InputError
from dsv4.model.config import Config
from dsv4.model.loading import load

SMALL = Geometry(vocab_size=64, compress_ratios=(4, 0), n_routed_experts=4, index_n_heads=4)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rank_files") / "source"
    make_checkpoint(folder, geometry=SMALL)
    return folder


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    convert(source, tmp_path / "mp", "--layout", "mp", "--model-parallel", "2", "--to", "same")
    return tmp_path / "mp"


def test_every_tensor_is_whole(source: Path, folder: Path) -> None:
    hf, mp = open_checkpoint(source), open_checkpoint(folder)
    assert sorted(mp.shards) == ["model0-mp2.safetensors", "model1-mp2.safetensors"]
    same = [name for name in hf.tensors if ".wo_a." not in name]  # stored as BF16 in this layout
    assert len(same) == len(hf.tensors) - 4
    for name in same:
        a, b = hf.tensors[name], mp.tensors[name]
        # The file calls packed FP4 F4, with its shape in elements; it is read as the release's I8.
        assert (b.dtype, b.shape, b.nbytes) == (a.dtype, a.shape, a.nbytes)
        for rows in ((0, None), (a.shape[0] // 3, a.shape[0] - 1)) if len(a.shape) > 1 else ((0, None),):
            one, other = hf.read_tensor(name, *rows), mp.read_tensor(name, *rows)
            assert one.dtype == other.dtype
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), name


def test_any_bytes_of_any_tensor(source: Path, folder: Path) -> None:
    """Also those that end in the middle of a row, of a rank's slice or of a column."""
    hf, mp = open_checkpoint(source), open_checkpoint(folder)
    several = {name for name, info in mp.tensors.items() if len(info.extents) > 1}
    by_columns = {name for name in several if mp.tensors[name].by_columns}
    assert {"head.weight", "layers.0.attn.attn_sink"} < several
    assert {"layers.0.attn.wo_b.weight", "layers.0.attn.wo_b.scale"} < by_columns < several
    rng = random.Random(7)
    for name in sorted(several - {"layers.0.attn.wo_a.weight", "mtp.0.attn.wo_a.weight"}):
        expected, size = hf.read_bytes(name), hf.tensors[name].nbytes
        assert mp.read_bytes(name) == expected
        for _ in range(20):
            start, stop = sorted(rng.choices(range(size + 1), k=2))
            assert mp.read_bytes(name, start, stop) == expected[start:stop], (name, start, stop)


def test_a_failed_opening_leaves_no_open_files(folder: Path) -> None:
    path = folder / "model1-mp2.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    before = len(os.listdir("/dev/fd"))
    with pytest.raises(InputError, match="truncated"):
        open_checkpoint(folder)
    assert len(os.listdir("/dev/fd")) == before


def test_the_config_in_the_releases_terms(source: Path, folder: Path) -> None:
    hf, mp = (Config.from_json(open_checkpoint(path).config) for path in (source, folder))
    assert hf == mp


def test_a_config_without_a_key(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["o_groups"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="o_groups is missing"):
        open_checkpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json is missing"):
        open_checkpoint(folder)


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "model1-mp2.safetensors").unlink()
    with pytest.raises(InputError, match=r"model1-mp2\.safetensors is missing"):
        open_checkpoint(folder)


def test_files_of_two_conversions(folder: Path) -> None:
    (folder / "model0-mp4.safetensors").write_bytes((folder / "model0-mp2.safetensors").read_bytes())
    with pytest.raises(InputError, match="2 and 4 ranks"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["layers.0.attn.wo_b.weight", "head.weight", "layers.0.ffn.experts.3.w1.weight"])
def test_a_slice_that_is_missing(name: str, folder: Path) -> None:
    path = folder / "model1-mp2.safetensors"
    tensors = read_file(path)
    if ".experts." in name:
        tensors[name.replace("experts.3", "experts.0")] = tensors[name]  # rank 0 has that one
    else:
        del tensors[name]
    write_file(path, tensors)
    with pytest.raises(InputError, match="rank files"):
        open_checkpoint(folder)


def test_a_slice_of_another_shape(folder: Path) -> None:
    path = folder / "model1-mp2.safetensors"
    tensors = read_file(path)
    head = tensors["head.weight"]
    narrow = Raw(head.dtype, (head.shape[0], head.shape[1] // 2), head.data[: len(head.data) // 2])
    write_file(path, tensors | {"head.weight": narrow})
    with pytest.raises(InputError, match="do not fit"):
        open_checkpoint(folder)


def logits(folder: Path) -> torch.Tensor:
    model = load(folder, simulation=False)
    result = model.forward(torch.tensor([[3, 1, 4, 1, 5]]), model.new_cache(1)).logits
    assert result is not None
    return result


def test_python_loads_them_too(source: Path, folder: Path) -> None:
    """`load` opens what `dsv4 run` opens."""
    assert torch.equal(logits(source), logits(folder))
