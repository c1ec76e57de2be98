"""V4.1's DSpark stages: against the plain program in float64, and answers that are the plain ones."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from exact_values import dsv4, tensors_of
from oracle_dspark import OracleV41
from ranks import run_ranks
from safetensors.torch import load_file

from dsv4.convert.synthetic.checkpoint import V41Geometry, make_checkpoint
from dsv4.model import load
from dsv4.model.evaluate.logits import teacher_forced
from dsv4.model.generate import Limits, generate
from dsv4.model.sampling import Sampling
from dsv4.model.transformer import Transformer

TOKENS = torch.randint(0, 306, (40,), generator=torch.Generator().manual_seed(9)).tolist()
WINDOW = V41Geometry().sliding_window


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("dspark-v41") / "c", seed=4, geometry=V41Geometry())


@pytest.fixture(scope="module")
def exact(folder: Path) -> Transformer:
    return load(folder, simulation=False)


@pytest.mark.parametrize("known", [1, WINDOW - 1, WINDOW + 1, 38])
@pytest.mark.fast_cases(1)
def test_a_draft_is_what_the_formulas_say(exact: Transformer, folder: Path, known: int) -> None:
    hidden = exact.forward(torch.tensor([TOKENS]), exact.new_cache(1)).hidden[0]
    oracle = OracleV41(tensors_of(folder), json.loads((folder / "config.json").read_text()))
    want = oracle.draft(hidden[:known].to(torch.float64).numpy(), TOKENS[known])
    found = teacher_forced(exact, TOKENS).drafts
    assert found is not None and found.tokens[known - 1].tolist() == want.tokens
    # float32 against float64 through three blocks: 1e-6 of the logits' size, which is about 3.
    assert np.abs(found.logits[known - 1].numpy() - want.logits).max() < 1e-4
    assert np.abs(found.confidence[known - 1].numpy() - want.confidence).max() < 1e-4


@pytest.mark.slow
def test_the_split_into_calls_changes_no_bit(folder: Path) -> None:
    model = load(folder)
    whole, parts = (teacher_forced(model, TOKENS, prefill).drafts for prefill in (None, 7))
    assert whole is not None and parts is not None
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("simulation", [True, False])
def test_the_answer_is_the_plain_one(folder: Path, simulation: bool) -> None:
    """Rejections at every remainder of the groups of two tokens, and behind n-grams of four."""
    model = load(folder, simulation=simulation)
    for sampling in (Sampling(temperature=0), Sampling(0.8, 0.95, 1)):
        prompts = [TOKENS[:length] for length in (1, 6, 17)]
        plain, drafted = (generate(model, prompts, Limits(14), sampling, draft=draft) for draft in (False, True))
        assert [answer.tokens for answer in plain[0]] == [answer.tokens for answer in drafted[0]]
        assert drafted[1].drafted > drafted[1].accepted


@pytest.mark.slow
def test_ranks_share_the_stages_own_experts(folder: Path, tmp_path: Path) -> None:
    """Four of them, where a layer of the main stack has six: rank 1 has the second halves of both."""
    options = ["--tokens", ",".join(map(str, TOKENS[:12])), "--prefill", "7", "--logits"]
    assert dsv4("run", folder, *options, tmp_path / "one")[0] == 0
    ended = run_ranks(2, tmp_path, "run", folder, *options, "two")
    assert ended.codes == [0, 0], ended.err
    one, two = load_file(tmp_path / "one"), load_file(tmp_path / "two")
    assert one.keys() == two.keys() >= {"draft_tokens", "draft_logits", "draft_confidence"}
    assert all(torch.equal(one[name], two[name]) for name in one)
