"""A checker is tested by damage: every kind of harm to an output is found and named, and the whole twin passes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_converter
from raw_safetensors import Raw, Tensors, header_of, raw, read_folder, write_file, write_folder, write_index

from dsv4.convert.proof.result import Verification
from dsv4.convert.proof.run import verify

pytestmark = pytest.mark.fast_cases(3)

EXPERTS = [f"layers.0.ffn.experts.{expert}.{part}" for expert in range(2) for part in ("w1", "w3")]
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def fp4(random: np.random.Generator, rows: int, columns: int) -> tuple[Raw, Raw]:
    codes = random.integers(0, 256, (rows, columns // 2), dtype=np.uint8)
    scales = random.integers(118, 124, (rows, columns // 32), dtype=np.uint8)
    return raw("I8", codes), raw("F8_E8M0", scales)


def fp8(random: np.random.Generator, rows: int, columns: int) -> tuple[Raw, Raw]:
    codes = random.integers(0, 256, (rows, columns), dtype=np.uint8)
    codes[(codes & 127) == 127] = 1
    scales = random.integers(110, 124, (-(-rows // 128), -(-columns // 128)), dtype=np.uint8)
    return raw("F8_E4M3", codes), raw("F8_E8M0", scales)


def make_source(folder: Path) -> None:
    """A dozen small tensors of every kind, in two shards, with side files."""
    random = np.random.default_rng(7)
    tensors: Tensors = {
        "embed.weight": raw("BF16", random.integers(0, 1 << 15, (6, 4), dtype=np.uint16)),
        "layers.0.attn.attn_sink": raw("F32", random.normal(size=4).astype(np.float32)),
        "layers.0.ffn.gate.tid2eid": raw("I64", random.integers(0, 2, (3, 2))),
    }
    for name in ("layers.0.attn.wq_a", "layers.0.attn.wo_a"):
        tensors[f"{name}.weight"], tensors[f"{name}.scale"] = fp8(random, 3, 8)
    for name in EXPERTS:
        tensors[f"{name}.weight"], tensors[f"{name}.scale"] = fp4(random, 128, 128)
    names = list(tensors)
    write_folder(
        folder,
        {SHARDS[0]: {n: tensors[n] for n in names[:8]}, SHARDS[1]: {n: tensors[n] for n in names[8:]}},
    )
    quantization = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    }
    config = {"hidden_size": 128, "rms_norm_eps": 1e-6, "quantization_config": quantization, "expert_dtype": "fp4"}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    (folder / "generation_config.json").write_text('{"temperature": 1.0}')
    (folder / "encoding").mkdir()
    (folder / "encoding" / "encoding.py").write_text("# how prompts are written\n")


def cast(tensors: Tensors) -> Tensors:
    """The FP4 experts in FP8 by the reference rule, signs of zero kept."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        if tensor.dtype == "I8":
            scale = name.replace("weight", "scale")
            weight, found[scale] = reference_converter.cast_to_fp8(tensor, tensors[scale])
            negative = (reference_converter.unpacked(tensor) == 8).astype(np.uint8)
            found[name] = weight.like(weight.array() | (negative << 7))
    return found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    make_source(tmp_path / "source")
    return tmp_path / "source"


class Output:
    """A right conversion in memory: shards that a test may harm before they are written."""

    def __init__(self, source: Path, to_fp8: bool) -> None:
        self.source, self.folder = source, source.parent / "output"
        shards = read_folder(source)
        everything = cast({n: t for tensors in shards.values() for n, t in tensors.items()})
        self.shards = {s: {n: everything[n] for n in tensors} if to_fp8 else tensors for s, tensors in shards.items()}
        self.expert_dtype = "fp8" if to_fp8 else "fp4"

    def shard_of(self, name: str) -> Tensors:
        return next(tensors for tensors in self.shards.values() if name in tensors)

    def change(self, name: str, edit: Callable[[np.ndarray], Any]) -> None:
        """Edit the codes of a tensor in place."""
        tensors = self.shard_of(name)
        array = tensors[name].array().copy()
        edit(array)
        tensors[name] = tensors[name].like(array)

    def write(self) -> Path:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.source, self.folder, ignore=shutil.ignore_patterns("*.safetensors*"))
        config = json.loads((self.source / "config.json").read_text()) | {"expert_dtype": self.expert_dtype}
        (self.folder / "config.json").write_text(json.dumps(config, indent=1))
        write_folder(self.folder, self.shards)
        return self.folder

    def verify(self, **options: Any) -> Verification:
        return verify(self.source, self.write(), max_workers=1, **options)


@pytest.fixture(params=["fp4", "fp8"])
def output(request: pytest.FixtureRequest, source: Path) -> Output:
    made = Output(source, request.param == "fp8")
    twin = made.verify(strict=True)
    assert twin.exit_code == 0, [twin.verdict, *twin.problems]
    return made


@pytest.fixture
def fp8_output(source: Path) -> Output:
    return Output(source, True)


def named(result: Verification, status: str) -> set[str]:
    return {r.name for r in result.results if r.status == status}


def differing(result: Verification) -> set[str]:
    """Tensors that differ. A scale whose shape changed with the format is judged with its weight: left out."""
    found = named(result, "*")
    return {name for name in found if name.removesuffix("scale") + "weight" not in found}


def texts(result: Verification) -> str:
    return "\n".join(f"{p.area}: {p.text}" for p in result.problems if p.severity != "note")


# Where the harm is done, and on which elements.


@pytest.mark.parametrize(
    "name",
    ["embed.weight", "layers.0.ffn.gate.tid2eid", "layers.0.attn.wq_a.weight", "layers.0.ffn.experts.1.w3.weight"],
)
def test_one_bit_of_a_tensor(output: Output, name: str) -> None:
    output.change(name, lambda codes: codes.reshape(-1).__ixor__(np.arange(codes.size) == 5))
    result = output.verify()
    assert (result.exit_code, differing(result)) == (1, {name})
    (found,) = [r for r in result.results if r.name == name]
    assert found.tally.different == 1
    at = found.tally.first[0]["at"]
    columns = found.compared.output_weight.columns if found.compared.output_weight else found.compared.output.shape[-1]
    # In a packed FP4 byte bit 0 belongs to the even element.
    assert at[0] * columns + at[1] == (10 if output.expert_dtype == "fp4" and "experts" in name else 5)


@pytest.mark.parametrize("name", ["layers.0.attn.wq_a", "layers.0.ffn.experts.0.w1"])
@pytest.mark.parametrize("step", [1, -1])
def test_a_scale_off_by_one(output: Output, name: str, step: int) -> None:
    def shift(codes: np.ndarray) -> None:
        codes.reshape(-1)[-1:] += np.uint8(step % 256)

    output.change(f"{name}.scale", shift)
    result = output.verify()
    assert (result.exit_code, named(result, "*")) == (1, {f"{name}.weight", f"{name}.scale"})


@pytest.mark.parametrize("other", [1.75, np.nextafter(np.float32(1.25), np.float32(2))])
def test_a_float_scale_of_the_same_exponent(tmp_path: Path, other: float) -> None:
    """Equal codes under scales that differ in the mantissa alone: no value is equal but zero."""
    codes = np.arange(1, 65, dtype=np.uint8).reshape(2, 32)
    for place, scale in (("a", 1.25), ("b", other)):
        tensors = {"x.weight": raw("F8_E4M3", codes), "x.scale": raw("F32", np.full((1, 1), scale, np.float32))}
        write_folder(tmp_path / place, {"model.safetensors": tensors}, index=False)
    result = verify(tmp_path / "a", tmp_path / "b")
    assert (result.exit_code, named(result, "*")) == (1, {"x.weight", "x.scale"})
    assert result.results[0].tally.different == codes.size
    assert verify(tmp_path / "a", tmp_path / "a").exit_code == 0


def test_swapped_nibbles(source: Path) -> None:
    output = Output(source, False)
    name = "layers.0.ffn.experts.0.w3.weight"
    data = output.shard_of(name)[name].array().reshape(-1)
    position = int(np.flatnonzero((data & 15) != (data >> 4))[0])

    def swap(codes: np.ndarray) -> None:
        flat = codes.reshape(-1)
        flat[position] = (flat[position] >> 4) | (flat[position] << 4 & 0xF0)

    output.change(name, swap)
    result = output.verify()
    assert (result.exit_code, named(result, "*")) == (1, {name})
    assert next(r for r in result.results if r.name == name).tally.different == 2


def test_swapped_experts(output: Output) -> None:
    pairs = [(f"layers.0.ffn.experts.{e}.w1.weight", f"layers.0.ffn.experts.{e}.w1.scale") for e in (0, 1)]
    for first, second in zip(*pairs, strict=True):
        a, b = output.shard_of(first), output.shard_of(second)
        a[first], b[second] = b[second], a[first]
    result = output.verify()
    assert result.exit_code == 1
    assert named(result, "*") >= {pairs[0][0], pairs[1][0]}
    assert named(result, "*") <= {name for pair in pairs for name in pair}


@pytest.mark.parametrize("name", ["embed.weight", "layers.0.ffn.experts.0.w1.weight", "layers.0.attn.wo_a.scale"])
def test_a_dropped_tensor(output: Output, name: str) -> None:
    del output.shard_of(name)[name]
    result = output.verify()
    assert (result.exit_code, named(result, "-")) == (1, {name})
    assert texts(result) == ""  # the index was written anew: only the tensor is missing


def test_other_bytes_of_equal_value(output: Output) -> None:
    """One negative zero made positive: not the same bytes, but the same values."""
    name = "layers.0.ffn.experts.0.w1.weight"
    data = output.shard_of(name)[name].array().reshape(-1)
    fp8 = output.expert_dtype == "fp8"
    position = int(np.flatnonzero(data == 0x80 if fp8 else data >> 4 == 8)[0])
    output.change(name, lambda codes: codes.reshape(-1).__ixor__((np.arange(codes.size) == position) * np.uint8(0x80)))
    result = output.verify()
    assert (result.exit_code, result.lost_signs, result.gained_signs) == (0, 1, 0)
    assert next(r.status for r in result.results if r.name == name) == "≈"
    assert output.verify(strict=True).exit_code == 1


def test_a_dropped_tensor_that_the_index_lists(output: Output) -> None:
    folder = output.write()
    del output.shards[SHARDS[0]]["embed.weight"]
    write_file(folder / SHARDS[0], output.shards[SHARDS[0]])
    result = verify(output.source, folder)
    assert (result.exit_code, named(result, "-")) == (1, {"embed.weight"})
    assert result.ignored == {"output": {"absent": ["embed.weight"]}} and texts(result) == ""
    alone = verify(folder)
    assert alone.exit_code == 1 and "index: lists 1 tensor that no shard holds: embed.weight" in texts(alone)


def test_an_extra_tensor(output: Output) -> None:
    output.shards[SHARDS[1]]["layers.9.bias"] = raw("F32", np.zeros(2, np.float32))
    result = output.verify()
    assert (result.exit_code, named(result, "+")) == (1, {"layers.9.bias"})


def test_the_same_tensor_in_two_shards(output: Output) -> None:
    """Without an index, nobody says which of them counts."""
    output.shards[SHARDS[1]]["embed.weight"] = output.shards[SHARDS[0]]["embed.weight"]
    folder = output.write()
    (folder / "model.safetensors.index.json").unlink()
    result = verify(output.source, folder)
    assert (result.exit_code, named(result, "!")) == (3, {"embed.weight"})
    assert "are the same tensor twice" in texts(result)


def test_the_same_name_twice_in_a_header(output: Output) -> None:
    folder = output.write()
    tensors = output.shards[SHARDS[0]]
    text = json.dumps(header_of(tensors))
    entry = json.dumps({"embed.weight": header_of(tensors)["embed.weight"]})[1:-1]
    write_file(folder / SHARDS[0], tensors, text[:-1] + ", " + entry + "}")
    result = verify(output.source, folder)
    assert result.exit_code == 3
    assert "the key 'embed.weight' occurs twice" in texts(result)
    assert named(result, "!") >= set(tensors) - {n for n in tensors if n.endswith(".scale")}


@pytest.mark.parametrize("cut", [1, 70, 20_000])
def test_a_truncated_shard(output: Output, cut: int) -> None:
    path = output.write() / SHARDS[1]
    data = path.read_bytes()
    path.write_bytes(data[:-cut])
    result = verify(output.source, output.folder)
    ends, lost = len(data), set()
    for name, tensor in reversed(output.shards[SHARDS[1]].items()):
        if ends > len(data) - cut:
            lost.add(name)
        ends -= len(tensor.data)
    assert result.exit_code == 3
    units = {name.replace("scale", "weight") for name in lost}
    assert named(result, "!") == units | {name.replace("weight", "scale") for name in units}


@pytest.mark.parametrize("size", [0, 7, 8, 100])
def test_a_shard_cut_in_its_header(output: Output, size: int) -> None:
    path = output.write() / SHARDS[1]
    path.write_bytes(path.read_bytes()[:size])
    result = verify(output.source, output.folder)
    assert result.exit_code == 3 and f"{SHARDS[1]} cannot be read" in texts(result)
    assert named(result, "!") >= set(output.shards[SHARDS[1]])


def test_bytes_after_the_last_tensor(output: Output) -> None:
    path = output.write() / SHARDS[0]
    path.write_bytes(path.read_bytes() + b"\0")
    result = verify(output.source, output.folder)
    assert result.exit_code == 1 and "1 bytes after the last tensor belong to no tensor" in texts(result)


def test_bytes_between_tensors(output: Output) -> None:
    """Every tensor is whole; eight bytes belong to none."""
    folder = output.write()
    tensors = output.shards[SHARDS[0]]
    padded = {"embed.weight": tensors["embed.weight"], "pad": raw("I8", np.zeros(8, np.uint8)), **tensors}
    header = header_of(padded)
    del header["pad"]
    write_file(folder / SHARDS[0], padded, header)
    result = verify(output.source, folder)
    assert (result.exit_code, named(result, "*")) == (1, set())
    assert "8 bytes before layers.0.attn.attn_sink belong to no tensor" in texts(result)


def test_overlapping_tensors(output: Output) -> None:
    """Two names for the same bytes."""
    folder = output.write()
    tensors = output.shards[SHARDS[1]]
    header = header_of(tensors)
    first, second = EXPERTS[2] + ".weight", EXPERTS[3] + ".weight"
    header[second]["data_offsets"] = header[first]["data_offsets"]
    write_file(folder / SHARDS[1], tensors, header)
    result = verify(output.source, folder)
    assert result.exit_code == 3 and named(result, "!") >= {second}
    assert f"{second}: its bytes overlap those of {first}" in texts(result)


HEADERS: list[tuple[str, Any, str]] = [
    ("no dtype", {"shape": [6, 4], "data_offsets": [0, 48]}, "lacks dtype, shape or data_offsets"),
    ("unknown dtype", {"dtype": "BF17", "shape": [6, 4], "data_offsets": [0, 48]}, "dtype 'BF17' is not one"),
    ("negative", {"dtype": "BF16", "shape": [-6, -4], "data_offsets": [0, 48]}, "shape is not a list of sizes"),
    ("float size", {"dtype": "BF16", "shape": [6.0, 4], "data_offsets": [0, 48]}, "shape is not a list of sizes"),
    ("true", {"dtype": "BF16", "shape": [24, True], "data_offsets": [0, 48]}, "shape is not a list of sizes"),
    ("backwards", {"dtype": "BF16", "shape": [6, 4], "data_offsets": [48, 0]}, "needs 48 bytes"),
    ("one offset", {"dtype": "BF16", "shape": [6, 4], "data_offsets": [0]}, "not two byte positions"),
    ("huge", {"dtype": "BF16", "shape": [1 << 62, 8], "data_offsets": [0, 48]}, "overflows"),
    (
        "beyond the file",
        {"dtype": "BF16", "shape": [6, 4], "data_offsets": [1 << 40, (1 << 40) + 48]},
        "it ends at byte",
    ),
    ("a list", [1, 2], "lacks dtype, shape or data_offsets"),
]


@pytest.mark.parametrize(("entry", "reason"), [h[1:] for h in HEADERS], ids=[h[0] for h in HEADERS])
def test_a_header_entry_that_makes_no_sense(fp8_output: Output, entry: Any, reason: str) -> None:
    folder = fp8_output.write()
    tensors = fp8_output.shards[SHARDS[0]]
    write_file(folder / SHARDS[0], tensors, header_of(tensors) | {"embed.weight": entry})
    result = verify(fp8_output.source, folder)
    assert (result.exit_code, named(result, "!")) == (3, {"embed.weight"})
    assert reason in texts(result)


@pytest.mark.parametrize("header", ["[]", "{", '{"a": NaN}', "[" * 100_000, "\udcff"])
def test_a_header_that_is_no_header(fp8_output: Output, header: str) -> None:
    folder = fp8_output.write()
    text = header.encode("utf-8", "surrogateescape").decode("latin-1")
    write_file(folder / SHARDS[0], fp8_output.shards[SHARDS[0]], text)
    result = verify(fp8_output.source, folder)
    assert result.exit_code == 3 and f"{SHARDS[0]} cannot be read" in texts(result)


def test_a_shard_that_is_not_there(output: Output) -> None:
    (output.write() / SHARDS[1]).unlink()
    result = verify(output.source, output.folder)
    assert result.exit_code == 3
    assert f"index: names the shard {SHARDS[1]}, which is not there" in texts(result)
    assert named(result, "!") >= set(output.shards[SHARDS[1]])


@pytest.mark.parametrize(
    ("name", "shape"),
    [("embed.weight", (4, 6)), ("layers.0.ffn.gate.tid2eid", (2, 3)), ("layers.0.ffn.experts.0.w1.weight", (64, 256))],
)
def test_another_shape_of_the_same_bytes(fp8_output: Output, name: str, shape: tuple[int, int]) -> None:
    tensors = fp8_output.shard_of(name)
    tensors[name] = Raw(tensors[name].dtype, shape, tensors[name].data)
    result = fp8_output.verify()
    assert result.exit_code == 1 and name in named(result, "*")
    reason = next(r.reason for r in result.results if r.name == name)
    assert reason.startswith("shape [") and str(list(shape)) in reason


def test_a_scale_of_another_shape(fp8_output: Output) -> None:
    name = "layers.0.ffn.experts.0.w1.scale"
    fp8_output.shard_of(name)[name] = raw("F8_E8M0", np.full((1, 2), 120, np.uint8))
    result = fp8_output.verify()
    assert result.exit_code == 3
    assert named(result, "!") == {name, name.replace("scale", "weight")}


def test_another_dtype_of_the_same_bytes(output: Output) -> None:
    tensors = output.shards[SHARDS[0]]
    tensors["embed.weight"] = Raw("I8", (6, 8), tensors["embed.weight"].data)
    result = output.verify()
    assert (result.exit_code, named(result, "*")) == (1, {"embed.weight"})


def test_a_weight_and_its_neighbour_swapped_in_the_header(output: Output) -> None:
    """Every byte is still there, under the wrong name."""
    tensors = output.shards[SHARDS[1]]
    a, b = EXPERTS[2] + ".weight", EXPERTS[3] + ".weight"
    output.shards[SHARDS[1]] = {{a: b, b: a}.get(name, name): tensor for name, tensor in tensors.items()}
    result = output.verify()
    assert result.exit_code == 1 and named(result, "*") >= {a, b}


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_nan_code(fp8_output: Output, code: int) -> None:
    name = "layers.0.ffn.experts.0.w1.weight"
    fp8_output.change(name, lambda codes: codes.__setitem__((0, 0), code))
    result = fp8_output.verify()
    assert (result.exit_code, differing(result)) == (1, {name})
    assert f"codes: {name} holds 1 codes that are not finite numbers" in texts(result)


def test_a_nan_in_both_is_the_same_but_said(source: Path) -> None:
    output = Output(source, False)
    name = "layers.0.attn.wq_a.weight"
    output.change(name, lambda codes: codes.__setitem__((0, 0), 0x7F))
    shutil.copy(output.write() / SHARDS[0], source / SHARDS[0])
    result = output.verify()
    assert (result.exit_code, named(result, "*")) == (1, set())
    assert texts(result).count(f"{name} holds 1 codes that are not finite numbers") == 2


def test_a_nan_scale(output: Output) -> None:
    name = "layers.0.ffn.experts.1.w1"
    output.change(f"{name}.scale", lambda codes: codes.__setitem__((0, 0), 255))
    result = output.verify()
    assert result.exit_code == 1 and f"{name}.weight" in named(result, "*")
    assert "has 1 scales that are not positive and finite" in texts(result)


@pytest.mark.parametrize("bad", [0.0, -0.5, np.nan, np.inf])
def test_float_scales_that_are_no_scales(fp8_output: Output, bad: float) -> None:
    name = "layers.0.attn.wq_a.scale"
    good = reference_converter.scale_values(fp8_output.shard_of(name)[name])
    fp8_output.shard_of(name)[name] = raw("F32", good)
    assert fp8_output.verify().exit_code == 0
    fp8_output.shard_of(name)[name] = raw("F32", np.full_like(good, bad))
    result = fp8_output.verify()
    assert result.exit_code == 1 and "has 1 scales that are not positive and finite" in texts(result)
    assert name.replace("scale", "weight") in named(result, "*")


CONFIG_EDITS: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("a key of the model", lambda c: c.update(hidden_size=129), "hidden_size = 129 ("),
    ("a key that is gone", lambda c: c.pop("rms_norm_eps"), "rms_norm_eps = absent ("),
    ("a key that is new", lambda c: c.update(extra=1), "extra = 1 ("),
    ("the other expert dtype", lambda c: c.update(expert_dtype="fp4"), "expert_dtype says 'fp4'"),
    ("an unknown expert dtype", lambda c: c.update(expert_dtype="fp6"), "expert_dtype says 'fp6'"),
    ("no quantization", lambda c: c.pop("quantization_config"), "has no quantization_config"),
    (
        "block size",
        lambda c: c["quantization_config"].update(weight_block_size=[1, 2]),
        "weight_block_size says [1, 2]",
    ),
    ("method", lambda c: c["quantization_config"].update(quant_method="fp9"), "quant_method says 'fp9'"),
    (
        "another key of the quantization",
        lambda c: c["quantization_config"].update(activation_scheme="static"),
        "quantization_config.activation_scheme = 'static'",
    ),
    ("scale format", lambda c: c["quantization_config"].update(scale_fmt="ue9m0"), "scale_fmt says 'ue9m0'"),
]


@pytest.mark.parametrize(("edit", "complaint"), [c[1:] for c in CONFIG_EDITS], ids=[c[0] for c in CONFIG_EDITS])
def test_config(fp8_output: Output, edit: Callable[[dict[str, Any]], object], complaint: str) -> None:
    path = fp8_output.write() / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))
    result = verify(fp8_output.source, fp8_output.folder)
    assert result.exit_code == 1 and named(result, "*") == set()
    assert f"config: {complaint}" in texts(result)


def test_scale_format_against_the_scales(fp8_output: Output) -> None:
    """`ue8m0` promises powers of two, float32 scales or not."""
    name = "layers.0.attn.wq_a.scale"
    for side in (read_folder(fp8_output.source), fp8_output.shards):
        tensors = next(t for t in side.values() if name in t)
        tensors[name] = raw("F32", np.full((1, 1), 0.75, np.float32))
        if side is not fp8_output.shards:
            write_folder(fp8_output.source, side)
    result = fp8_output.verify()
    assert result.exit_code == 1 and named(result, "*") == set()
    assert texts(result).count("scale_fmt says ue8m0") == 2


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "encoding/encoding.py"])
@pytest.mark.parametrize("gone", [False, True])
def test_side_files(output: Output, name: str, gone: bool) -> None:
    path = output.write() / name
    path.unlink() if gone else path.write_bytes(path.read_bytes() + b" ")
    result = verify(output.source, output.folder)
    assert (result.exit_code, named(result, "*")) == (1, set())
    assert (
        texts(result) == f"side file: {name} {'is missing' if gone else chr(39).join(['differs from the source', 's'])}"
    )


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (lambda i: i["weight_map"].update({"embed.weight": SHARDS[1]}), "places 1 tensor in another shard"),
        (lambda i: i["weight_map"].update({"x": "../x.safetensors"}), "names the shard ../x.safetensors"),
    ],
)
def test_index(output: Output, edit: Callable[[dict[str, Any]], object], complaint: str) -> None:
    path = output.write() / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))
    result = verify(output.source, output.folder)
    assert result.exit_code in (1, 3) and f"index: {complaint}" in texts(result)


def is_harmless(path: Path, before: bytes, after: bytes, found: Verification) -> bool:
    """Whether only the index's metadata or an unknown key of it changed, and `verify` has a note about it."""
    if path.name != "model.safetensors.index.json":
        return False
    noted = any(problem.area == "index" for problem in found.problems)
    return noted and json.loads(before)["weight_map"] == json.loads(after)["weight_map"]


@pytest.mark.slow
@pytest.mark.parametrize("to_fp8", [False, True])
def test_any_byte_of_any_file(source: Path, to_fp8: bool) -> None:
    """One bit at every 11th byte of headers, index, config and side files, at every 997th byte of the data.

    Parts of the index that no loader reads may change: there the harm is noted only.
    """
    folder = Output(source, to_fp8).write()
    assert verify(source, folder, strict=True, max_workers=1).exit_code == 0
    unnoticed = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        data = path.read_bytes()
        dense = 8 + int.from_bytes(data[:8], "little") if path.suffix == ".safetensors" else len(data)
        for position in [*range(0, dense, 11), *range(dense, len(data), 997)]:
            harmed = bytearray(data)
            harmed[position] ^= 1 << (position % 8)
            path.write_bytes(harmed)
            found = verify(source, folder, strict=True, max_workers=1)
            if found.exit_code == 0 and not is_harmless(path, data, bytes(harmed), found):
                unnoticed.append((path.name, position, bytes(harmed[max(position - 20, 0) : position + 20])))
        path.write_bytes(data)
    assert unnoticed == []


def test_index_of_a_right_folder_is_written_right(output: Output) -> None:
    """The helper that other tests rely on: index and headers agree."""
    folder = output.write()
    write_index(folder, output.shards)
    assert verify(output.source, folder).exit_code == 0
