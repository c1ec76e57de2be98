"""The Python API: what is exported is typed and documented, and does what the commands do."""

import inspect
import io
import typing
from contextlib import redirect_stdout
from importlib.resources import files
from pathlib import Path

import pytest
import torch

import dsv4.convert
import dsv4.model
import dsv4.quant
from dsv4.convert.plan.settings import CONVERSIONS
from dsv4.convert.synthetic.checkpoint import make_checkpoint
from dsv4.quant import Block, dequantize_fp4, dequantize_fp8, fp4_to_fp8, quantize_fp4

PACKAGES = (dsv4.quant, dsv4.convert, dsv4.model)
FUNCTIONS = [
    pytest.param(value, id=f"{package.__name__}.{name}")
    for package in PACKAGES
    for name in package.__all__
    if inspect.isfunction(value := getattr(package, name))
]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_help_says_something_about_everything(package: object) -> None:
    for name in package.__all__:
        value = getattr(package, name)
        if not isinstance(value, tuple):  # a constant
            assert len(inspect.getdoc(value) or "") > 30, name
    printed = io.StringIO()
    with redirect_stdout(printed):
        help(package)
    assert all(name in printed.getvalue() for name in package.__all__)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_parameter_has_a_type(function: typing.Callable) -> None:
    signature = inspect.signature(function)
    untyped = [p.name for p in signature.parameters.values() if p.annotation is inspect.Parameter.empty]
    assert not untyped
    assert signature.return_annotation is not inspect.Signature.empty


def test_the_same_word_for_the_same_thing() -> None:
    functions = (dsv4.convert.convert, dsv4.convert.verify, dsv4.model.load)
    assert all("max_memory" in inspect.signature(function).parameters for function in functions)


def test_type_checkers_are_told() -> None:
    assert files("dsv4").joinpath("py.typed").is_file()


def test_numbers() -> None:
    packed, scale = quantize_fp4(torch.linspace(-3, 3, 256 * 256).view(256, 256))
    block = Block(128, 128)
    scales = fp4_to_fp8.choose_block_scales(packed, scale, block)
    codes = fp4_to_fp8.cast(packed, scale, scales.scale_bytes, block)
    assert not scales.inexact.any()
    old, new = dequantize_fp4(packed, scale), dequantize_fp8(codes, scales.scale_bytes, block)
    assert torch.equal(old.view(torch.int32), new.view(torch.int32))


@pytest.mark.slow
def test_the_words_of_the_commands(tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "fp8"
    make_checkpoint(source)
    written: list[int] = []
    result = dsv4.convert.convert(source, output, target="vllm", progress=written.append)
    assert result.to_json()["exact"] and sum(written) > 0
    assert dsv4.convert.convert(str(source), str(output), target="vllm").already_done
    proof = dsv4.convert.verify(source, output)
    assert proof.exit_code == 0 and proof.verdict.startswith("IDENTICAL")
    tokens = torch.tensor([[0, 17, 4]])
    logits = []
    for folder in (source, output):
        model = dsv4.model.load(folder)
        logits.append(model.forward(tokens, model.new_cache(batch_size=1)).logits)
    assert logits[0].shape[:2] == (1, 3)
    assert torch.equal(logits[0].view(torch.int32), logits[1].view(torch.int32))


OPTIONS = ("to", "layout", "target", "scale_dtype", "wo_a", "on_inexact", "dense")


@pytest.mark.slow
def test_a_type_checker_sees_a_typo(tmp_path: Path) -> None:
    """mypy, with dsv4 as installed, refuses a value that an option does not have, and takes those that it has."""
    mypy = pytest.importorskip("mypy.api")
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nstrict = true\nfollow_imports = skip\n[mypy-dsv4.*]\nfollow_imports = silent\n"
    )
    right = 'layout="mp", target="vllm", scale_dtype="e8m0", wo_a="bf16", on_inexact="keep", dense="q8_0"'
    calls = [f"convert('a', 'b', {option}='typo')" for option in OPTIONS]
    calls += [f"convert('a', 'b', to='{to}')" for to in CONVERSIONS]
    calls += [f"convert('a', 'b', {right}).is_exact", "int(verify('a').exit_code)"]
    (tmp_path / "calls.py").write_text("\n".join(["from dsv4.convert import convert, verify", *calls, ""]))
    options = ["--config-file", str(tmp_path / "mypy.ini"), "--cache-dir", str(tmp_path / "cache")]
    words, problems, _ = mypy.run([*options, str(tmp_path / "calls.py")])
    assert problems == ""
    for number, option in enumerate(OPTIONS, start=2):
        assert f'calls.py:{number}: error: Argument "{option}" to "convert" has incompatible type' in words
    assert words.count("error:") == len(OPTIONS), words
