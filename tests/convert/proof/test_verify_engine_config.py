"""The reference engine's config.json against config.json of a folder that has no inference/config.json."""

import json
import shutil
from pathlib import Path

import pytest
from tiny import TINY

from dsv4.convert import convert, verify
from dsv4.convert.proof.forms import engine
from dsv4.convert.synthetic.checkpoint import make_checkpoint


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A release without inference/config.json, and its rank file."""
    root = tmp_path_factory.mktemp("engine")
    release = make_checkpoint(root / "release", geometry=TINY, tokenizer=False)
    convert(release, root / "ranks", to="same", layout="mp", model_parallel=1)
    (release / "inference" / "config.json").unlink()
    return release, root / "ranks"


def test_both_ways_they_are_the_same_model(sides: tuple[Path, Path]) -> None:
    release, ranks = sides
    assert verify(release, ranks).exit_code == 0 and verify(ranks, release).exit_code == 0


@pytest.mark.parametrize(
    ("key", "released", "value"),
    [
        ("n_activated_experts", "num_experts_per_tok", 5),
        ("rope_factor", "rope_scaling.factor", 3),
        ("beta_slow", "rope_scaling.beta_slow", 7),
        ("compress_ratios", "compress_ratios", [0, 0]),
        ("index_topk", "index_topk", None),
    ],
)
def test_a_value_of_the_engine_that_is_another(
    key: str, released: str, value: object, sides: tuple[Path, Path], tmp_path: Path
) -> None:
    """None: the key is missing."""
    release, ranks = sides
    damaged = tmp_path / "ranks"
    shutil.copytree(ranks, damaged)
    (damaged / "dsv4.json").unlink()
    config = json.loads((damaged / "config.json").read_text())
    config[key] = value
    (damaged / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    for result in (verify(release, damaged), verify(damaged, release)):
        assert result.exit_code == 1 and "1 problem" in result.verdict
        assert any(f"{released} = " in problem.text for problem in result.problems)


def test_the_proof_knows_every_key_of_the_engine(sides: tuple[Path, Path]) -> None:
    """But for those about storage, which are compared with the tensors."""
    written = json.loads((sides[1] / "config.json").read_text()).keys()
    assert written - {"dtype", "expert_dtype", "scale_fmt", "n_mtp_layers"} <= engine.KEYS.keys()


def test_a_config_that_nests_the_language_model(sides: tuple[Path, Path], tmp_path: Path) -> None:
    """As V4.1's does, in `text_config`."""
    release, ranks = sides
    nested = tmp_path / "release"
    shutil.copytree(release, nested)
    config = json.loads((nested / "config.json").read_text())
    outer = {key: config.pop(key) for key in ("model_type", "architectures", "quantization_config", "expert_dtype")}
    (nested / "config.json").write_text(json.dumps({**outer, "text_config": config}))
    assert verify(nested, ranks).exit_code == 0 and verify(ranks, nested).exit_code == 0
