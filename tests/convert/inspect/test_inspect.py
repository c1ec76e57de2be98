"""`dsv4 inspect`: counts on the release's real dimensions, every finding by damage, one tensor against the formats."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hub_servers import HubServer, run_dsv4
from release_headers import FLASH, FLASH_PUBLISHED, PRO, PRO_PUBLISHED, make_released, released_tensors
from safetensors import safe_open
from safetensors.torch import save_file

from dsv4 import cli
from dsv4.convert.checkpoint.editions import table
from dsv4.convert.checkpoint.editions.kv_cache import CacheLayout, Compressed, Keeping
from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.checkpoint.weights import expert_formats, find_alike, find_weights
from dsv4.convert.inspect.findings import Finding, check_checkpoint
from dsv4.convert.inspect.inspection import as_json, inspect_checkpoint
from dsv4.convert.plan.plan import make_plan
from dsv4.convert.plan.settings import CONVERSIONS, resolve
from dsv4.convert.plan.sizes import OPTIONS, sizes_after_conversion
from dsv4.convert.synthetic.checkpoint import Geometry, V41Geometry, make_checkpoint
from dsv4.convert.synthetic.geometry import config

SMALL = Geometry(compress_ratios=(0, 4, 128, 0), n_routed_experts=4)
EXPERT = "layers.0.ffn.experts.0.w1.weight"
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("small") / "checkpoint", geometry=SMALL)


@pytest.fixture(scope="module")
def flash_facts(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return as_json(inspect_checkpoint(Checkpoint.open(make_released(tmp_path_factory.mktemp("flash"), FLASH))))


def inspect_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert cli.run(["inspect", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_flash_is_what_the_release_says(flash_facts: dict) -> None:
    facts = flash_facts
    assert (facts["tensors"], facts["bytes"]) == FLASH_PUBLISHED
    assert round(facts["parameters"]["total"] / 1e9) == 284
    assert round(facts["parameters"]["active"] / 1e9) == 13
    assert facts["layers"] == {
        "total": 43,
        "sliding": 2,
        "csa": 21,
        "hca": 20,
        "compressed": 0,
        "hash": 3,
        "score": 40,
        "mtp": 1,
    }
    assert {name: amount["tensors"] for name, amount in facts["dtypes"].items()} == {
        "BF16": 433, "F32": 417, "I64": 3, "F8_E4M3": 375, "F8_E8M0": 34_167, "I8": 33_792
    }  # fmt: skip
    assert sum(amount["bytes"] for amount in facts["dtypes"].values()) == facts["bytes"]
    assert sum(amount["bytes"] for amount in facts["families"].values()) == facts["bytes"]
    assert facts["findings"] == []


@pytest.mark.slow
def test_pro_is_what_the_release_says(small: Path) -> None:
    pro = replace(Checkpoint.open(small), config_json=config(PRO), tensors=released_tensors(PRO))
    facts = as_json(inspect_checkpoint(pro))
    assert (facts["tensors"], facts["bytes"]) == PRO_PUBLISHED
    assert round(facts["parameters"]["total"] / 1e12, 1) == 1.6
    assert round(facts["parameters"]["active"] / 1e9) == 49
    assert facts["layers"] == {
        "total": 61,
        "sliding": 0,
        "csa": 30,
        "hca": 31,
        "compressed": 0,
        "hash": 3,
        "score": 58,
        "mtp": 1,
    }
    share = facts["kv_cache"]["share_of_deepseek_v3_2_at_1048576"]
    assert round(share["FP8 latent, BF16 rotary, FP8 index keys"], 2) == 0.10
    assert [finding["level"] for finding in facts["findings"]] == ["note"]  # the small one's index has another total


@pytest.mark.slow
def test_kv_cache_by_the_definition(flash_facts: dict) -> None:
    facts = flash_facts
    entry, index_key = 448 + 2 * 64, 128 // 2 + 128 // 32
    for tokens in (8192, 131072, 393216, 1048576):
        window = 43 * 128 * entry
        compressed = (21 * tokens // 4 + 20 * tokens // 128) * entry
        assert facts["kv_cache_bytes"][str(tokens)] == window + compressed + 21 * tokens // 4 * index_key
    million = facts["kv_cache_bytes"]["1048576"]
    share = facts["kv_cache"]["share_of_deepseek_v3_2_at_1048576"]
    assert share["BF16 latent and rotary, no index keys"] == million / (61 * 2 * 576 * 2**20)
    assert round(share["FP8 latent, BF16 rotary, FP8 index keys"], 2) == 0.07


def test_kv_cache_of_v41_by_the_definition(tmp_path: Path) -> None:
    """As the release counts: 890 bytes a token beyond the window, (288 + 68) for each source and group."""
    geometry = V41Geometry(
        compress_ratios=(0, 2, 2, 2, 1, 0, 0, 0), kv_source_layer_ids=(1, 2, 3, 4), index_source_layer_ids=(1, 2, 3, 4),
        candidate_source_layer_id=4, head_dim=512, index_head_dim=128, engram_layer_ids=(), engram_num_embeddings=(),
        dspark_target_layer_ids=(4,),
    )  # fmt: skip
    facts = as_json(inspect_checkpoint(Checkpoint.open(make_checkpoint(tmp_path / "c", geometry=geometry))))
    for tokens in (8192, 1048576):
        assert facts["kv_cache_bytes"][str(tokens)] == tokens * 890 + 5 * 16 * 528
    assert facts["findings"] == []


def test_kv_cache_of_a_later_edition_is_what_its_row_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cache(config: dict[str, int], layers: Sequence[Keeping]) -> CacheLayout:
        return CacheLayout(len(layers), config["sliding_window"], 3, 5, 7, (Compressed(2, 11),), "three")

    monkeypatch.setattr(table, "EDITIONS", (table.Edition("V4.2", ("deepseek_v42",), kv_cache=cache), *table.EDITIONS))
    folder = make_checkpoint(tmp_path / "c", geometry=Geometry(compress_ratios=(0, 0, 0), sliding_window=16))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "deepseek_v42"}))
    facts = as_json(inspect_checkpoint(Checkpoint.open(folder)))
    assert facts["kv_cache_bytes"]["8192"] == 2 * 16 * 3 + 4096 * 11 and facts["kv_cache"]["index_key_bytes"] == 7


def test_parameters_of_v41_leave_the_tables_out(tmp_path: Path) -> None:
    folder, g = make_checkpoint(tmp_path / "c", geometry=V41Geometry()), V41Geometry()
    parameters = as_json(inspect_checkpoint(Checkpoint.open(folder)))["parameters"]
    tables = sum(g.engram_num_embeddings) * g.engram_head_dim + g.vocab_size * g.hidden_size
    unchosen = g.num_hidden_layers * (g.n_routed_experts - g.num_experts_per_tok)
    unchosen_in_drafts = 3 * (g.dspark_n_routed_experts - g.dspark_num_experts_per_tok)
    expert = 3 * g.hidden_size * g.moe_intermediate_size
    assert parameters["total"] - parameters["active"] == tables + unchosen * expert
    assert parameters["mtp_total"] - parameters["mtp_active"] == unchosen_in_drafts * expert


def test_signs_of_two_editions_are_a_problem(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", geometry=V41Geometry(engram_layer_ids=(), engram_num_embeddings=()))
    checkpoint = Checkpoint.open(folder)
    v4 = config(SMALL)
    facts = as_json(inspect_checkpoint(replace(checkpoint, config_json=v4)))
    texts = [finding["text"] for finding in facts["findings"] if finding["level"] == "problem"]
    assert any("describes V4 (" in text and "is a tensor of V4.1" in text for text in texts), texts


@pytest.mark.slow
def test_sizes_after_conversion(flash_facts: dict, small: Path, tmp_path: Path) -> None:
    sizes = flash_facts["converted_bytes"]
    assert sizes["--to fp8"] == sizes["--to fp8 --target vllm"] == 292_555_345_480  # published for Flash-Base
    assert sizes["--to fp8 --target sglang"] == sizes["--to fp8 --target transformers"] < sizes["--to fp8"]
    base = make_checkpoint(tmp_path / "base", geometry=SMALL, experts="fp8")
    forms = sum(conversion.has_own_form and not conversion.joins for conversion in CONVERSIONS.values())
    for folder, conversions in ((small, 5 + forms), (base, 6 + forms)):
        checkpoint = Checkpoint.open(folder)
        weights = find_weights(checkpoint.tensors, checkpoint.config)
        sizes = sizes_after_conversion(checkpoint, find_alike(checkpoint.tensors, weights))
        assert len(sizes) == conversions
        for options, (to, target) in OPTIONS.items():
            if options in sizes:
                plan = make_plan(checkpoint, resolve(to, target=target))
                assert sizes[options] == sum(shard.data_bytes for shard in plan.shards)


def test_parameters_are_elements(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = inspect_json(capsys, str(small))
    total = active = mtp = 0
    for path in small.glob("*.safetensors"):
        with safe_open(path, "np") as file:
            for name in file.keys():
                stored = file.get_slice(name)
                if name.endswith((".scale", "tid2eid")):
                    continue
                count = int(np.prod(stored.get_shape())) * (2 if stored.get_dtype() == "I8" else 1)
                mtp += count if name.startswith("mtp.") else 0
                if not name.startswith("mtp."):
                    total += count
                    unchosen = ".experts.3." in name  # 3 of 4 are chosen, all are of one size
                    active += 0 if unchosen or name == "embed.weight" else count
    assert facts["parameters"]["total"] == total
    assert facts["parameters"]["active"] == active
    assert facts["parameters"]["mtp_total"] == mtp


def test_base_has_the_same_parameters(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_checkpoint(tmp_path / "base", geometry=SMALL, experts="fp8")
    facts = inspect_json(capsys, str(base))
    assert facts["parameters"] == inspect_json(capsys, str(small))["parameters"]
    assert facts["experts"] == {"stored": ["fp8"], "declared": "fp8"}
    assert facts["findings"] == []


def test_a_single_file(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = small / "model-00002-of-00006.safetensors"
    facts = inspect_json(capsys, str(shard))
    with safe_open(shard, "np") as file:
        assert facts["tensors"] == len(file.keys())
    assert facts["layers"]["sliding"] == facts["layers"]["hash"] == facts["layers"]["total"] == 1
    assert facts["parameters"]["active"] is None
    assert facts["kv_cache_bytes"] is None


def test_text_fits_eighty_columns(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--tensors"], ["--tensor", EXPERT], ["--tensor", "layers.1.attn.wq_a.weight"]):
        assert cli.run(["inspect", str(small), *arguments]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines
        assert max(map(len, lines if arguments else lines[1:])) <= 80  # the first line of the report is a path


def test_list_of_tensors(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = inspect_json(capsys, str(small), "--tensors", "layers.1.attn.w*_a.*")
    listed = {tensor["name"]: tensor for tensor in facts["tensors"]}
    assert sorted(listed) == [f"layers.1.attn.{m}.{k}" for m in ("wo_a", "wq_a") for k in ("scale", "weight")]
    shard = "model-00003-of-00006.safetensors"
    assert listed["layers.1.attn.wq_a.weight"] == {
        "name": "layers.1.attn.wq_a.weight", "dtype": "F8_E4M3", "shape": [128, 256], "shard": shard, "bytes": 32768
    }  # fmt: skip
    assert facts["bytes"] == sum(tensor["bytes"] for tensor in facts["tensors"])


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["layers.*"], 2, "--tensors"),
        (["--tensors", "--tensor", EXPERT], 2, "exclude"),
        (["--tensor", "layers.9.attn.wq_a.weight"], 3, "no tensor"),
        (["--tensor", "experts.0.w1"], 3, f"Did you mean {EXPERT}"),
    ],
)
def test_wrong_usage(
    small: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, text: str
) -> None:
    assert cli.run(["inspect", str(small), *arguments]) == code
    assert text in capsys.readouterr().err


def test_an_fp4_tensor(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    view = inspect_json(capsys, str(small), "--tensor", EXPERT)
    with safe_open(small / "model-00002-of-00006.safetensors", "pt") as file:
        packed = file.get_tensor(EXPERT).numpy().view(np.uint8)
        scale = file.get_tensor(EXPERT.replace("weight", "scale")).float().numpy()
    codes = np.stack((packed & 15, packed >> 4), -1).reshape(packed.shape[0], -1)
    values = np.array(E2M1)[codes] * scale.repeat(32, 1)
    assert view["shape"] == list(codes.shape)
    assert view["codes"] == codes[:4, :6].tolist()
    assert view["values"] == values[:4, :6].tolist()
    assert view["scales"] == scale[:4, :6].tolist()
    assert view["code_counts"] == {str(code): count for code, count in sorted(Counter(codes.ravel().tolist()).items())}
    assert view["negative_zeros"] == int((codes == 8).sum())
    assert view["zeros"] == int((values == 0).sum())
    assert (view["minimum"], view["maximum"]) == (values.min(), values.max())
    exponents = Counter(np.floor(np.log2(np.abs(values[values != 0]))).astype(int).tolist())
    assert {int(key): count for key, count in view["value_exponents"].items()} == exponents
    scales = Counter(np.log2(scale).astype(int).ravel().tolist())
    assert {int(key): count for key, count in view["scale_exponents"].items()} == scales


@pytest.mark.parametrize("name", ["layers.1.attn.wq_b.weight", "layers.0.ffn.shared_experts.w2.weight"])
def test_an_fp8_tensor_in_pieces(
    small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("dsv4.convert.inspect.tensor_view.CHUNK_ELEMENTS", 1)  # one row of blocks at a time
    view = inspect_json(capsys, str(small), "--tensor", name)
    (path,) = (p for p in small.glob("*.safetensors") if name in safe_open(p, "pt").keys())
    with safe_open(path, "pt") as file:
        codes = file.get_tensor(name).view(dtype=torch.uint8).numpy()
        scale = file.get_tensor(name.replace("weight", "scale")).float().numpy()
    values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale.repeat(128, 0).repeat(128, 1)
    assert view["elements"] == values.size
    assert view["values"] == values[:4, :6].tolist()
    assert view["codes"] == codes[:4, :6].tolist()
    assert (view["minimum"], view["maximum"]) == (values.min(), values.max())
    assert view["root_mean_square"] == pytest.approx(np.sqrt(np.square(values).mean()), rel=1e-12)


@pytest.mark.parametrize("name", ["layers.0.ffn.gate.tid2eid", "layers.0.hc_attn_scale", "layers.1.attn.wq_a.scale"])
def test_other_tensors(small: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    view = inspect_json(capsys, str(small), "--tensor", name)
    assert view["elements"] == np.prod(view["shape"])
    assert view["scale"] is None
    assert cli.run(["inspect", str(small), "--tensor", name]) == 0


def without(*names: str) -> Callable[[Checkpoint], Checkpoint]:
    return lambda c: replace(c, tensors={n: t for n, t in c.tensors.items() if n not in names})


def changed(name: str, **fields: object) -> Callable[[Checkpoint], Checkpoint]:
    return lambda c: replace(c, tensors=c.tensors | {name: c.tensors[name]._replace(**fields)})


def configured(**keys: object) -> Callable[[Checkpoint], Checkpoint]:
    return lambda c: replace(c, config_json={k: v for k, v in (c.config_json | keys).items() if v is not ...})


QUANTIZATION = {"quant_method": "fp8", "weight_block_size": [32, 32]}
DAMAGE = [
    (without(EXPERT.replace("weight", "scale")), "problem", f"{EXPERT}: I8 weight without a block scale"),
    (without(EXPERT), "problem", f"{EXPERT}: missing"),
    (without(EXPERT), "problem", "a block scale without its weight"),
    (without("layers.1.attn.compressor.ape"), "problem", "layers.1.attn.compressor.ape: missing"),
    (changed(EXPERT.replace("weight", "scale"), shape=(128, 4)), "problem", "block scale of shape [128, 4]"),
    (changed(EXPERT.replace("weight", "scale"), dtype="BF16"), "problem", "block scale of dtype BF16"),
    (changed("layers.0.attn.wkv.weight", shape=(64, 256)), "problem", "shape [64, 256], the config asks for"),
    (changed("head.weight", shape=(511, 256)), "problem", "head.weight: shape [511, 256]"),
    (configured(quantization_config=QUANTIZATION), "problem", "block scale of shape"),
    (configured(quantization_config=...), "problem", "quantization_config does not say quant_method fp8"),
    (configured(expert_dtype="fp8"), "problem", "config.json says expert_dtype fp8, the experts are fp4"),
    (configured(expert_dtype=...), "problem", "config.json has no expert_dtype and the experts are FP4"),
    (configured(hidden_size="wide"), "problem", "config.json lacks hidden_size"),
    (configured(num_hidden_layers=9), "problem", "compress_ratios: 4 entries"),
    (configured(compress_ratios=[0, 4, 4, 0]), "problem", "layers.2.attn.indexer.wq_b.weight: missing"),
    (configured(num_hash_layers=0), "problem", "layers.0.ffn.gate.bias: missing"),
    (configured(n_routed_experts=5), "problem", "layers.0.ffn.experts.4.w1.weight (and 2 more like it): missing"),
    (configured(n_routed_experts=3), "note", "not a tensor of the architecture"),
    (configured(n_routed_experts=2**39), "problem", "not believable"),
    (configured(model_type="llama"), "note", "not checked against the config"),
]


def findings(checkpoint: Checkpoint) -> list[Finding]:
    weights = find_weights(checkpoint.tensors, checkpoint.config)
    return check_checkpoint(checkpoint, weights, expert_formats(weights.values()))


@pytest.mark.parametrize(("damage", "level", "text"), DAMAGE)
def test_check_checkpoint(small: Path, damage: Callable[[Checkpoint], Checkpoint], level: str, text: str) -> None:
    checkpoint = Checkpoint.open(small)
    assert findings(checkpoint) == []
    found = findings(damage(checkpoint))
    assert [f for f in found if f.level == level and text in f.text], found


def test_files_that_look_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_checkpoint(
        tmp_path / "c", geometry=Geometry(compress_ratios=(0, 0), n_routed_experts=4), tokenizer=False
    )
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["metadata"]["total_size"] += 1
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    texts = [finding["text"] for finding in inspect_json(capsys, str(folder))["findings"]]
    assert any("tokenizer.json" in text for text in texts)
    assert any("total_size" in text for text in texts)


def test_bad_input(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\0" * 64)
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    for path, message in ((broken, "the header is empty"), (text, "not a .safetensors"), (tmp_path, "neither")):
        assert cli.run(["inspect", str(path)]) == 3
        assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("value", [None, True, -1, 0, 2**70, 1.5, "text", [], {}, [[1]], {"a": 1}])
def test_no_config_makes_it_crash(small: Path, value: object) -> None:
    checkpoint = Checkpoint.open(small)
    other = ("text_config", "rope_parameters", "layer_types", "mlp_layer_types", "compress_rates", "dtype")
    for key in (*checkpoint.config_json, *other):
        facts = as_json(inspect_checkpoint(replace(checkpoint, config_json=checkpoint.config_json | {key: value})))
        json.dumps(facts, allow_nan=False)
    inner = checkpoint.config["quantization_config"] | {"weight_block_size": value, "quant_method": value}
    inspect_checkpoint(replace(checkpoint, config_json=checkpoint.config_json | {"quantization_config": inner}))


def test_infinities_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "odd.safetensors"
    save_file({"odd.weight": torch.tensor([float("inf"), float("nan"), -0.0, 1.0]), "empty": torch.zeros(0, 4)}, path)
    view = inspect_json(capsys, str(path), "--tensor", "odd.weight")
    assert view["values"] == [["inf", "nan", 0.0, 1.0]]
    assert (view["nans"], view["zeros"], view["negative_zeros"], view["maximum"]) == (1, 1, 1, "inf")
    assert inspect_json(capsys, str(path), "--tensor", "empty")["elements"] == 0
    assert cli.run(["inspect", str(path), "--tensor", "odd.weight"]) == 0
    assert cli.run(["inspect", str(path), "--tensor", "empty"]) == 0


def test_a_rank_file(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--to", "same", "--layout", "mp", "--model-parallel", "1", "-q"]
    assert cli.run(["convert", str(small), str(tmp_path / "ranks"), *options]) == 0
    rank = str(tmp_path / "ranks" / "model0-mp1.safetensors")
    facts, source = inspect_json(capsys, rank), inspect_json(capsys, str(small))
    assert facts["experts"]["stored"] == ["fp4"]
    assert facts["parameters"]["total"] == source["parameters"]["total"]
    view, released = (inspect_json(capsys, where, "--tensor", EXPERT) for where in (rank, str(small)))
    assert view["dtype"] == "F4"
    same = ("shape", "values", "codes", "scales", "code_counts", "value_exponents", "root_mean_square")
    assert {key: view[key] for key in same} == {key: released[key] for key in same}


@pytest.mark.parametrize("hub", ["hf", "ms"])
@pytest.mark.slow
def test_a_checkpoint_on_a_hub(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], hub: str) -> None:
    local = inspect_json(capsys, str(small)), inspect_json(capsys, str(small), "--tensor", EXPERT)
    with HubServer() as server:
        server.publish("acme/Tiny-V4", small)
        remote = [
            json.loads(run_dsv4(server, tmp_path, "inspect", f"{hub}:acme/Tiny-V4", *arguments, "--json").stdout)
            for arguments in ([], ["--tensor", EXPERT])
        ]
        assert server.whole_shards() == []  # by range requests
    assert remote[0].pop("checkpoint").startswith(f"{hub}:acme/Tiny-V4@")  # and the commit
    assert remote[0] == {key: value for key, value in local[0].items() if key != "checkpoint"}
    assert remote[1] == local[1]
    assert not list(tmp_path.rglob("*.safetensors*"))
