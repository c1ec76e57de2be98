"""Files that are something else than their name says: named for what they are, in every file that is read."""

import shutil
from pathlib import Path

import pytest
from exact_values import INDEX, dsv4

from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.doctor.diagnosis import diagnose
from dsv4.convert.inspect.inspection import inspect_checkpoint
from dsv4.convert.synthetic.checkpoint import Geometry, make_checkpoint
from dsv4.errors import InputError

SMALL = Geometry(compress_ratios=(0, 0), n_routed_experts=4)
SHARD = "model-00002-of-00004.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 6367146\n"
KINDS = {
    "pointer": (POINTER, "git-LFS pointer", "git lfs pull"),
    "web page": (b"\n <!DOCTYPE HTML><html><body>Log in</body></html>", "web page", "again"),
    "bare web page": (b"<html>\n<head>", "web page", "again"),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(100), "GGUF", "safetensors"),
    "torch.save": (b"PK\x03\x04" + bytes(100), "zip archive", "safetensors"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "source", geometry=SMALL)


@pytest.mark.parametrize("name", ["config.json", INDEX, SHARD])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.fast_cases(5)
def test_what_is_read_is_named(kind: str, name: str, folder: Path) -> None:
    data, words, hint = KINDS[kind]
    (folder / name).write_bytes(data)
    with pytest.raises(InputError, match=rf"{name}: a.*{words}") as caught:
        Checkpoint.open(folder)
    assert hint in caught.value.hint


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer(kind: str, folder: Path, tmp_path: Path) -> None:
    data, words, hint = KINDS[kind]
    (folder / "tokenizer.json").write_bytes(data)
    code, _, err = dsv4("run", folder, "--prompt", "hello", "--raw", "--max-new-tokens", "1")
    assert code == 3 and "tokenizer.json" in err and words in err and hint in err


NEEDED = ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "inference/config.json"]
MISNAMED = [
    *((name, kind) for name in NEEDED for kind in ("pointer", "web page")),
    ("README.md", "pointer"),
    ("tokenizer.json", "bare web page"),
]


@pytest.mark.parametrize("how", [(), ("--dry-run",)], ids=["work", "dry run"])
@pytest.mark.parametrize(("name", "kind"), MISNAMED)
def test_it_is_not_copied(name: str, kind: str, how: tuple[str, ...], folder: Path, tmp_path: Path) -> None:
    """Found before the work begins, not when the weights are written."""
    data, words, hint = KINDS[kind]
    (folder / name).write_bytes(data)
    code, _, err = dsv4("convert", folder, tmp_path / "out", *how)
    assert code == 3 and name in err and words in err and hint in err
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize(("name", "kind"), MISNAMED)
def test_inspect_and_doctor_name_it(name: str, kind: str, folder: Path) -> None:
    data, words, hint = KINDS[kind]
    (folder / name).write_bytes(data)
    found = [f for f in inspect_checkpoint(Checkpoint.open(folder)).findings if words in f.text]
    assert [f.level for f in found] == ["problem"] and name in found[0].text and hint in found[0].hint
    checks = [check for check in diagnose(folder, "sglang").checks if words in check.text]
    assert [check.status for check in checks] == ["refuses"] and name in checks[0].text and hint in checks[0].fix


def test_no_command_that_a_pointer_makes_fail(folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(POINTER)
    (check,) = diagnose(folder, "reference", 2).checks
    assert check.command.startswith("dsv4 convert RELEASE NEW") and "git-LFS pointer" in check.fix


def test_a_text_about_pointers_is_none(folder: Path, tmp_path: Path) -> None:
    (folder / "README.md").write_bytes(b"# Pointers\n\n" + POINTER)
    (folder / "NOTICE").write_bytes(POINTER[:30])
    assert not [f for f in inspect_checkpoint(Checkpoint.open(folder)).findings if "git-LFS" in f.text]
    assert dsv4("convert", folder, tmp_path / "out")[0] == 0


def test_a_folder_of_pointers(folder: Path, tmp_path: Path) -> None:
    """`git clone` without git-LFS: the small files are there, the shards are not."""
    for path in folder.glob("*.safetensors"):
        path.write_bytes(POINTER)
    for command in (["convert", folder, tmp_path / "out"], ["inspect", folder], ["doctor", folder, "--for", "vllm"]):
        code, out, err = dsv4(*command)
        assert code in (1, 3) and "git-LFS pointer" in out + err and "git lfs pull" in out + err
    shutil.rmtree(folder)
