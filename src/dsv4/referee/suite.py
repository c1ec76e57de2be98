"""The prompts of `--suite`: a few dozen that show the known ways to read a checkpoint wrongly.

    texts       English, Chinese, Japanese, Arabic, code, numbers: rare and frequent tokens
    requests    with a system message, a tool, several turns: the edition's special tokens
    borders     one text cut at 127, 128, 129 tokens and so on: the window, blocks of 4 and 128, groups of 128
    positions   one long prompt: YaRN, the indexer's choice
    ids         token ids spread over the whole vocabulary: hash-routed experts, rows of the embedding and the head

Texts become token ids with the checkpoint's own tokenizer and edition. The ids are the same for every server.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

TEXTS = {
    "English": "Explain in three sentences why the sky is blue and sunsets are red.",
    "Chinese": "请用三句话解释为什么天空是蓝色的，而日落是红色的。",
    "Japanese": "空が青く、夕日が赤い理由を三つの文で説明してください。",
    "Arabic": "اشرح في ثلاث جمل لماذا السماء زرقاء والغروب أحمر.",
    "code": "def gcd(a, b):\n    while b:\n        a, b = b, a % b\n    return a\n\nWrite the same in Rust.",
    "numbers": "Add 3.14159, -2.71828 and 1e-9; then list the primes below 60: 2, 3, 5, 7, 11, 13, 17, 19, 23,",
    "rare": "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 🦌🎻 ≠ ∅ ∀x∈ℝ",
}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a place.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}
REQUESTS: dict[str, list[dict[str, Any]]] = {
    "system": [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "Capital of Peru?"}],
    "tool": [
        {"role": "system", "content": "Use tools.", "tools": [TOOL]},
        {"role": "user", "content": "Is it raining in Oslo?"},
    ],
    "turns": [
        {"role": "user", "content": "Name a prime."},
        {"role": "assistant", "content": "7"},
        {"role": "user", "content": "A larger one."},
    ],
}
SENTENCE = "The quick brown fox jumps over the lazy dog while {} clouds drift past the old stone bridge. "
BORDERS = (2, 3, 5, 31, 32, 33, 127, 128, 129, 130, 255, 256, 257, 511, 512, 513)
LONGEST = 1500
IDS = 256


@dataclass(frozen=True)
class SuitePrompt:
    """A prompt of the suite: what it covers, and its token ids."""

    name: str
    tokens: list[int]


def _long_text(tokens: int) -> str:
    return "".join(SENTENCE.format(number) for number in range(tokens // 8))


def suite(
    encode_messages: Callable[[list[dict[str, Any]]], list[int]],
    encode_text: Callable[[str], list[int]],
    vocabulary: int,
    context: int,
) -> Iterator[SuitePrompt]:
    """Every prompt that fits the context, as token ids.

    encode_messages: messages to token ids, as the edition prompts. encode_text: a text as it is.
    """
    for name, text in TEXTS.items():
        yield SuitePrompt(name, encode_messages([{"role": "user", "content": text}]))
    for name, messages in REQUESTS.items():
        yield SuitePrompt(name, encode_messages(messages))
    long = encode_text(_long_text(min(LONGEST, context)))
    for length in BORDERS:
        if length <= min(len(long), context):
            yield SuitePrompt(f"{length} tokens", long[:length])
    yield SuitePrompt("long", long[: min(LONGEST, context)])
    count = min(IDS, context, vocabulary)
    yield SuitePrompt("ids", [position * vocabulary // count for position in range(count)])
