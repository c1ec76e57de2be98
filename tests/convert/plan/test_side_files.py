"""What travels beside the shards, and what stays behind."""

from pathlib import Path

import pytest
from checkpoint_variants import VARIANTS
from exact_values import INDEX, convert, read_json, tensors_of, tree

TRAVEL = {
    "tokenizer.json": b"{}", "tokenizer_config.json": b"{}", "tokenizer.model": b"\0\xff", "vocab.json": b"{}",
    "merges.txt": b"", "special_tokens_map.json": b"{}", "added_tokens.json": b"{}", "generation_config.json": b"{ }",
    "preprocessor_config.json": b"{}", "processor_config.json": b"{}", "chat_template.jinja": b"{{", "odd.jinja": b"",
    "modeling_deepseek.py": b"import x\r\n", "LICENSE": b"MIT", "LICENSE-MODEL": b"", "NOTICE.txt": b"",
    "README.md": b"#", "encoding/encoding_dsv4.py": b"x", "encoding/tests/deep/test.json": b"[]",
    "inference/model.py": b"",
    "assets/a.png": b"\x89", "figures/b.svg": b"<",
}  # fmt: skip
STAY = {
    "pytorch_model.bin": b"", "old.pth": b"", "notes.txt": b"", "result.json": b"{}", "dsv4.json": b"{}", "x.gguf": b"",
    "sub/model-00001-of-00001.safetensors": b"", "encoding/weights.bin": b"", "inference/x.safetensors": b"",
    "other.index.json": b"{}", ".git/config": b"", ".gitattributes": b"", "encoding/.hidden": b"",
    "nested/README.md": b"",
}  # fmt: skip


SHARDS = {f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}  # of four in the source


def put(folder: Path, contents: dict[str, bytes]) -> None:
    for name, data in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = VARIANTS["release"](tmp_path / "source")
    put(folder, TRAVEL | STAY)
    return folder


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_for_hugging_face(source: Path, tmp_path: Path) -> None:
    before, output = tree(source), tmp_path / "out"
    convert(source, output)
    written = {INDEX, "config.json", "dsv4.json", "inference/config.json"} | SHARDS
    assert files_of(output) == written | TRAVEL.keys()
    assert all((output / name).read_bytes() == data for name, data in TRAVEL.items())
    assert tree(source) == before


def test_a_folder_for_the_reference_engine(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    convert(source, output, "--layout", "mp", "--model-parallel", "1")
    tokenizer = {name for name in TRAVEL if name.startswith(("tokenizer", "vocab", "merges", "special", "added"))}
    assert files_of(output) == {"model0-mp1.safetensors", "config.json", "dsv4.json"} | tokenizer


def test_a_source_without_any(tmp_path: Path) -> None:
    """Weights, index and config are enough."""
    source = VARIANTS["release"](tmp_path / "source")
    for name in files_of(source):
        if not name.startswith(("model", "config.json")):
            (source / name).unlink()
    convert(source, tmp_path / "out")
    assert files_of(tmp_path / "out") == {INDEX, "config.json", "dsv4.json"} | SHARDS


def test_one_file_without_an_index(tmp_path: Path) -> None:
    """`model.safetensors` alone is a checkpoint too; the output gets an index."""
    source = VARIANTS["release"](tmp_path / "source")
    convert(source, tmp_path / "one", "--to", "same", "--max-shard-size", "6GB")
    single = tmp_path / "single"
    single.mkdir()
    (tmp_path / "one" / "model-00001-of-00001.safetensors").rename(single / "model.safetensors")
    (tmp_path / "one" / "config.json").rename(single / "config.json")
    convert(single, tmp_path / "out")
    convert(source, tmp_path / "expected")
    assert tensors_of(tmp_path / "out") == tensors_of(tmp_path / "expected")
    assert read_json(tmp_path / "out" / INDEX)["weight_map"].keys() == tensors_of(source).keys()


def test_a_side_file_that_is_a_link_is_copied(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.json").rename(tmp_path / "blob")
    (source / "tokenizer.json").symlink_to(tmp_path / "blob")
    convert(source, tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == TRAVEL["tokenizer.json"]
