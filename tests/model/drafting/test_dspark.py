"""DSpark's stages: against a plain program in float64, and the same bits however positions and drafts are grouped."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from drafting import STAGES, WINDOW, random_drafts
from exact_values import convert, edit_config, edit_tensors, tensors_of
from oracle_dspark import Oracle
from raw_safetensors import raw

from dsv4.convert.synthetic.checkpoint import Geometry, make_checkpoint
from dsv4.errors import InputError, UsageError
from dsv4.model import load
from dsv4.model.drafting.dspark import Drafts
from dsv4.model.evaluate.logits import teacher_forced
from dsv4.model.transformer import Transformer

TOKENS = torch.randint(0, 60, (60,), generator=torch.Generator().manual_seed(7)).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_drafts(tmp_path_factory.mktemp("dspark") / "checkpoint")


@pytest.fixture(scope="module")
def model(folder: Path) -> Transformer:
    return load(folder)


@pytest.fixture(scope="module")
def exact(folder: Path) -> Transformer:
    return load(folder, simulation=False)


@pytest.fixture(scope="module")
def expected(model: Transformer) -> Drafts:
    return drafts_of(model, len(TOKENS))


def drafts_of(model: Transformer, prefill: int | None, tokens: list[int] = TOKENS) -> Drafts:
    drafts = teacher_forced(model, tokens, prefill).drafts
    assert drafts is not None
    return drafts


def same_bits(one: Drafts, other: Drafts) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_main_hidden_is_the_mean_of_the_streams_after_the_target_layers(exact: Transformer) -> None:
    streams: dict[str, torch.Tensor] = {}
    output = exact.forward(torch.tensor([TOKENS]), exact.new_cache(1), trace=streams.__setitem__)
    means = [streams[f"layers.{layer}"].to(torch.float64).mean(1) for layer in STAGES.target_layer_ids]
    # Four float32 numbers are added: an error of a few units of 2 ** -24, relative to the largest stream.
    assert torch.allclose(output.hidden[0].to(torch.float64), torch.cat(means, -1), rtol=0, atol=2e-5)


# Fewer positions than the window, as many, and more; the first position of a text.
@pytest.mark.parametrize("known", [1, 2, WINDOW - 1, WINDOW, WINDOW + 1, 41])
@pytest.mark.fast_cases(1)
def test_a_draft_is_what_the_formulas_say(exact: Transformer, folder: Path, known: int) -> None:
    hidden = exact.forward(torch.tensor([TOKENS]), exact.new_cache(1)).hidden[0]
    oracle = Oracle(tensors_of(folder), json.loads((folder / "config.json").read_text()))
    want = oracle.draft(hidden[:known].to(torch.float64).numpy(), TOKENS[known])
    found = drafts_of(exact, None)
    assert found.tokens[known - 1].tolist() == want.tokens
    # float32 against float64 through three blocks: 1e-6 of the logits' size, which is about 3.
    assert np.abs(found.logits[known - 1].numpy() - want.logits).max() < 1e-4
    assert np.abs(found.confidence[known - 1].numpy() - want.confidence).max() < 1e-4


@pytest.mark.parametrize("prefill", [1, 7, WINDOW, 33])
@pytest.mark.slow
def test_the_split_into_calls_changes_no_bit(model: Transformer, expected: Drafts, prefill: int) -> None:
    assert same_bits(drafts_of(model, prefill), expected)


def test_a_draft_alone_has_the_bits_of_a_draft_among_others(model: Transformer, expected: Drafts) -> None:
    assert model.dspark is not None
    hidden = model.forward(torch.tensor([TOKENS]), model.new_cache(1)).hidden[0]
    context = model.dspark.new_context()
    with torch.inference_mode():
        for begin in (0, 13, 14):
            end = 13 if begin == 0 else begin + 1 if begin == 13 else 47
            model.dspark.extend([context], [hidden[begin:end]])
            context.trim(WINDOW)
            start = context.start(context.length, TOKENS[end], WINDOW)
            alone = model.dspark.draft([start], STAGES.block_size)
            assert same_bits(alone, Drafts(*(each[end - 1 : end] for each in expected)))


def test_fewer_tokens_are_the_first_of_the_block(model: Transformer, expected: Drafts) -> None:
    assert model.dspark is not None
    hidden = model.forward(torch.tensor([TOKENS[:20]]), model.new_cache(1)).hidden[0]
    context = model.dspark.new_context()
    with torch.inference_mode():
        model.dspark.extend([context], [hidden])
        found = model.dspark.draft([context.start(20, TOKENS[20], WINDOW)], 2)
    assert same_bits(found, Drafts(*(each[19:20, :2] for each in expected)))


def test_memory_changes_no_bit(folder: Path, expected: Drafts) -> None:
    """Most matrices, the Markov tables among them, are then read from the files each time."""
    bounded = load(folder, max_memory=400_000)
    assert bounded.store.resident_bytes < 400_000
    # The last row has another anchor where the tokens end.
    some = Drafts(*(each[:5] for each in drafts_of(bounded, None, TOKENS[:6])))
    assert same_bits(some, Drafts(*(each[:5] for each in expected)))


@pytest.mark.parametrize("target", ["fp8", "bf16"])
@pytest.mark.slow
def test_conversions_change_no_bit(folder: Path, expected: Drafts, tmp_path: Path, target: str) -> None:
    convert(folder, tmp_path / target, "--to", target)
    assert same_bits(drafts_of(load(tmp_path / target), None), expected)


def test_the_last_draft_goes_on_from_the_likeliest_token(model: Transformer) -> None:
    evaluation = teacher_forced(model, TOKENS[:9])
    longer = drafts_of(model, None, [*TOKENS[:9], int(evaluation.logits[-1].argmax())])
    assert evaluation.drafts is not None
    assert same_bits(evaluation.drafts, Drafts(*(each[:9] for each in longer)))


# --- damage ---


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"dspark_target_layer_ids": [1, 4]}, "dspark_target_layer_ids names no layer"),
        ({"dspark_target_layer_ids": [3, 2, 1]}, "dspark_target_layer_ids must be in ascending order"),
        ({"dspark_target_layer_ids": "all"}, "dspark_target_layer_ids must be a list of layers"),
        ({"dspark_target_layer_ids": [1, 2]}, "main_proj.weight' is F8_E4M3"),
        ({"dspark_noise_token_id": 64}, "dspark_noise_token_id is not in the vocabulary"),
        ({"dspark_block_size": 10**9}, "dspark_block_size exceeds 64"),
        ({"dspark_block_size": 0}, "dspark_block_size must be positive"),
        ({"dspark_markov_rank": None}, "dspark_markov_rank is missing"),
        ({"dspark_markov_rank": 48}, "confidence_head.proj.weight' is BF16"),
        ({"compress_ratios": [0, 4, 128, 4, 0, 0, 4]}, "compress_ratios of the draft stages are not 0"),
        ({"compress_ratios": [0, 4, 128, 4, 0]}, "no entry for 3 draft stage"),
        ({"dspark_block_size": None}, "draft stages are DSpark's .*, config.json has no dspark_block_size"),
    ],
)
@pytest.mark.fast_cases(1)
def test_a_config_that_does_not_fit(tmp_path: Path, keys: dict[str, object], message: str) -> None:
    folder = random_drafts(tmp_path / "checkpoint")
    edit_config(folder, **keys)
    with pytest.raises(InputError, match=message):
        load(folder)


def test_stages_of_one_edition_and_a_config_of_another(tmp_path: Path) -> None:
    """The error names what both say."""
    folder = make_checkpoint(tmp_path / "mtp", geometry=Geometry(vocab_size=64), tokenizer=False)
    edit_config(folder, **STAGES.config(), compress_ratios=[0, 4, 128, 4, 0])
    with pytest.raises(InputError, match="dspark_block_size, the draft stages are MTP blocks"):
        load(folder)


def test_keys_of_another_edition_mean_nothing(tmp_path: Path, expected: Drafts) -> None:
    """V4 has no keys for the experts of its stages: they are as many as the main stack's."""
    folder = random_drafts(tmp_path / "checkpoint")
    edit_config(folder, dspark_n_routed_experts=2, dspark_num_experts_per_tok=1)
    assert same_bits(drafts_of(load(folder), None), expected)


@pytest.mark.parametrize(
    "name", ["mtp.0.main_proj.weight", "mtp.1.attn.wkv.weight", "mtp.2.markov_head.markov_w2.weight"]
)
@pytest.mark.fast_cases(1)
def test_a_tensor_that_is_missing(tmp_path: Path, name: str) -> None:
    folder = random_drafts(tmp_path / "checkpoint")
    edit_tensors(folder, {}, drop=(name,))
    with pytest.raises(InputError, match=f"'{name}' is missing"):
        load(folder)


def test_a_markov_table_in_fp8_is_refused(tmp_path: Path) -> None:
    folder, name = random_drafts(tmp_path / "checkpoint"), "mtp.2.markov_head.markov_w1"
    codes = raw("F8_E4M3", np.full((64, 32), 0x38, dtype=np.uint8))
    edit_tensors(
        folder, {f"{name}.weight": codes, f"{name}.scale": raw("F8_E8M0", np.full((1, 1), 127, dtype=np.uint8))}
    )
    with pytest.raises(InputError, match=r"markov_w1\.weight' is F8_E4M3, which this engine has no decoder for"):
        load(folder)


def test_without_drafts_the_stages_are_not_read(tmp_path: Path) -> None:
    """A damaged stage stops nobody who does not draft, and takes no memory."""
    folder = random_drafts(tmp_path / "checkpoint")
    whole = load(folder)
    edit_tensors(folder, {}, drop=("mtp.1.attn.wkv.weight",))
    plain = load(folder, draft=False)
    assert plain.dspark is None and plain.store.resident_bytes < whole.store.resident_bytes
    ids = torch.tensor([TOKENS[:5]])
    logits = [m.forward(ids, m.new_cache(1)).logits for m in (whole, plain)]
    assert logits[0] is not None and logits[1] is not None and torch.equal(*logits)
    with pytest.raises(UsageError, match="no draft stages"):
        plain.new_drafter(1)
