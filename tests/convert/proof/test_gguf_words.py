"""What `verify` says of a key of a GGUF file that differs from the source's config: found, expected, and whose key."""

from typing import Any

import pytest

from dsv4.convert.proof.forms.gguf import key_faults

CONFIG: dict[str, Any] = {"num_hidden_layers": 2, "compress_ratios": [4, 128], "swiglu_limit": 10.0}
DRAFTS = "drafts dflash."


@pytest.mark.parametrize(
    ("keys", "config", "said"),
    [
        (
            {"deepseek4.expert_used_count": 5},
            {"num_experts_per_tok": 4},
            "deepseek4.expert_used_count is 5, expected 4 (the source's num_experts_per_tok)",
        ),
        (
            {"deepseek4.attention.compress_ratios": [4, 4]},
            {},
            "deepseek4.attention.compress_ratios are [4, 4], expected [4, 128] (the source's compress_ratios)",
        ),
        (
            {"deepseek4.swiglu_clamp_exp": [7.0, 10.0]},
            {},
            "deepseek4.swiglu_clamp_exp is [7.0, 10.0], expected 10.0 (the source's swiglu_limit)",
        ),
        (
            {DRAFTS + "block_count": 1, DRAFTS + "block_size": 3, DRAFTS + "target_layers": [2]},
            {"dspark_block_size": 3, "dspark_target_layer_ids": [2]},
            "drafts dflash.target_layers is [2], expected [3] (the source's dspark_target_layer_ids)",
        ),
    ],
)
def test_found_expected_and_the_key_of_the_source(keys: dict[str, Any], config: dict[str, Any], said: str) -> None:
    assert said in list(key_faults(keys, CONFIG | config))
