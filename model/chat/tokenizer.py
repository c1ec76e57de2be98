"""The checkpoint's own tokenizer.json, through the `tokenizers` library.

Text is encoded as it is: special tokens written in it become special tokens, as in the release, and nothing is
added in front. A checkpoint without a tokenizer can still be run with token ids.
"""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from dsv4.errors import InputError
from dsv4.files import refuse_other_kinds

from .editions import protocol_of


class TextTokenizer:
    """Text to ids and back."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise InputError(
                f"{path} does not exist",
                "Without a tokenizer, give token ids: --tokens 0,5,7. Or copy the release's tokenizer.json there.",
            )
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            refuse_other_kinds(path.read_bytes(), str(path))
            raise InputError(f"{path} is not a tokenizer: {error}") from None

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, nothing added. Raises InputError for text that has no UTF-8 form."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                "the prompt is not valid text", f"It has half a character: {text[error.start]!a}."
            ) from None
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens included. Ids outside the vocabulary are left out."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def token_id(self, token: str) -> int | None:
        """The id of one token, or None if the vocabulary lacks it."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def stream(self) -> "TextStream":
        """A decoder for ids that arrive one by one."""
        return TextStream(self)


MOST_TOKENS_OF_A_CHARACTER = 4  # bytes of the longest UTF-8 character; more cannot complete one


class TextStream:
    """Decodes ids one by one. A character of several tokens appears with its last one.

    The library's DecodeStream fails on bytes that are not UTF-8, which a poor model writes.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._shown: list[int] = []  # the tokens of the last piece: a decoder may look at what comes before
        self._waiting: list[int] = []

    def step(self, token: int) -> str:
        """The text that `token` adds, "" while a character is incomplete."""
        self._waiting.append(token)
        text = self._text()
        if text.endswith("\ufffd") and len(self._waiting) < MOST_TOKENS_OF_A_CHARACTER:
            return ""
        self._shown, self._waiting = self._waiting, []
        return text

    def _text(self) -> str:
        before = self._tokenizer.decode(self._shown)
        return self._tokenizer.decode([*self._shown, *self._waiting])[len(before) :]

    def rest(self) -> str:
        """The text of the waiting tokens, at the end."""
        text = self._text()
        self._waiting = []
        return text


def missing_tokens(tokenizer: TextTokenizer, edition: str) -> list[str]:
    """The special tokens of an edition's prompts and answers that are no single token for a tokenizer."""
    return [token for token in protocol_of(edition).special_tokens if tokenizer.token_id(token) is None]


def load_tokenizer(folder: str | Path) -> TextTokenizer:
    """The tokenizer of the checkpoint in `folder`. Raises InputError if it has none or it cannot be read."""
    return TextTokenizer(Path(folder) / "tokenizer.json")
