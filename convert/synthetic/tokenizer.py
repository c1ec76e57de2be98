"""A small byte-level BPE tokenizer with the special tokens of the release's message protocol.

It is not trained: the merges are the prefixes of a fixed list of words, so the file is the same on every machine.
Every text can be encoded (all 256 bytes are in the vocabulary) and comes back unchanged. As in the release, BOS is
token 0 and EOS token 1; the other special tokens are the last ones, at smaller ids than the release's.
"""

import json
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

FIRST_TOKENS = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")
LAST_TOKENS = (
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜latest_reminder｜>",
    "<think>",
    "</think>",
    "｜DSML｜",
    "<｜action｜>",
    "<｜query｜>",
    "<｜authority｜>",
    "<｜domain｜>",
    "<｜title｜>",
    "<｜read_url｜>",
)
# Ġ is how byte-level BPE writes a space.
WORDS = ("the", "Ġthe", "Ġof", "Ġand", "Ġto", "Ġin", "Ġis", "Ġa", "hello", "Ġworld", "ing", "tion", "ĠThe", "er", "es")


def _merges() -> list[tuple[str, str]]:
    pairs = [(word[:end], word[end]) for word in WORDS for end in range(1, len(word))]
    return list(dict.fromkeys(pairs))


def small_tokenizer(special: tuple[str, ...] = ()) -> Tokenizer:
    """The tokenizer itself: about 310 tokens, of which 15 are special, and those of `special` behind them."""
    merges = _merges()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = dict.fromkeys([*FIRST_TOKENS, *letters, *("".join(pair) for pair in merges)])
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    added = [AddedToken(token, special=True, normalized=False) for token in (*FIRST_TOKENS, *LAST_TOKENS, *special)]
    tokenizer.add_special_tokens(added)
    return tokenizer


def tokenizer_config() -> dict[str, Any]:
    """tokenizer_config.json with the keys of the release's."""

    def token(content: str) -> dict[str, Any]:
        flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        return {"__type": "AddedToken", "content": content, **flags}

    return {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": token(FIRST_TOKENS[0]),
        "clean_up_tokenization_spaces": False,
        "eos_token": token(FIRST_TOKENS[1]),
        "legacy": True,
        "model_max_length": 1048576,
        "pad_token": token(FIRST_TOKENS[1]),
        "sp_model_kwargs": {},
        "unk_token": None,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def tokenizer_json(special: tuple[str, ...] = ()) -> str:
    """The text of tokenizer.json, with more special tokens at the end."""
    return json.dumps(json.loads(small_tokenizer(special).to_str()), ensure_ascii=False, indent=2) + "\n"
