"""Decodes an answer token by token, stops at stop strings, and parses the finished answer into a message."""

from collections.abc import Sequence
from typing import Any

from dsv4.errors import InputError

from .completion import parse_completion
from .protocol import END_THINK, EOS
from .tokenizer import TextTokenizer


class AnswerText:
    """The text of one answer as it grows. Text that might be the start of a stop string is held back."""

    def __init__(self, tokenizer: TextTokenizer, stop: Sequence[str], stop_ids: frozenset[int]) -> None:
        self._stream, self._stop, self._stop_ids = tokenizer.stream(), [s for s in stop if s], stop_ids
        self.text = ""  # everything so far, up to a stop string
        self._shown = 0
        self.stopped = False

    def _held_back(self) -> int:
        """How many characters at the end begin a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        tails = range(min(longest, len(self.text)), 0, -1)
        return next((n for n in tails if any(s.startswith(self.text[-n:]) for s in self._stop)), 0)

    def add(self, token: int) -> str:
        """Add one token. Returns the text that is certain by now; sets `stopped` at a stop string."""
        if token in self._stop_ids or self.stopped:
            return self.rest()
        self.text += self._stream.step(token)
        found = [at for s in self._stop if (at := self.text.find(s)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
            return self.rest()
        return self._show(len(self.text) - self._held_back())

    def rest(self) -> str:
        """The text held back so far, at the end of the answer."""
        if not self.stopped:
            self.text += self._stream.rest()
        return self._show(len(self.text))

    def _show(self, end: int) -> str:
        shown, self._shown = self.text[self._shown : max(end, self._shown)], max(end, self._shown)
        return shown


def parse_answer(text: str, thinking_mode: str, edition: str) -> tuple[dict[str, Any] | None, str | None]:
    """The answer's text, without its EOS, as an assistant message; or None and the reason."""
    try:
        return parse_completion(text + EOS, thinking_mode, edition=edition), None
    except InputError as error:
        return None, error.message


def remembered(text: str, thinking_mode: str, edition: str) -> dict[str, Any]:
    """The answer as a message for the history, also when it was cut off or breaks the protocol."""
    message, _ = parse_answer(text, thinking_mode, edition)
    if message is not None:
        return message
    reasoning, found, content = text.partition(END_THINK) if thinking_mode == "thinking" else ("", END_THINK, text)
    return {"role": "assistant", "content": content if found else "", "reasoning_content": reasoning}
