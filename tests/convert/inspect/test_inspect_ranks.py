"""`dsv4 inspect` of the reference engine's rank files: the release that they are slices of."""

import json
from pathlib import Path
from typing import Any

import pytest
from hub_servers import HubServer, run_dsv4

from dsv4 import cli
from dsv4.convert.synthetic.checkpoint import Geometry, make_checkpoint

GEOMETRY = Geometry(compress_ratios=(0, 4, 128, 0), n_routed_experts=4)
CUT_BY_ROWS, CUT_BY_COLUMNS, WHOLE = (
    f"layers.0.{name}.weight" for name in ("attn.wq_b", "attn.wo_b", "ffn.experts.3.w1")
)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("release") / "checkpoint", geometry=GEOMETRY)


@pytest.fixture(scope="module", params=["same", "fp8"])
def ranks(release: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp("ranks") / "mp2"
    options = ["--to", request.param, "--layout", "mp", "--model-parallel", "2", "-q"]
    assert cli.run(["convert", str(release), str(folder), *options]) == 0
    return folder


def inspect(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> dict[str, Any]:
    assert cli.run(["inspect", str(folder), *arguments, "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_the_model_is_that_of_the_release(release: Path, ranks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, released = inspect(capsys, ranks), inspect(capsys, release)
    for key in ("architecture", "model_type", "parameters", "layers", "kv_cache", "weight_block_size"):
        assert found[key] == released[key], key
    assert found["form"] == "rank files of the reference engine" and found["shards"] == 2
    assert found["findings"] == released["findings"] == []
    assert found["converted_bytes"]["--to bf16"] == released["converted_bytes"]["--to bf16"]


@pytest.mark.parametrize("name", [CUT_BY_ROWS, CUT_BY_COLUMNS])
def test_a_tensor_of_which_each_rank_has_a_slice(
    name: str, release: Path, ranks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, released = (inspect(capsys, folder, "--tensor", name) for folder in (ranks, release))
    assert {**found, "shard": ""} == {**released, "shard": ""}


def test_the_files_that_hold_a_tensor_are_named(ranks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = "model0-mp2.safetensors, model1-mp2.safetensors"
    assert cli.run(["inspect", str(ranks), "--tensor", CUT_BY_ROWS]) == 0
    assert f"shard             {both}\n" in capsys.readouterr().out
    assert cli.run(["inspect", str(ranks), "--tensors", "layers.0.*"]) == 0
    listed = capsys.readouterr().out
    _, first, shared, second = listed.replace(f"{both}\n", "model0-mp2.safetensors\n").split(".safetensors\n")
    assert CUT_BY_COLUMNS in shared and WHOLE in second and "layers.0.attn.wkv.weight" in first


def test_what_the_engine_needs_and_is_not_there(
    ranks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((ranks / "config.json").read_text())
    for file in ranks.glob("*.safetensors"):
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "expert_dtype"}))
    found = [finding["text"] for finding in inspect(capsys, tmp_path)["findings"]]
    assert "missing: tokenizer.json, tokenizer_config.json" in found
    undeclared = "config.json has no expert_dtype and the experts are FP4: the reference engine assumes fp8"
    assert (undeclared in found) == ("expert_dtype" in config)


def test_a_rank_without_its_file(ranks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("config.json", "model1-mp2.safetensors"):
        (tmp_path / name).symlink_to(ranks / name)
    assert cli.run(["inspect", str(tmp_path)]) == 3
    assert "model0-mp2.safetensors is missing (1 of 2 rank files are)" in capsys.readouterr().err


@pytest.mark.slow
def test_rank_files_on_a_hub(ranks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    local = inspect(capsys, ranks)
    with HubServer() as server:
        server.publish("acme/Tiny-mp2", ranks)
        remote = json.loads(run_dsv4(server, tmp_path, "inspect", "hf:acme/Tiny-mp2", "--json").stdout)
        assert server.whole_shards() == []
    assert {**remote, "checkpoint": ""} == {**local, "checkpoint": ""}
