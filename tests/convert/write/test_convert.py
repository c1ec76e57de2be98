"""`dsv4 convert` end to end: every option on every kind of source, judged by decoding both sides with ml_dtypes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoint_variants import SMALL, V41_BLOCK, VARIANTS, odd_scales, strangers, upcast
from exact_values import (
    INDEX,
    convert,
    different_values,
    dsv4,
    edit_tensors,
    experts,
    is_expert,
    packed_codes,
    read_json,
    scale_of,
    sha256,
    tensors_of,
    tree,
    values,
    weights,
)
from patience import LONG
from raw_safetensors import Raw, Tensors, prefix_sha256, read_file, read_folder

import dsv4 as package
from dsv4.convert.synthetic.checkpoint import Geometry, make_checkpoint

E8M0, F32 = "F8_E8M0", "F32"
# What each engine loads, after published FP8 checkpoints and the loaders: scale dtype, wo_a, expert_dtype (or no key).
ENGINES = {
    "base": (F32, "fp8", "fp8"),
    "vllm": (F32, "fp8", "fp8"),
    "sglang": (E8M0, "fp8", None),
    "transformers": (E8M0, "fp8", "fp8"),
    "reference": (E8M0, "fp8", None),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return {name: make(folder / name) for name, make in VARIANTS.items()}


def block_of(variant: str) -> tuple[int, int]:
    return V41_BLOCK if variant == "v41" else (128, 128)


def expected_dtypes(source: Tensors, to: str, scale: str | None, wo_a: str | None) -> dict[str, str]:
    """Name and dtype of every output tensor. scale, wo_a: None leaves the source's."""
    found: dict[str, str] = {}
    for name in weights(source):
        dtype, side = source[name].dtype, scale_of(name, source)
        scale_name = name.removesuffix(".weight") + ".scale"
        quantized = side is not None and dtype in ("I8", "F4", "F8_E4M3")
        if side is None or not quantized:
            found |= {name: dtype} | ({scale_name: side.dtype} if side else {})
        elif to == "bf16" or (wo_a == "bf16" and name.endswith(".attn.wo_a.weight")):
            found[name] = "BF16"
        elif is_expert(name) and to == "fp8" and dtype == "I8":
            found |= {name: "F8_E4M3", scale_name: scale or E8M0}
        elif is_expert(name) and to == "fp4" and dtype == "F8_E4M3":
            found |= {name: "I8", scale_name: E8M0}
        else:
            found |= {name: dtype, scale_name: (scale or side.dtype) if dtype == "F8_E4M3" else side.dtype}
    return found


def check_shapes(output: Tensors, source: Tensors, block: tuple[int, int]) -> None:
    for name in weights(output):
        tensor, side = output[name], scale_of(name, output)
        packed = source[name].dtype == "I8" and scale_of(name, source) is not None
        shape = (*source[name].shape[:-1], 2 * source[name].shape[-1]) if packed else source[name].shape
        if tensor.dtype == "I8" and side is not None:
            assert (tensor.shape, side.shape) == ((shape[0], shape[1] // 2), (shape[0], -(-shape[1] // 32)))
        else:
            assert tensor.shape == shape, name
        if tensor.dtype == "F8_E4M3" and side is not None and ".engram.embed" not in name:
            assert side.shape == (-(-shape[0] // block[0]), -(-shape[1] // block[1])), name


def check_files(output: Path) -> None:
    """Names, index, header order and alignment: what the ecosystem expects of a folder."""
    files = sorted(path.name for path in output.glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    index = read_json(output / INDEX)
    by_shard = read_folder(output)
    assert index["weight_map"] == {name: file for file, tensors in by_shard.items() for name in tensors}
    assert list(index["weight_map"]) == sorted(index["weight_map"])
    assert index["metadata"] == {"total_size": sum(len(t.data) for t in tensors_of(output).values())}
    order = ["I64", "F32", "BF16", E8M0, "F8_E4M3", "I8", "U8", "F4"]
    for file, tensors in by_shard.items():
        keys = [(order.index(t.dtype), name) for name, t in tensors.items()]
        assert keys == sorted(keys), file
        length = int.from_bytes((output / file).read_bytes()[:8], "little")
        assert (8 + length) % 8 == 0
        assert "__metadata__" not in json.loads((output / file).read_bytes()[8 : 8 + length])


def check_manifest(output: Path, source: Path) -> None:
    """Every hash of dsv4.json, computed again from the files."""
    manifest, made, given = read_json(output / "dsv4.json"), tensors_of(output), tensors_of(source)
    assert (manifest["format"], manifest["dsv4_version"]) == (3, package.__version__)
    assert manifest["digests"] == {"files": "sha256", "tensors": "sha256 of the file up to the tensor's last byte"}
    for name, said in {**manifest["shards"], **manifest["files"]}.items():
        data = (output / name).read_bytes()
        assert said == {"size": len(data), "sha256": sha256(data)}, name
    there = set(tree(output)) - {path for path, kind in tree(output).items() if kind == "folder"}
    assert {*manifest["shards"], *manifest["files"], "dsv4.json"} == there
    assert manifest["tensors"].keys() == made.keys()
    prefixes = {shard: prefix_sha256(output / shard) for shard in manifest["shards"]}
    for name, entry in manifest["tensors"].items():
        tensor, old = made[name], given[entry["source_name"]]
        assert (entry["dtype"], entry["shape"]) == (tensor.dtype, list(tensor.shape))
        assert (entry["source_dtype"], entry["source_shape"]) == (old.dtype, list(old.shape))
        assert entry.get("prefix_sha256") == prefixes[entry["shard"]].get(name), name
        assert name in read_file(output / entry["shard"])
        if entry["dtype"] == entry["source_dtype"] and not (scale_of(name, given) and tensor.data != old.data):
            assert tensor.data == old.data, name
    for name, shard in manifest["source"]["shards"].items():
        data = (source / name).read_bytes()
        header = data[: 8 + int.from_bytes(data[:8], "little")]
        assert shard == {"size": len(data), "header_sha256": sha256(header)}
    assert manifest["source"]["config_sha256"] == sha256((source / "config.json").read_bytes())


CASES = [
    ("release", "fp8", (), F32, "fp8"),
    *[("release", "fp8", ("--target", name), scale, wo_a) for name, (scale, wo_a, _) in ENGINES.items()],
    ("release", "fp8", ("--scale-dtype", "e8m0", "--wo-a", "bf16"), E8M0, "bf16"),
    ("release", "fp8", ("--target", "sglang", "--scale-dtype", "f32", "--wo-a", "bf16"), F32, "bf16"),
    ("release", "bf16", (), None, "bf16"),
    ("release", "same", (), None, None),
    ("release", "same", ("--target", "sglang", "--wo-a", "bf16"), E8M0, "bf16"),
    ("release", "same", ("--scale-dtype", "f32"), F32, None),
    ("release", "fp4", (), E8M0, "fp8"),
    ("base", "fp8", (), F32, "fp8"),
    ("base", "fp8", ("--target", "sglang", "--wo-a", "bf16"), E8M0, "bf16"),
    ("base", "bf16", (), None, "bf16"),
    ("base", "same", (), None, None),
    ("base", "same", ("--scale-dtype", "e8m0"), E8M0, None),
    ("ragged", "fp8", (), F32, "fp8"),
    ("ragged", "fp8", ("--target", "sglang", "--wo-a", "bf16"), E8M0, "bf16"),
    ("ragged", "bf16", (), None, "bf16"),
    ("scattered", "fp8", (), F32, "fp8"),
    ("early", "fp8", ("--target", "transformers"), E8M0, "fp8"),
    ("strangers", "fp8", (), F32, "fp8"),
    ("strangers", "bf16", (), None, "bf16"),
    ("strangers", "same", (), None, None),
    ("v41", "fp8", (), F32, "fp8"),
    ("v41", "fp8", ("--target", "sglang", "--wo-a", "bf16"), E8M0, "bf16"),
    ("v41", "bf16", (), None, "bf16"),
]


@pytest.mark.parametrize(("variant", "to", "options", "scale", "wo_a"), CASES, ids=lambda v: str(v).replace("'", ""))
@pytest.mark.fast_cases(4)
def test_every_value_stays(
    variant: str, to: str, options: tuple[str, ...], scale: str | None, wo_a: str | None,
    sources: dict[str, Path], tmp_path: Path,
) -> None:  # fmt: skip
    source, output = sources[variant], tmp_path / "out"
    before = tree(source)
    convert(source, output, "--to", to, *options)
    old, new = tensors_of(source), tensors_of(output)
    assert {name: tensor.dtype for name, tensor in new.items()} == expected_dtypes(old, to, scale, wo_a)
    check_shapes(new, old, block_of(variant))
    odd = [name for name in old if name.startswith(("zzz", "größe"))]
    known = {name: tensor for name, tensor in old.items() if name not in odd}
    assert different_values(known, new, block_of(variant)) == []
    unchanged = [name for name in weights(old) if new[name].dtype == old[name].dtype]
    assert [name for name in unchanged if new[name] != old[name]] == []
    assert all(new[name] == old[name] for name in odd)
    check_files(output)
    check_manifest(output, source)
    assert tree(source) == before


def test_unknown_tensors_keep_their_bytes(sources: dict[str, Path], tmp_path: Path) -> None:
    """Whatever name, dtype or shape: empty, scalar, half bytes, NaN payloads."""
    convert(sources["strangers"], tmp_path / "out")
    new = tensors_of(tmp_path / "out")
    assert {name: new[name] for name in strangers()} == strangers()


def test_tensors_of_a_draft_block_are_cast_too(sources: dict[str, Path], tmp_path: Path) -> None:
    convert(sources["release"], tmp_path / "out")
    new = tensors_of(tmp_path / "out")
    assert {new[name].dtype for name in experts(new) if name.startswith("mtp.0.")} == {"F8_E4M3"}


def test_signs_of_zero_are_there_to_be_kept(sources: dict[str, Path], tmp_path: Path) -> None:
    """About 6% of the codes are -0: the comparisons above would be empty promises without any."""
    convert(sources["release"], tmp_path / "out")
    old, new = tensors_of(sources["release"]), tensors_of(tmp_path / "out")
    manifest = read_json(tmp_path / "out" / "dsv4.json")
    for name in experts(old):
        count = int((packed_codes(old[name]) == 8).sum())
        assert count > 100
        assert int((new[name].array() == 0x80).sum()) == count
        assert manifest["tensors"][name]["negative_zeros"] == count
    assert manifest["summary"]["negative_zeros"] == sum(int((packed_codes(old[n]) == 8).sum()) for n in experts(old))


def reference_bytes(scale: Raw) -> np.ndarray:
    """The reference's block scales, 128 x 128: the largest group scale of a block less 6."""
    groups = scale.array().astype(int)
    rows, columns = range(0, groups.shape[0], 128), range(0, groups.shape[1], 4)
    return np.array([[groups[r : r + 128, c : c + 4].max() - 6 for c in columns] for r in rows])


def test_block_scales_are_the_references(sources: dict[str, Path], tmp_path: Path) -> None:
    for variant in ("release", "ragged", "scattered"):
        convert(sources[variant], tmp_path / variant, "--scale-dtype", "e8m0")
        old, new = tensors_of(sources[variant]), tensors_of(tmp_path / variant)
        for name in experts(old):
            given, made = scale_of(name, old), scale_of(name, new)
            assert given and made and (made.array() == reference_bytes(given)).all()


@pytest.mark.slow
def test_an_upcast_checkpoint_goes_back_to_fp4(sources: dict[str, Path], tmp_path: Path) -> None:
    """FP8 -> FP4 of values that came from FP4 by any converter, dsv4 included."""
    stranger = upcast(tmp_path / "upcast", sources["release"])
    convert(sources["release"], tmp_path / "ours")
    release = tensors_of(sources["release"])
    for source in (stranger, tmp_path / "ours"):
        output = tmp_path / (source.name + "-fp4")
        convert(source, output, "--to", "fp4")
        new = tensors_of(output)
        assert {new[name].dtype for name in experts(new)} == {"I8"}
        assert different_values({n: t for n, t in release.items() if ".experts." in n}, new) == []
        assert read_json(output / "config.json")["expert_dtype"] == "fp4"
        assert read_json(output / "dsv4.json")["summary"]["changed_elements"] == 0


def fp4_errors(old: np.ndarray, new: np.ndarray) -> tuple[int, float, float]:
    """Elements changed, relative RMS error, largest error."""
    difference = np.abs(new - old)
    return int((difference != 0).sum()), float(np.sqrt((difference**2).sum() / (old**2).sum())), float(difference.max())


@pytest.mark.slow
def test_fp8_that_never_was_fp4(sources: dict[str, Path], tmp_path: Path) -> None:
    """Refused, kept or rounded; rounding is nearest, and its error is reported per tensor."""
    source, old = sources["base"], tensors_of(sources["base"])
    code, _, err = dsv4("convert", source, tmp_path / "no", "--to", "fp4")
    assert (code, tree(tmp_path / "no")) == (3, {})
    assert experts(old)[0] in err and "relative RMS error" in err and "--on-inexact" in err
    said = convert(source, tmp_path / "kept", "--to", "fp4", "--on-inexact", "keep")
    kept = tensors_of(tmp_path / "kept")
    assert all(kept[name] == old[name] for name in experts(old)) and f"{len(experts(old))} tensors" in said
    said = convert(source, tmp_path / "rounded", "--to", "fp4", "--on-inexact", "round")
    assert "NOT exact" in said
    new, manifest = tensors_of(tmp_path / "rounded"), read_json(tmp_path / "rounded" / "dsv4.json")
    total = 0
    for name in experts(old):
        changed, rms, largest = fp4_errors(values(name, old), values(name, new))
        entry = manifest["tensors"][name]
        assert entry["changed_elements"] == changed > 0
        assert entry["relative_rms_error"] == pytest.approx(rms, rel=1e-12)  # float64 sums in another order
        assert entry["max_error"] == largest
        assert rms < 0.15  # uniform error within a half step of E2M1 (1/8 to 1/4 of a value) is about 0.1
        total += changed
    assert manifest["summary"]["changed_elements"] == total


@pytest.mark.slow
def test_float32_scales_that_are_no_powers_of_two(tmp_path: Path) -> None:
    source = odd_scales(tmp_path / "source")
    old = tensors_of(source)
    convert(source, tmp_path / "f32")
    assert tensors_of(tmp_path / "f32") == old
    code, _, err = dsv4("convert", source, tmp_path / "e8m0", "--scale-dtype", "e8m0")
    assert code == 3 and ".scale'" in err and "not a power of two" in err and "--scale-dtype f32" in err
    assert tree(tmp_path / "e8m0") == {}
    assert dsv4("convert", source, tmp_path / "bf16", "--to", "bf16")[0] == 3
    said = convert(source, tmp_path / "bf16", "--to", "bf16", "--on-inexact", "round")
    assert "NOT exact" in said
    check_rounded_once(old, tensors_of(tmp_path / "bf16"), read_json(tmp_path / "bf16" / "dsv4.json"))


def check_rounded_once(old: Tensors, new: Tensors, manifest: dict[str, dict[str, dict[str, int]]]) -> None:
    """ml_dtypes would round float64 to float32 first, so the nearest BF16 is found by trying both neighbours."""
    for name in weights(old):
        if old[name].dtype != "F8_E4M3":
            continue
        exact, made = values(name, old), values(name, new)
        bits = new[name].array()
        here = np.abs(made - exact)
        for step in (-1, 1):
            other = Raw("BF16", bits.shape, (bits + np.uint16(step % 2**16)).astype(np.uint16).tobytes())
            there = np.abs(values("x", {"x": other}) - exact)
            nearer = (there < here) | ((there == here) & (bits % 2 == 1))
            assert not (nearer & (made != 0)).any(), name
        assert (made[exact == 0] == 0).all() and (np.signbit(made) == np.signbit(exact)).all()
        assert manifest["tensors"][name].get("changed_elements", 0) == int((made != exact).sum())


@pytest.mark.parametrize("size", ["100kB", "300000", "1MiB"])
@pytest.mark.fast_cases(1)
def test_shards_are_no_larger_than_asked(size: str, sources: dict[str, Path], tmp_path: Path) -> None:
    limit = {"100kB": 10**5, "300000": 300000, "1MiB": 2**20}[size]
    output = tmp_path / "out"
    convert(sources["release"], output, "--max-shard-size", size)
    check_files(output)
    new = tensors_of(output)
    assert different_values(tensors_of(sources["release"]), new) == []
    shards = read_folder(output)
    assert len(shards) >= 3
    for tensors in shards.values():
        total = sum(len(t.data) for t in tensors.values())
        assert total <= limit or len(weights(tensors)) == 1
        assert all(scale_of(n, tensors) is not None for n in tensors if tensors[n].dtype == "F8_E4M3")


def test_shards_of_the_default_size_draw_on_two_source_shards(sources: dict[str, Path], tmp_path: Path) -> None:
    """So that a source on a hub needs room for two. Larger shards than the default merge as many as fit."""
    convert(sources["release"], tmp_path / "out")
    origin = {name: shard for shard, tensors in read_folder(sources["release"]).items() for name in tensors}
    drawn = [{origin[name] for name in tensors} for tensors in read_folder(tmp_path / "out").values()]
    assert max(map(len, drawn)) == 2
    assert len(drawn) == -(-len(set(origin.values())) // 2)
    convert(sources["release"], tmp_path / "merged", "--max-shard-size", "6GB")
    assert sorted(read_folder(tmp_path / "merged")) == ["model-00001-of-00001.safetensors"]


class TestConfig:
    @pytest.mark.parametrize("target", ENGINES)
    @pytest.mark.parametrize("variant", ["release", "early", "base"])
    @pytest.mark.fast_cases(1)
    def test_per_target(self, target: str, variant: str, sources: dict[str, Path], tmp_path: Path) -> None:
        convert(sources[variant], tmp_path / "out", "--target", target)
        old, new = read_json(sources[variant] / "config.json"), read_json(tmp_path / "out" / "config.json")
        wanted = ENGINES[target][2]
        expected = old | {"expert_dtype": wanted} if wanted else {k: v for k, v in old.items() if k != "expert_dtype"}
        assert list(new.items()) == list(expected.items())
        inner = read_json(tmp_path / "out" / "inference" / "config.json")
        given = read_json(sources[variant] / "inference" / "config.json")
        assert list(inner.items()) == [(k, v) for k, v in given.items() if k != "expert_dtype"]

    def test_bf16_has_no_quantization(self, sources: dict[str, Path], tmp_path: Path) -> None:
        convert(sources["release"], tmp_path / "out", "--to", "bf16")
        old, new = read_json(sources["release"] / "config.json"), read_json(tmp_path / "out" / "config.json")
        gone = ("expert_dtype", "quantization_config")
        assert list(new.items()) == [(k, v) for k, v in old.items() if k not in gone]

    @pytest.mark.parametrize("target", ["base", "sglang"])
    def test_inside_quantization_config(self, target: str, sources: dict[str, Path], tmp_path: Path) -> None:
        convert(sources["v41"], tmp_path / "out", "--target", target)
        old, new = read_json(sources["v41"] / "config.json"), read_json(tmp_path / "out" / "config.json")
        quantization = dict(old["quantization_config"])
        if target == "base":
            quantization["expert_dtype"] = "fp8"
        else:
            del quantization["expert_dtype"]
        assert json.dumps(new) == json.dumps(old | {"quantization_config": quantization})

    def test_same_keeps_every_byte(self, sources: dict[str, Path], tmp_path: Path) -> None:
        convert(sources["early"], tmp_path / "out", "--to", "same")
        for name in ("config.json", "inference/config.json"):
            assert (tmp_path / "out" / name).read_bytes() == (sources["early"] / name).read_bytes()


def test_caveats_of_the_engine_are_said(sources: dict[str, Path], tmp_path: Path) -> None:
    said = {"sglang": "WO_A_GEMM=0", "vllm": "MegaMoE", "transformers": "mtp", "reference": "rank files"}
    for target, word in said.items():
        lines = convert(sources["release"], tmp_path / target, "--target", target, "--wo-a", "bf16").splitlines()
        assert [line for line in lines if word in line and line.startswith("note: ")]  # no warning: nothing to do
    assert "SGLANG" not in convert(sources["release"], tmp_path / "fp8", "--target", "sglang")


def test_the_closing_lines(sources: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "out folder"
    said = convert(sources["release"], output)
    size = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    assert re.search(r"[\d.]+ MB -> [\d.]+ MB in 2 shards, [\d.]+ s, [\d.]+ [MG]B/s, peak memory [\d.]+ [MG]B", said)
    assert f"{size / 1e6:.1f} MB in" in said
    blocks = sum(scale_of(n, tensors_of(output)).array().size for n in experts(tensors_of(output)))  # type: ignore[union-attr]
    assert f"every block exact: {blocks} blocks" in said
    assert f"dsv4 verify {sources['release']} '{output}'" in said


def test_json_is_one_object(sources: dict[str, Path], tmp_path: Path) -> None:
    code, out, err = dsv4("convert", sources["release"], tmp_path / "out", "--json")
    result = json.loads(out)
    assert (code, err) == (0, "")
    assert result["exact"] is True and result["already_done"] is False and result["kept_tensors"] == []
    assert result["output_bytes"] == sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    assert result["source_bytes"] == sum(p.stat().st_size for p in sources["release"].glob("*.safetensors"))


def test_quiet_says_nothing(sources: dict[str, Path], tmp_path: Path) -> None:
    assert dsv4("convert", sources["release"], tmp_path / "out", "-q") == (0, "", "")


class TestDryRun:
    def test_json(self, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("dsv4.commands.convert.command.free_bytes", lambda folder: 10**12)
        output, options = tmp_path / "deep" / "out", ("--max-shard-size", "1MB")
        code, out, _ = dsv4("convert", sources["release"], output, *options, "--dry-run", "--json")
        plan = json.loads(out)
        assert code == 0 and tree(tmp_path) == {}
        convert(sources["release"], output, *options)
        sizes = {path.name: path.stat().st_size for path in output.glob("*.safetensors")}
        assert (plan["shards"], plan["output_bytes"], plan["files"]) == (len(sizes), sum(sizes.values()), sizes)
        assert plan["source_bytes"] == sum(p.stat().st_size for p in sources["release"].glob("*.safetensors"))
        assert plan["tensors"] == len(tensors_of(output))
        assert plan["peak_memory_bytes"] > 0 and plan["free_bytes"] == 10**12

    def test_text(self, sources: dict[str, Path], tmp_path: Path) -> None:
        code, out, err = dsv4("convert", sources["release"], tmp_path / "out", "--dry-run", "-v")
        assert code == 0 and tree(tmp_path) == {}
        for word in ("source", "output", "shards", "free disk", "peak memory"):
            assert word in out
        assert "model-00001-of-00002.safetensors" in err

    def test_bounded_memory_is_planned(self, sources: dict[str, Path], tmp_path: Path) -> None:
        arguments = ("convert", sources["release"], tmp_path, "--dry-run", "--json", "--max-memory", "600MB")
        code, out, _ = dsv4(*arguments)
        assert code == 0 and json.loads(out)["peak_memory_bytes"] <= 600 * 10**6


def test_mp_of_eight_experts_has_a_share_each(tmp_path: Path) -> None:
    geometry = Geometry(vocab_size=64, compress_ratios=(0,), num_nextn_predict_layers=0, num_hash_layers=0)
    make_checkpoint(tmp_path / "source", geometry=geometry)
    convert(tmp_path / "source", tmp_path / "out", "--layout", "mp", "--model-parallel", "2")
    for rank in (0, 1):
        numbers = {int(n.split(".")[4]) for n in experts(read_file(tmp_path / "out" / f"model{rank}-mp2.safetensors"))}
        assert numbers == set(range(4 * rank, 4 * rank + 4))


@pytest.mark.slow
class TestAsAProgram:
    """Through the operating system: exit codes, streams, a pipe."""

    def call(self, *arguments: object) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "dsv4", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=LONG, check=False)

    def test_convert_and_nothing_to_do(self, sources: dict[str, Path], tmp_path: Path) -> None:
        first = self.call("convert", sources["release"], tmp_path / "out")
        assert (first.returncode, first.stdout) == (0, ""), first.stderr
        assert "every block exact" in first.stderr and "\r" not in first.stderr and "\x1b" not in first.stderr
        before = tree(tmp_path / "out")
        second = self.call("convert", sources["release"], tmp_path / "out")
        assert (second.returncode, tree(tmp_path / "out")) == (0, before) and "nothing to do" in second.stderr

    def test_bad_input(self, sources: dict[str, Path], tmp_path: Path) -> None:
        result = self.call("convert", tmp_path / "nowhere", tmp_path / "out")
        assert result.returncode == 3 and "nowhere" in result.stderr and "Traceback" not in result.stderr


def test_fp4_of_an_odd_block_width_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "source", geometry=SMALL, experts="fp8")
    config = read_json(tmp_path / "source" / "config.json")
    config["quantization_config"]["weight_block_size"] = [128, 16]
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    new = {
        name: Raw(F32, (t.shape[0], -(-tensors_of(tmp_path / "source")[name[:-5] + "weight"].shape[1] // 16)), b"")
        for name, t in tensors_of(tmp_path / "source").items()
        if name.endswith(".scale")
    }
    new = {n: Raw(F32, t.shape, np.ones(t.shape, np.float32).tobytes()) for n, t in new.items()}
    edit_tensors(tmp_path / "source", new)
    code, _, err = dsv4("convert", tmp_path / "source", tmp_path / "out", "--to", "fp4")
    assert code == 3 and "weight_block_size" in err
