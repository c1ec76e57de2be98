"""The class of every token: n-grams consist of classes, so that "The" and " the" share their rows.

A class is a text without case, accents and width, numbered in the order of first appearance over all token ids. The
tables depend on these numbers, so a tokenizer that gives another number of classes is refused.
"""

import re
import unicodedata
from collections.abc import Iterable

import torch
from tokenizers import Tokenizer

from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.errors import InputError

TOKENIZER = "tokenizer.json"
REPLACEMENT = "\ufffd"  # what bytes that are no UTF-8 decode to
# Unicode's White_Space without U+001C to U+001F, which Python's str.strip would take too.
WHITE_SPACE = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f"
    "\u205f\u3000"
)
_BLANKS = re.compile(r"[ \t\r\n]+")


def class_key(text: str, token: str) -> str:
    """The text that stands for a class: of a token that decodes to `text` and is `token` in the vocabulary."""
    if REPLACEMENT in text:
        return token
    decomposed = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    letters = "".join(c.lower() for c in decomposed if not unicodedata.category(c).startswith("M"))
    plain = _BLANKS.sub(" ", letters)
    if plain == " ":
        return plain
    return plain.strip(WHITE_SPACE) or text


def number_classes(keys: Iterable[str]) -> torch.Tensor:
    """Keys in the order of token ids -> the number of each one's class, int64, by first appearance."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys], dtype=torch.int64)


def _tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    where = f"{checkpoint.storage.label}/{TOKENIZER}"
    if TOKENIZER not in checkpoint.files:
        raise InputError(
            f"{where} is missing: the n-gram tables of this model are addressed by it", "Copy it from the release."
        )
    try:
        return Tokenizer.from_buffer(checkpoint.storage.read(TOKENIZER, 0, checkpoint.files[TOKENIZER]))
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"{where} is not a tokenizer: {error}") from None


def token_classes(checkpoint: Checkpoint, vocabulary: int, expected: int) -> torch.Tensor:
    """The class of each token id below `vocabulary`, int64 [vocabulary], from the checkpoint's own tokenizer.

    Raises InputError without a tokenizer, or for one whose tokens do not make `expected` classes.
    """
    tokenizer = _tokenizer(checkpoint)
    ids = range(vocabulary)
    texts = tokenizer.decode_batch([[i] for i in ids], skip_special_tokens=False)
    keys = (class_key(text, tokenizer.id_to_token(i) or "") for i, text in zip(ids, texts, strict=True))
    classes = number_classes(keys)
    found = int(classes.max()) + 1
    if found != expected:
        raise InputError(
            f"{checkpoint.storage.label}/{TOKENIZER}: its tokens make {found} classes, "
            f"config.json: engram_compressed_vocab_size is {expected}",
            "The tokenizer belongs to another checkpoint: copy the release's.",
        )
    return classes
