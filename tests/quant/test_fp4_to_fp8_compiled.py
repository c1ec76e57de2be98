"""The compiled cast: each code with each difference of scales, each pair of bytes, odd shapes; and doing without it."""

import os
import shutil
import sysconfig
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoint_variants import VARIANTS
from exact_values import tree
from oracle import E2M1_MAGNITUDES, E4M3_MAGNITUDES, nearest_code, power

from dsv4 import compiled
from dsv4.convert import convert
from dsv4.quant import e2m1, fp4_to_fp8, fp4_to_fp8_compiled
from dsv4.quant.block_scales import FP4_BLOCK, Block, scale_shape
from dsv4.quant.fp4_to_fp8 import TABLE_K_MAX, TABLE_K_MIN

WHOLE = Block(128, 128)
FORMS = {"torch": fp4_to_fp8.cast_into, "compiled": fp4_to_fp8_compiled.cast_into}


@pytest.fixture(params=FORMS)
def cast_into(request: pytest.FixtureRequest) -> fp4_to_fp8.CastInto:
    form: fp4_to_fp8.CastInto = FORMS[request.param]
    return form


@pytest.fixture
def not_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As where there was no compiler when dsv4 was installed."""
    monkeypatch.setattr(fp4_to_fp8_compiled, "_library", fp4_to_fp8_compiled._library.__wrapped__)
    monkeypatch.setattr(compiled, "_loaded", lambda: compiled._load(tmp_path / "nothing.so"))


def random_bytes(*shape: int, low: int = 0, high: int = 256) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.uint8)


def expected_codes(k: int) -> list[int]:
    """The E4M3 codes of the sixteen E2M1 codes times 2**k, by a formula. Beyond the limits nothing changes any more."""
    scale = power(min(max(k, TABLE_K_MIN), TABLE_K_MAX))
    codes = [nearest_code(m * scale, E4M3_MAGNITUDES) for m in E2M1_MAGNITUDES]
    return codes + [code | 0x80 for code in codes]


def test_where_a_compiler_is_there_the_compiled_form_was_tested() -> None:
    """Where there is none, both forms are the one in torch, and the comparisons below say nothing.

    The installation takes the compiler that Python was built with, under that name, or $CC.
    """
    named = os.environ.get("CC") or sysconfig.get_config_var("CC")
    assert fp4_to_fp8_compiled.is_compiled() == (shutil.which(named.split()[0]) is not None)


@pytest.mark.fast_cases(1)
def test_every_code_with_every_difference_of_scales(cast_into: fp4_to_fp8.CastInto) -> None:
    packed = e2m1.pack(torch.arange(32, dtype=torch.uint8).remainder(16).expand(1, 32))
    out = torch.empty(1, 32, dtype=torch.uint8)
    for k in range(-254, 255):
        scale, block_scale = (torch.tensor([[byte]], dtype=torch.uint8) for byte in (max(k, 0), max(-k, 0)))
        zeros = cast_into(packed, scale, block_scale, FP4_BLOCK, out)
        assert out.tolist() == [2 * expected_codes(k)]
        assert zeros == 2 * expected_codes(k).count(0x80)


def test_every_pair_of_bytes(cast_into: fp4_to_fp8.CastInto) -> None:
    packed = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.uint8).view(512, 256)
    scale, block_scale = torch.full((512, 16), 130, dtype=torch.uint8), torch.full((4, 4), 127, dtype=torch.uint8)
    out = torch.empty(512, 512, dtype=torch.uint8)
    zeros = cast_into(packed, scale, block_scale, WHOLE, out)
    expected = torch.tensor(expected_codes(3), dtype=torch.uint8)[e2m1.unpack(packed).long()]
    assert torch.equal(out, expected) and zeros == 65536 * 4 // 16


# Groups: one, either side of what the count of zeros takes at once (127), blocks cut short in rows and in columns.
@pytest.mark.parametrize("shape", [(1, 32), (3, 96), (130, 4064), (129, 4096), (257, 128 * 32 + 32), (128, 8192)])
@pytest.mark.parametrize("block", [WHOLE, Block(32, 32), Block(1, 64)], ids=str)
def test_both_forms_agree_on_odd_shapes(shape: tuple[int, int], block: Block) -> None:
    rows, columns = shape
    packed = random_bytes(rows, columns // 2)
    scale = random_bytes(*scale_shape(shape, FP4_BLOCK), low=100, high=140)
    block_scale = random_bytes(*scale_shape(shape, block), low=100, high=140)
    plain, fast = torch.empty(shape, dtype=torch.uint8), torch.full(shape, 77, dtype=torch.uint8)
    zeros = [FORMS["torch"](packed, scale, block_scale, block, plain)]
    zeros += [FORMS["compiled"](packed, scale, block_scale, block, fast)]
    assert torch.equal(plain, fast)
    assert zeros == 2 * [int((plain == 0x80).sum())]


def test_all_zeros_are_counted(cast_into: fp4_to_fp8.CastInto) -> None:
    packed, scale = torch.full((5, 4096), 0x88, dtype=torch.uint8), torch.full((5, 256), 127, dtype=torch.uint8)
    out = torch.empty(5, 8192, dtype=torch.uint8)
    block_scale = torch.full((1, 64), 127, dtype=torch.uint8)
    assert cast_into(packed, scale, block_scale, WHOLE, out) == 5 * 8192


def test_what_c_cannot_walk_over(cast_into: fp4_to_fp8.CastInto) -> None:
    """A stack of matrices, rows that end inside a group, and memory with gaps."""
    for shape in ((2, 3, 64), (3, 40)):
        packed, scale = random_bytes(*shape[:-1], shape[-1] // 2), random_bytes(*scale_shape(shape, FP4_BLOCK))
        block_scale = random_bytes(*scale_shape(shape, WHOLE))
        out = torch.empty(shape, dtype=torch.uint8)
        cast_into(packed, scale, block_scale, WHOLE, out)
        assert torch.equal(out, fp4_to_fp8.cast(packed, scale, block_scale, WHOLE))
    scale, block_scale = random_bytes(3, 4)[:, ::2], random_bytes(1, 1)
    packed, out = random_bytes(3, 32), torch.empty(3, 64, dtype=torch.uint8)
    cast_into(packed, scale, block_scale, WHOLE, out)
    assert torch.equal(out, fp4_to_fp8.cast(packed, scale, block_scale, WHOLE))


def test_too_few_scales_are_an_error_and_not_read_past_their_end(cast_into: fp4_to_fp8.CastInto) -> None:
    with pytest.raises(RuntimeError):
        cast_into(
            random_bytes(4, 32), random_bytes(3, 2), random_bytes(1, 1), WHOLE, torch.empty(4, 64, dtype=torch.uint8)
        )


def test_the_table_is_there_as_long_as_c_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that are the first at once make a table each; the cache keeps one, whichever C is reading."""
    tables = []

    def kept_by_nobody() -> torch.Tensor:
        table = torch.zeros(1, dtype=torch.uint8)
        tables.append(weakref.ref(table))
        return table

    def read(*arguments: int) -> int:
        return sum(table() is not None and table().data_ptr() in arguments for table in tables)

    monkeypatch.setattr(fp4_to_fp8_compiled, "_tables", kept_by_nobody)
    monkeypatch.setattr(fp4_to_fp8_compiled, "_library", lambda: SimpleNamespace(dsv4_fp4_to_fp8=read))
    out = torch.empty(4, 64, dtype=torch.uint8)
    arguments = random_bytes(4, 32), random_bytes(4, 2), random_bytes(1, 1), WHOLE, out
    assert fp4_to_fp8_compiled.cast_into(*arguments) == 1


def test_the_choice(not_compiled: None) -> None:
    assert not fp4_to_fp8_compiled.is_compiled()
    assert fp4_to_fp8_compiled.best_kernel() is fp4_to_fp8.cast_into


def test_conversions_with_either_have_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = VARIANTS["ragged"](tmp_path / "source")
    for name, form in FORMS.items():
        monkeypatch.setattr(fp4_to_fp8_compiled, "best_kernel", lambda form=form: form)
        convert(source, tmp_path / name)
    assert tree(tmp_path / "torch") == tree(tmp_path / "compiled")
