"""The same tokens on a checkpoint and on its conversions give bit-equal logits: weights decode to equal values."""

from pathlib import Path
from typing import Any

import pytest
import torch
from mixed_scales import mix_scales
from tiny import RAGGED

from dsv4.convert import convert
from dsv4.convert.synthetic.checkpoint import Geometry, make_checkpoint
from dsv4.model import load

SMALL = Geometry(compress_ratios=(0, 4, 0), vocab_size=64, hidden_size=128, n_routed_experts=4, index_topk=3)
pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = torch.randint(0, 64, (1, 41), generator=torch.Generator().manual_seed(2))


def logits(folder: Path, simulation: bool = True) -> torch.Tensor:
    """Main and MTP logits of TOKENS as integers, to compare bits."""
    model = load(folder, simulation=simulation)
    output = model.forward(TOKENS, model.new_cache(1))
    drafted = model.mtp_logits(output.hidden[:, :-1], TOKENS[:, 1:], model.new_mtp_cache(1))
    assert output.logits is not None and drafted is not None and torch.isfinite(output.logits).all()
    return torch.cat((output.logits, drafted), 1).view(torch.int32)


SOURCES: dict[str, dict[str, Any]] = {
    "released": {"geometry": SMALL},
    "ragged": {"geometry": RAGGED},
    "base": {"geometry": SMALL, "experts": "fp8"},
    "mixed scales": {"geometry": SMALL},
}
CONVERSIONS: dict[str, dict[str, Any]] = {
    "float32 scales": {"to": "fp8", "on_inexact": "keep"},
    "e8m0 scales, wo_a in bf16": {"to": "fp8", "on_inexact": "keep", "scale_dtype": "e8m0", "wo_a": "bf16"},
    "bf16": {"to": "bf16"},
    "mxfp8": {"to": "mxfp8"},
    "mxfp4": {"to": "mxfp4"},
    "mlx": {"to": "mlx"},
}


@pytest.fixture(scope="module", params=SOURCES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    folder = make_checkpoint(tmp_path_factory.mktemp("source") / "c", seed=3, tokenizer=False, **SOURCES[request.param])
    if request.param == "mixed scales":
        mix_scales(folder)
    return folder, logits(folder)


@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.fast_cases(1)
def test_bit_equal(source: tuple[Path, torch.Tensor], conversion: str, tmp_path: Path) -> None:
    folder, expected = source
    convert(folder, tmp_path / "out", **CONVERSIONS[conversion])
    assert torch.equal(logits(tmp_path / "out"), expected)


@pytest.mark.parametrize("options", [{"to": "gguf"}, {"to": "nvfp4", "input_scale": 1.0}], ids=["gguf", "nvfp4"])
@pytest.mark.parametrize("geometry", [SMALL, RAGGED], ids=["small", "ragged"])
@pytest.mark.fast_cases(1)
def test_bit_equal_from_forms_of_fp4_experts(geometry: Geometry, options: dict[str, Any], tmp_path: Path) -> None:
    """GGUF has the draft block in a file of its own, NVFP4 two scales for each of FP4's."""
    folder = make_checkpoint(tmp_path / "source", seed=5, geometry=geometry, tokenizer=False)
    convert(folder, tmp_path / "out", **options)
    assert torch.equal(logits(tmp_path / "out"), logits(folder))


def test_bit_equal_without_simulation(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "source", seed=4, geometry=SMALL, tokenizer=False)
    convert(folder, tmp_path / "bf16", to="bf16")
    assert torch.equal(logits(tmp_path / "bf16", False), logits(folder, False))


@pytest.mark.fast_cases(1)
def test_one_changed_weight_is_not_bit_equal(source: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    """The comparison above can fail: one bit of one dense weight is enough."""
    import shutil

    from dsv4.convert.checkpoint.reader import Checkpoint

    folder, expected = source
    changed = Path(shutil.copytree(folder, tmp_path / "changed"))
    info = Checkpoint.open(changed).tensors["layers.0.attn.wkv.weight"]
    with open(changed / info.shard, "r+b") as file:
        file.seek(info.extents[0].offset)
        byte = file.read(1)[0]
        file.seek(info.extents[0].offset)
        file.write(bytes([byte ^ 0b0_0010_000]))
    assert not torch.equal(logits(changed), expected)
