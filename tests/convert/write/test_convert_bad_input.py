"""Input that is not what it claims: each time a message with the file or tensor in it, the right exit code, no file
under a final name, and the source as it was.

The fine print of headers, names and indexes is in test_hostile.py, for every command at once.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_variants import SMALL, VARIANTS
from exact_values import INDEX, convert, dsv4, edit_config, edit_tensors, read_json, tensors_of, tree
from patience import LONG
from raw_safetensors import Raw, read_file, write_file

from dsv4.convert.synthetic.v41 import V41Geometry
from dsv4.convert.synthetic.v41 import config as v41_config
from dsv4.convert.write import atomic_file as files

pytestmark = pytest.mark.fast_cases(1)

LAYER, EMBED, HEAD = (f"model-0000{i}-of-00004.safetensors" for i in (2, 1, 3))
EXPERT = "layers.0.ffn.experts.1.w2"
DENSE = "layers.0.attn.wq_a"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("originals")
    return {name: VARIANTS[name](folder / name) for name in ("release", "base")}


@pytest.fixture
def source(originals: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(originals["release"], tmp_path / "source")


@pytest.fixture
def base(originals: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(originals["base"], tmp_path / "base")


def refused(source: Path, output: Path, *words: str, options: tuple[str, ...] = (), code: int = 3) -> str:
    """Convert, expect the exit code and the words, nothing visible in the output, the source untouched."""
    before, there = tree(source), tree(output) if output.exists() else None
    found, out, err = dsv4("convert", source, output, *options)
    assert found == code, err
    for word in words:
        assert word in err, err
    assert out == "" and "Traceback" not in err and "bug" not in err
    assert tree(source) == before
    assert not output.exists() or tree(output) == (there or {})
    return err


def header_of(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def change_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite the header of a shard; the data stays."""
    tensors, header = read_file(path), header_of(path)
    ordered = dict(sorted(tensors.items(), key=lambda item: header[item[0]]["data_offsets"]))
    changed = change(header)
    write_file(path, ordered, header if changed is None else changed)


class TestShards:
    def test_missing(self, source: Path, tmp_path: Path) -> None:
        (source / LAYER).unlink()
        refused(source, tmp_path / "out", LAYER, "missing", "download")

    @pytest.mark.parametrize("keep", [0, 5, 8, 1000, -1])
    def test_truncated(self, keep: int, source: Path, tmp_path: Path) -> None:
        data = (source / LAYER).read_bytes()
        (source / LAYER).write_bytes(data[:keep])
        refused(source, tmp_path / "out", LAYER, "truncated", "Download")

    def test_longer_than_its_header_says(self, source: Path, tmp_path: Path) -> None:
        (source / LAYER).write_bytes((source / LAYER).read_bytes() + b"\0")
        refused(source, tmp_path / "out", LAYER, "longer")

    def test_all_zeros(self, source: Path, tmp_path: Path) -> None:
        (source / LAYER).write_bytes(bytes((source / LAYER).stat().st_size))
        refused(source, tmp_path / "out", LAYER, "header is empty")

    @pytest.mark.parametrize("length", [100_000_001, 2**40, 2**64 - 1])
    def test_a_header_that_is_too_long(self, length: int, source: Path, tmp_path: Path) -> None:
        data = (source / LAYER).read_bytes()
        (source / LAYER).write_bytes(length.to_bytes(8, "little") + data[8:])
        refused(source, tmp_path / "out", LAYER, str(length), "100000000")

    @pytest.mark.parametrize("text", ["not json at all", '{"a": ', "{" * 9000])
    def test_a_header_that_is_not_json(self, text: str, source: Path, tmp_path: Path) -> None:
        write_file(source / EMBED, {}, text)
        refused(source, tmp_path / "out", EMBED)

    def test_overlapping(self, source: Path, tmp_path: Path) -> None:
        def overlap(header: dict[str, Any]) -> None:
            header["norm.weight"]["data_offsets"] = [0, 512]

        change_header(source / HEAD, overlap)
        refused(source, tmp_path / "out", HEAD, "overlaps")

    def test_a_hole(self, source: Path, tmp_path: Path) -> None:
        def shift(header: dict[str, Any]) -> None:
            offsets = header["embed.weight"]["data_offsets"]
            header["embed.weight"]["data_offsets"] = [offsets[0] + 8, offsets[1] + 8]

        change_header(source / EMBED, shift)
        refused(source, tmp_path / "out", EMBED, "embed.weight", "hole")

    def test_out_of_bounds(self, source: Path, tmp_path: Path) -> None:
        def grow(header: dict[str, Any]) -> None:
            begin, end = header["embed.weight"]["data_offsets"]
            header["embed.weight"] |= {"data_offsets": [begin, 2 * end], "shape": [128, 256]}

        change_header(source / EMBED, grow)
        refused(source, tmp_path / "out", EMBED, "truncated")

    def test_a_shard_that_is_a_pipe(self, source: Path, tmp_path: Path) -> None:
        (source / LAYER).unlink()
        os.mkfifo(source / LAYER)
        code, _, err = dsv4("convert", source, tmp_path / "out")
        assert code == 3 and LAYER in err and not (tmp_path / "out").exists()

    def test_a_shard_that_shrinks_while_it_is_read(
        self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from dsv4.convert import api as planning

        plan = planning.make_plan

        def cut(*arguments: Any) -> Any:
            found = plan(*arguments)
            (source / LAYER).write_bytes((source / LAYER).read_bytes()[:-1000])
            return found

        monkeypatch.setattr(planning, "make_plan", cut)
        code, _, err = dsv4("convert", source, tmp_path / "out")
        assert code == 3 and LAYER in err and "ends at byte" in err and tree(tmp_path / "out") == {}


class TestIndex:
    def change(self, source: Path, change: Callable[[dict[str, Any]], Any]) -> None:
        index = read_json(source / INDEX)
        found = change(index)
        (source / INDEX).write_text(json.dumps(index if found is None else found))

    def test_a_tensor_that_it_lacks(self, source: Path, tmp_path: Path) -> None:
        self.change(source, lambda index: index["weight_map"].pop("norm.weight") and None)
        refused(source, tmp_path / "out", INDEX, "norm.weight")

    def test_a_tensor_that_the_shards_lack(self, source: Path, tmp_path: Path) -> None:
        ghost = "layers.0.ffn.experts.9.w1.weight"
        edit_config(source, n_routed_experts=10)
        self.change(source, lambda index: index["weight_map"].update({ghost: EMBED}))
        refused(source, tmp_path / "out", INDEX, ghost)

    def test_a_tensor_in_another_shard(self, source: Path, tmp_path: Path) -> None:
        self.change(source, lambda index: index["weight_map"].update({"norm.weight": EMBED}))
        refused(source, tmp_path / "out", INDEX, "norm.weight")

    def test_missing_with_several_shards(self, source: Path, tmp_path: Path) -> None:
        (source / INDEX).unlink()
        refused(source, tmp_path / "out", INDEX)

    def test_nothing_there(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        refused(tmp_path / "empty", tmp_path / "out", "empty", INDEX)
        code, _, err = dsv4("convert", tmp_path / "nowhere", tmp_path / "out")
        assert code == 3 and "nowhere" in err and "does not exist" in err
        code, _, err = dsv4("convert", __file__, tmp_path / "out")
        assert code == 3 and "not a folder" in err


def set_bytes(folder: Path, name: str, value: int, count: int = 3) -> None:
    tensor = tensors_of(folder)[name]
    codes = tensor.array().copy()
    codes.flat[:count] = value
    edit_tensors(folder, {name: tensor.like(codes)})


ALL_WAYS = [
    (),
    ("--to", "bf16"),
    ("--to", "same"),
    ("--scale-dtype", "e8m0"),
    ("--layout", "mp", "--model-parallel", "2"),
    ("--layout", "mp", "--model-parallel", "2", "--to", "same"),
]


class TestScales:
    @pytest.mark.parametrize("stem", [EXPERT, DENSE, "mtp.0.ffn.experts.0.w1"])
    def test_missing(self, stem: str, source: Path, tmp_path: Path) -> None:
        edit_tensors(source, {}, drop=(f"{stem}.scale",))
        refused(source, tmp_path / "out", f"{stem}.weight", f"{stem}.scale", "missing")

    @pytest.mark.parametrize("stem", [EXPERT, DENSE])
    def test_of_the_wrong_shape(self, stem: str, source: Path, tmp_path: Path) -> None:
        scale = tensors_of(source)[f"{stem}.scale"]
        rows, columns = scale.shape
        edit_tensors(source, {f"{stem}.scale": Raw(scale.dtype, (rows + 1, columns), scale.data + bytes(columns))})
        refused(source, tmp_path / "out", f"{stem}.scale", str([rows + 1, columns]), str([rows, columns]))

    def test_transposed(self, source: Path, tmp_path: Path) -> None:
        scale = tensors_of(source)[f"{EXPERT}.scale"]
        edit_tensors(source, {f"{EXPERT}.scale": Raw(scale.dtype, scale.shape[::-1], scale.data)})
        refused(source, tmp_path / "out", f"{EXPERT}.scale", str(list(scale.shape)))

    @pytest.mark.parametrize(("stem", "dtype"), [(EXPERT, "F32"), (EXPERT, "I8"), (DENSE, "I8"), (DENSE, "BF16")])
    def test_of_the_wrong_dtype(self, stem: str, dtype: str, source: Path, tmp_path: Path) -> None:
        scale = tensors_of(source)[f"{stem}.scale"]
        width = {"F32": 4, "I8": 1, "BF16": 2}[dtype]
        edit_tensors(source, {f"{stem}.scale": Raw(dtype, scale.shape, bytes(width * len(scale.data)))})
        refused(source, tmp_path / "out", f"{stem}.scale", dtype, "F8_E8M0 ")

    @pytest.mark.parametrize("options", ALL_WAYS, ids=" ".join)
    @pytest.mark.parametrize("stem", [EXPERT, DENSE, "layers.0.attn.wo_a"])
    @pytest.mark.fast_cases(6)
    def test_byte_255(self, stem: str, options: tuple[str, ...], source: Path, tmp_path: Path) -> None:
        set_bytes(source, f"{stem}.scale", 255)
        refused(source, tmp_path / "out", f"{stem}.scale", "NaN", "ownload", options=options)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -1.0, 0.0, -0.0])
    @pytest.mark.parametrize("options", [(), ("--to", "bf16"), ("--to", "fp4"), ("--scale-dtype", "e8m0")])
    @pytest.mark.fast_cases(1)
    def test_float32_that_is_no_scale(self, value: float, options: tuple[str, ...], base: Path, tmp_path: Path) -> None:
        scale = tensors_of(base)[f"{EXPERT}.scale"]
        values = scale.array().copy()
        values.flat[0] = value
        edit_tensors(base, {f"{EXPERT}.scale": scale.like(values)})
        refused(base, tmp_path / "out", f"{EXPERT}.scale", "positive and finite", options=options)

    def test_two_of_them(self, source: Path, tmp_path: Path) -> None:
        edit_tensors(source, {f"{DENSE}.weight_scale_inv": tensors_of(source)[f"{DENSE}.scale"]})
        refused(source, tmp_path / "out", f"{DENSE}.weight", "two scales")

    def test_a_weight_that_is_no_matrix(self, source: Path, tmp_path: Path) -> None:
        tensor = tensors_of(source)[f"{EXPERT}.weight"]
        edit_tensors(source, {f"{EXPERT}.weight": Raw("I8", (len(tensor.data),), tensor.data)})
        refused(source, tmp_path / "out", EXPERT)


class TestNanWeights:
    """E4M3 has two NaN codes. They can be copied and counted, but stand for no value."""

    def damaged(self, folder: Path, stem: str) -> None:
        set_bytes(folder, f"{stem}.weight", 0x7F)
        tensor = tensors_of(folder)[f"{stem}.weight"]
        codes = tensor.array().copy()
        codes.flat[-2:] = 0xFF
        edit_tensors(folder, {f"{stem}.weight": tensor.like(codes)})

    @pytest.mark.parametrize("to", ["fp8", "same"])
    def test_copied_they_are_counted(self, to: str, source: Path, tmp_path: Path) -> None:
        self.damaged(source, DENSE)
        said = convert(source, tmp_path / "out", "--to", to)
        manifest = read_json(tmp_path / "out" / "dsv4.json")
        assert manifest["tensors"][f"{DENSE}.weight"]["nan_codes"] == 5
        assert manifest["summary"]["nan_codes"] == 5 and "5 E4M3 NaN codes" in said
        assert tensors_of(tmp_path / "out")[f"{DENSE}.weight"] == tensors_of(source)[f"{DENSE}.weight"]

    def test_in_slices_they_are_counted_once(self, source: Path, tmp_path: Path) -> None:
        self.damaged(source, "layers.0.attn.wo_b")
        self.damaged(source, DENSE)  # the same in both ranks
        convert(source, tmp_path / "out", "--layout", "mp", "--model-parallel", "2")
        assert read_json(tmp_path / "out" / "dsv4.json")["summary"]["nan_codes"] == 10

    def test_bf16_refuses(self, source: Path, tmp_path: Path) -> None:
        self.damaged(source, DENSE)
        refused(source, tmp_path / "out", f"{DENSE}.weight", "5 E4M3 NaN", options=("--to", "bf16"))

    @pytest.mark.parametrize("options", [("--wo-a", "bf16"), ("--layout", "mp", "--model-parallel", "2")])
    def test_so_does_a_decoded_wo_a(self, options: tuple[str, ...], source: Path, tmp_path: Path) -> None:
        self.damaged(source, "layers.0.attn.wo_a")
        refused(source, tmp_path / "out", "layers.0.attn.wo_a.weight", "5 E4M3 NaN", options=options)

    def test_fp4_refuses(self, base: Path, tmp_path: Path) -> None:
        self.damaged(base, EXPERT)
        options = ("--to", "fp4", "--on-inexact", "round")
        refused(base, tmp_path / "out", f"{EXPERT}.weight", "5 E4M3 NaN", options=options)


class TestConfig:
    def test_the_config_of_another_edition(self, source: Path, tmp_path: Path) -> None:
        """No block scale fits then; the reason is said, and not that a download is damaged."""
        (source / "config.json").write_text(json.dumps(v41_config(V41Geometry())))
        refused(source, tmp_path / "out", "config.json describes V4.1", "'layers.0.ffn.gate.tid2eid' is a tensor of V4")

    def test_missing(self, source: Path, tmp_path: Path) -> None:
        (source / "config.json").unlink()
        refused(source, tmp_path / "out", "config.json is missing")

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1, "a": 2}', '{"a": Infinity}', "\xff"])
    def test_not_json(self, text: str, source: Path, tmp_path: Path) -> None:
        (source / "config.json").write_bytes(text.encode("latin-1"))
        refused(source, tmp_path / "out", "config.json")

    def test_says_fp8_holds_fp4(self, source: Path, tmp_path: Path) -> None:
        edit_config(source, expert_dtype="fp8")
        refused(source, tmp_path / "out", "config.json", "expert_dtype 'fp8'", "fp4", "layers.0.ffn.experts.")

    def test_says_fp4_holds_fp8(self, base: Path, tmp_path: Path) -> None:
        edit_config(base, expert_dtype="fp4")
        refused(base, tmp_path / "out", "config.json", "expert_dtype 'fp4'", "fp8", "layers.0.ffn.experts.")

    def test_says_so_inside_quantization_config(self, tmp_path: Path) -> None:
        source = VARIANTS["v41"](tmp_path / "source")
        quantization = read_json(source / "config.json")["quantization_config"]
        edit_config(source, quantization_config=quantization | {"expert_dtype": "fp8"})
        refused(source, tmp_path / "out", "config.json", "expert_dtype 'fp8'")

    @pytest.mark.parametrize("value", ["int4", 4, ["fp4"], True])
    def test_an_unknown_expert_dtype(self, value: Any, source: Path, tmp_path: Path) -> None:
        edit_config(source, expert_dtype=value)
        refused(source, tmp_path / "out", "config.json", "expert_dtype")

    @pytest.mark.parametrize("value", ["fp8", [], 3])
    def test_a_quantization_config_that_is_none(self, value: Any, source: Path, tmp_path: Path) -> None:
        edit_config(source, quantization_config=value)
        refused(source, tmp_path / "out", "config.json", "quantization_config")

    @pytest.mark.parametrize(
        "value", [None, [128], [128, 128, 1], [0, 128], ["128", "128"], 128, [128.0, 128], [-1, 2]]
    )
    def test_no_block_size(self, value: Any, source: Path, tmp_path: Path) -> None:
        quantization = read_json(source / "config.json")["quantization_config"] | {"weight_block_size": value}
        edit_config(source, quantization_config=quantization)
        refused(source, tmp_path / "out", "config.json", "weight_block_size")

    def test_no_quantization_config_at_all(self, source: Path, tmp_path: Path) -> None:
        edit_config(source, quantization_config=None)
        refused(source, tmp_path / "out", "config.json", "weight_block_size")

    def test_a_block_size_that_does_not_fit_the_scales(self, source: Path, tmp_path: Path) -> None:
        quantization = read_json(source / "config.json")["quantization_config"] | {"weight_block_size": [32, 32]}
        edit_config(source, quantization_config=quantization)
        refused(source, tmp_path / "out", ".scale'", "32 x 32")

    @pytest.mark.parametrize("text", ["{", "[]", "3"])
    def test_a_broken_inference_config(self, text: str, source: Path, tmp_path: Path) -> None:
        """Known before the work, not after."""
        (source / "inference" / "config.json").write_text(text)
        refused(source, tmp_path / "out", "inference/config.json")


@pytest.mark.parametrize("to", ["mxfp8", "mxfp4"])
@pytest.mark.fast_cases(1)
def test_bf16_experts_in_the_form_of_another_tool(to: str, source: Path, tmp_path: Path) -> None:
    """The release's form lies between: there a block without an exact form is found."""
    convert(source, tmp_path / "bf16", "--to", "bf16")
    err = refused(tmp_path / "bf16", tmp_path / "out", ".ffn.experts.", "BF16", options=("--to", to))
    assert "--to fp4 first" in err
    convert(tmp_path / "bf16", tmp_path / "copy", "--to", "same")
    assert tensors_of(tmp_path / "copy") == tensors_of(tmp_path / "bf16")


class TestPlaces:
    def test_the_source_itself(self, source: Path, tmp_path: Path) -> None:
        for name in (source, source / ".", source / "encoding" / ".."):
            for how in ((), ("--dry-run",)):
                refused(source, name, "is the source", options=how, code=2)

    def test_inside_the_source(self, source: Path, tmp_path: Path) -> None:
        before = tree(source)
        for name in (source / "out", source / "encoding" / "deep" / "out"):
            code, _, err = dsv4("convert", source, name)
            assert code == 2 and "inside the source" in err and tree(source) == before

    def test_through_symlinks(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(source)
        (tmp_path / "other").symlink_to(tmp_path / "link")
        before = tree(source)
        for one, two in (
            (source, tmp_path / "link"),
            (tmp_path / "link", source),
            (tmp_path / "link", tmp_path / "other"),
            (source, tmp_path / "other" / "out"),
            (tmp_path / "link", source / "out"),
        ):
            code, _, err = dsv4("convert", one, two)
            assert code == 2 and "source" in err and tree(source) == before

    def test_around_the_source(self, source: Path, tmp_path: Path) -> None:
        """Even if the outer folder is an output of ours."""
        outer = tmp_path / "outer"
        convert(source, outer, "--layout", "mp", "--model-parallel", "1")
        shutil.move(source, outer / "source")
        before = tree(outer)
        code, _, err = dsv4("convert", outer / "source", outer, "--overwrite")
        assert code == 2 and "contains the source" in err and tree(outer) == before

    def test_a_link_that_leads_nowhere(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "out").symlink_to(tmp_path / "nowhere")
        code, _, err = dsv4("convert", source, tmp_path / "out")
        assert code == 2 and "out" in err and not (tmp_path / "nowhere").exists()

    def test_a_hub_cache_of_symlinks_is_a_source_like_any_other(self, source: Path, tmp_path: Path) -> None:
        snapshot = tmp_path / "snapshot"
        for path in source.rglob("*"):
            if path.is_file():
                link = snapshot / path.relative_to(source)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path)
        convert(snapshot, tmp_path / "out")
        convert(source, tmp_path / "expected")
        assert tree(tmp_path / "out") == tree(tmp_path / "expected")


@contextmanager
def ordinary_user() -> Iterator[None]:
    """Root may do anything: become somebody who may not."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def public(originals: dict[str, Path]) -> Iterator[Path]:
    """A folder that everybody can reach, unlike pytest's; with a source, whose imports are done."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    source = VARIANTS["release"](folder / "source")
    convert(source, folder / "warm")
    yield folder
    for path in folder.rglob("*"):
        path.chmod(0o777)
    shutil.rmtree(folder)


class TestPermissions:
    def test_no_right_to_write(self, public: Path) -> None:
        (public / "closed").mkdir(mode=0o555)
        with ordinary_user():
            code, _, err = dsv4("convert", public / "source", public / "closed" / "out")
        assert code == 4 and "closed" in err and "ermission" in err and tree(public / "closed") == {}

    def test_no_right_to_write_into_the_folder(self, public: Path) -> None:
        (public / "closed").mkdir(mode=0o555)
        with ordinary_user():
            code, _, err = dsv4("convert", public / "source", public / "closed")
        assert code == 4 and "closed" in err and "ermission" in err and tree(public / "closed") == {}

    def test_no_right_to_read(self, public: Path) -> None:
        (public / "source" / LAYER).chmod(0)
        with ordinary_user():
            code, _, err = dsv4("convert", public / "source", public / "out")
        assert code == 4 and LAYER in err and "ermission" in err and not (public / "out").exists()


class TestFullDisk:
    @pytest.mark.parametrize("shard", [0, 2])
    @pytest.mark.fast_cases(1)
    def test_known_when_a_shard_is_begun(
        self, shard: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whole shards before it are kept, and the same command goes on."""
        output, options, begun = tmp_path / "out", ("--max-shard-size", "600kB"), []
        allocate = files.allocate

        def fail(descriptor: int, size: int) -> None:
            if ".safetensors." in os.readlink(f"/proc/self/fd/{descriptor}"):
                begun.append(size)
            if len(begun) > shard:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            allocate(descriptor, size)

        monkeypatch.setattr(files, "allocate", fail)
        before = tree(source)
        code, _, err = dsv4("convert", source, output, *options)
        assert code == 4 and "No space left" in err and f"model-0000{shard + 1}-of" in err and "same command" in err
        names = [path.name for path in output.iterdir() if not path.name.startswith(".")]
        assert len(names) == shard and not list(output.glob("*.part")) and tree(source) == before
        monkeypatch.undo()
        convert(source, output, *options)
        convert(source, tmp_path / "whole", *options)
        assert tree(output) == tree(tmp_path / "whole")

    def test_while_a_shard_is_written(self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As on file systems that cannot allocate ahead."""
        write, written = os.write, []

        def fail(descriptor: int, data: Any) -> int:
            written.append(len(data))
            if sum(written) > 10**6:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(descriptor, data[:50_000])  # short writes are continued

        monkeypatch.setattr(files, "allocate", lambda descriptor, size: None)
        monkeypatch.setattr(files.os, "write", fail)
        code, _, err = dsv4("convert", source, tmp_path / "out", "--max-shard-size", "6GB")
        assert code == 4 and "No space left" in err and "model-00001-of-00001" in err
        assert tree(tmp_path / "out") == {}

    @pytest.mark.slow
    def test_a_limit_on_file_size(self, source: Path, tmp_path: Path) -> None:
        """No stand-in: the kernel refuses."""
        command = (
            f"ulimit -f 500; exec {sys.executable} -m dsv4 convert '{source}' '{tmp_path / 'out'}' --max-shard-size 6GB"
        )
        result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=LONG, check=False)
        assert result.returncode == 4 and "model-00001-of-" in result.stderr and "ulimit" in result.stderr
        assert tree(tmp_path / "out") == {}

    def test_a_disk_that_reports_an_error(self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(descriptor: int) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(files.os, "fsync", broken)
        code, _, err = dsv4("convert", source, tmp_path / "out")
        assert code == 4 and tree(tmp_path / "out") == {} and "error" in err


class TestOptions:
    @pytest.mark.parametrize(
        "options",
        [
            ("--to", "fp16"),
            ("--target", "tgi"),
            ("--layout", "mp"),
            ("--model-parallel", "2"),
            ("--layout", "mp", "--model-parallel", "0"),
            ("--layout", "mp", "--model-parallel", "2", "--target", "vllm"),
            ("--layout", "mp", "--model-parallel", "2", "--to", "bf16"),
            ("--layout", "mp", "--model-parallel", "2", "--to", "fp4"),
            ("--layout", "mp", "--model-parallel", "2", "--scale-dtype", "f32"),
            ("--layout", "mp", "--model-parallel", "2", "--wo-a", "fp8"),
            ("--to", "bf16", "--scale-dtype", "e8m0"),
            ("--to", "bf16", "--wo-a", "fp8"),
            ("--max-shard-size", "many"),
            ("--max-shard-size", "0"),
            ("--max-shard-size=-5GB",),
            ("--max-workers", "0"),
            ("--on-inexact", "ignore"),
            ("--max-memory", "lots"),
        ],
        ids=" ".join,
    )
    def test_that_make_no_sense(self, options: tuple[str, ...], source: Path, tmp_path: Path) -> None:
        code, _, err = dsv4("convert", source, tmp_path / "out", *options)
        assert code == 2 and err and not (tmp_path / "out").exists()

    def test_too_little_memory(self, source: Path, tmp_path: Path) -> None:
        code, _, err = dsv4("convert", source, tmp_path / "out", "--max-memory", "10MB")
        assert code == 4 and "--max-memory 10.0 MB is too little" in err and not (tmp_path / "out").exists()

    def test_an_error_is_one_json_object(self, source: Path, tmp_path: Path) -> None:
        (source / LAYER).unlink()
        code, out, _ = dsv4("convert", source, tmp_path / "out", "--json")
        assert code == 3 and json.loads(out)["exit_code"] == 3 and LAYER in json.loads(out)["error"]


def test_geometry_of_the_shards_is_what_the_names_above_say() -> None:
    assert SMALL.num_hidden_layers + 2 + SMALL.num_nextn_predict_layers == 4
