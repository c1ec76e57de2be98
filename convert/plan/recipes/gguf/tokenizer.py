"""The tokenizer as keys of a GGUF file: tokens, their types, merges, and how text is split before them.

llama.cpp does not read tokenizer.json: it has a name for each way of splitting text that it implements. If this one is
not among them, its tokens would be wrong without an error; then no vocabulary is written, with a note.
"""

import json
from typing import Any

from dsv4.convert.checkpoint.forms.gguf.container import BOOL, I32, TEXT, U32, Entry
from dsv4.convert.checkpoint.header import strict_json
from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.errors import InputError

from .chat_template import chat_template

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
MAX_BYTES = 100_000_000
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
NONE = [Entry("tokenizer.ggml.model", TEXT, "none")]
# The three splits of DeepSeek-V3 and V4, as tokenizer.json has them; line ends are written out in some files.
_DEEPSEEK = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)


def _patterns(pre_tokenizer: Any) -> tuple[str, ...] | None:
    """The regular expressions that text is split by before bytes become characters; None for another way."""
    steps = pre_tokenizer.get("pretokenizers") if isinstance(pre_tokenizer, dict) else None
    if not isinstance(steps, list) or not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("use_regex"):
        return None
    found = [step.get("pattern", {}).get("Regex") for step in steps[:-1] if step.get("type") == "Split"]
    if len(found) != len(steps) - 1 or not all(isinstance(pattern, str) for pattern in found):
        return None
    return tuple(pattern.replace("\r", r"\r").replace("\n", r"\n") for pattern in found)


def _splitting(pre_tokenizer: Any) -> str | None:
    """llama.cpp's name for a way of splitting text; None if it has none."""
    if isinstance(pre_tokenizer, dict) and pre_tokenizer.get("type") == "ByteLevel" and pre_tokenizer.get("use_regex"):
        return "gpt-2"
    return "deepseek-v3" if _patterns(pre_tokenizer) == _DEEPSEEK else None


def _tokens(model: dict[str, Any], added: list[dict[str, Any]], size: int) -> tuple[list[str], list[int]]:
    """Token and type by id, filled up to the vocabulary that the model has rows for."""
    texts = {number: token for token, number in model["vocab"].items()}
    types = dict.fromkeys(texts, NORMAL)
    for token in added:
        texts[token["id"]], types[token["id"]] = token["content"], CONTROL if token["special"] else USER_DEFINED
    if max(texts) >= size:
        raise InputError(f"{FILE}: token {max(texts)} of a vocabulary of {size}", "Take both from one release.")
    numbers = range(size)
    return [texts.get(i, f"[PAD{i}]") for i in numbers], [types.get(i, UNUSED) for i in numbers]


def _read(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    size = checkpoint.files[name]
    if size > MAX_BYTES:
        raise InputError(f"{name}: {size} bytes, at most {MAX_BYTES} are believable")
    value = strict_json(checkpoint.storage.read(name, 0, size), name)
    if not isinstance(value, dict):
        raise InputError(f"{name}: a JSON object is expected")
    return value


def _settings(checkpoint: Checkpoint) -> list[Entry]:
    """First and last token of a text, whether they are added, and the chat template: the source's own, or ours."""
    given = _read(checkpoint, CONFIG) if CONFIG in checkpoint.files else {}
    found = [
        Entry(f"tokenizer.ggml.{name}_token_id", U32, checkpoint.released[f"{name}_token_id"])
        for name in ("bos", "eos")
        if type(checkpoint.released.get(f"{name}_token_id")) is int
    ]
    found += [
        Entry(f"tokenizer.ggml.add_{name}_token", BOOL, given[f"add_{name}_token"])
        for name in ("bos", "eos")
        if isinstance(given.get(f"add_{name}_token"), bool)
    ]
    template = given.get("chat_template")
    template = template if isinstance(template, str) else chat_template(checkpoint)
    return [*found, Entry("tokenizer.chat_template", TEXT, template)]


def tokenizer_entries(checkpoint: Checkpoint) -> tuple[list[Entry], list[str]]:
    """The keys, and a note if there is no vocabulary. Raises InputError for a tokenizer.json that is not one."""
    if FILE not in checkpoint.files:
        return NONE, [f"the source has no {FILE}: the GGUF file has no vocabulary, and takes token ids only"]
    given = _read(checkpoint, FILE)
    splitting = _splitting(given.get("pre_tokenizer"))
    if splitting is None or given.get("model", {}).get("type") != "BPE":
        return NONE, [f"llama.cpp has no name for how {FILE} splits text: the GGUF file has no vocabulary"]
    try:
        tokens, types = _tokens(given["model"], given.get("added_tokens", []), checkpoint.released["vocab_size"])
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in given["model"]["merges"]]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{FILE}: not a tokenizer: {json.dumps(str(error))} is wrong or missing") from None
    return [
        Entry("tokenizer.ggml.model", TEXT, "gpt2"),
        Entry("tokenizer.ggml.pre", TEXT, splitting),
        Entry("tokenizer.ggml.tokens", TEXT, tokens),
        Entry("tokenizer.ggml.token_type", I32, types),
        Entry("tokenizer.ggml.merges", TEXT, merges),
        *_settings(checkpoint),
    ], []
