"""Quantizations of other tools are named for what they are, and nothing that dsv4 reads is taken for one of them."""

from pathlib import Path

import pytest
from checkpoint_variants import VARIANTS
from exact_values import read_json, tensors_of
from foreign_checkpoints import KINDS, foreign

from dsv4.convert.checkpoint.foreign import foreign_quantization


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.fast_cases(2)
def test_its_config_and_its_tensors_are_each_enough(tmp_path: Path, kind: str) -> None:
    folder = foreign(tmp_path / "foreign", kind)
    config, names = read_json(folder / "config.json"), list(tensors_of(folder))
    found = foreign_quantization(config, names)
    assert found is not None and found.name == kind
    by_tensors = foreign_quantization({}, names)
    assert by_tensors is not None and by_tensors.name == kind.partition(" (")[0]
    assert by_tensors.evidence.removeprefix("there is ") in names
    by_config = foreign_quantization(config, [])
    declared = any(KINDS[kind][1].get(key) for key in ("quantization_config", "quantization"))
    assert (by_config.name if by_config else None) == (kind if declared else None)


@pytest.mark.parametrize("kind", VARIANTS)
@pytest.mark.fast_cases(1)
def test_what_dsv4_reads_is_not_foreign(tmp_path: Path, kind: str) -> None:
    folder = VARIANTS[kind](tmp_path / "ours")
    assert foreign_quantization(read_json(folder / "config.json"), tensors_of(folder)) is None


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"quantization_config": {"quant_method": "hqq"}}, "hqq"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}, "NVIDIA ModelOpt (FP8)"),
        ({"quantization_config": {"quant_method": "AWQ"}}, "AWQ"),
        ({"quantization_config": {"quant_method": "FP8"}}, None),
        ({"quantization_config": {"quant_method": ["awq"]}}, None),
        ({"quantization_config": ["awq"]}, None),
        ({"quantization": {"bits": {}}}, None),
        ({"quantization": "w8a8"}, None),
        ({}, None),
    ],
)
def test_configs(config: dict, name: str | None) -> None:
    found = foreign_quantization(config, ["embed.weight", "layers.0.attn.wkv.weight", "layers.0.attn.wkv.scale"])
    assert (found.name if found else None) == name
