"""The rows of the engines: what convert writes for an engine is what its own row says that it reads right."""

import pytest

from dsv4.convert.plan.engines import ENGINES, EngineName
from dsv4.convert.plan.settings import resolve

SAFETENSORS = {"e8m0": "F8_E8M0", "f32": "F32"}


@pytest.mark.parametrize("name", [name for name, engine in ENGINES.items() if engine.layout == "hf" and engine.target])
def test_an_engine_reads_what_is_written_for_it(name: EngineName) -> None:
    engine, settings = ENGINES[name], resolve(target=name)
    assert SAFETENSORS[settings.scale_dtype or ""] in engine.expert_scales["fp8"]
    assert settings.wo_a in engine.wo_a
    assert engine.target is not None
    assert engine.target.expert_dtype in engine.declared.get("fp8", (engine.target.expert_dtype,))


@pytest.mark.parametrize("name", [name for name, engine in ENGINES.items() if engine.layout == "mp"])
def test_an_engine_of_rank_files_reads_what_the_layout_writes(name: EngineName) -> None:
    assert resolve(layout="mp", model_parallel=2, target=name).wo_a in ENGINES[name].wo_a
    assert set(SAFETENSORS.values()) == set(ENGINES[name].expert_scales["fp8"])  # the layout keeps the source's
    assert None in ENGINES[name].declared["fp8"]
