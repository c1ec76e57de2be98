"""Interactive chat: history, commands, streaming, and Ctrl-C that stops the answer and not the program.

Every turn builds the whole prompt again, because the protocol drops old reasoning. When the new prompt starts with
the cached tokens (always in chat mode), only the rest is computed.
"""

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dsv4 import signals
from dsv4.commands.prompting import Asked, Mode, Style, write_prompt
from dsv4.errors import EXIT_DONE, EXIT_INTERRUPTED, Dsv4Error, Interrupted, UsageError
from dsv4.output import Output

from .answers import Generation, TokenProgress, say_statistics
from .prompts import Dialogue, starting_messages
from .reads import say_reads
from .source import Source

if TYPE_CHECKING:
    from dsv4.model.chat.answer import AnswerText
    from dsv4.model.chat.tokenizer import TextTokenizer
    from dsv4.model.generate import Session
    from dsv4.model.transformer import Transformer

HELP = """\
/mode chat|think|think-max   how the model answers
/effort LEVEL                think, with this effort: low, high, max, …
/system TEXT                 set the system message, or remove it when TEXT is empty; starts again
/clear                       forget the conversation
/exit                        leave (so does Ctrl-D)
Ctrl-C stops an answer."""


def _go_on_after(error: Interrupted) -> None:
    """Go on after Ctrl-C. Raise the interruption again if it is SIGTERM, which ends the program."""
    if error.exit_code != EXIT_INTERRUPTED:
        raise error
    signals.token.clear()


class Chat:
    """One conversation."""

    def __init__(
        self,
        model: "Transformer",
        source: Source,
        tokenizer: "TextTokenizer",
        dialogue: Dialogue,
        generation: Generation,
        out: Output,
    ) -> None:
        self.model, self.source, self.tokenizer = model, source, tokenizer
        self.generation, self.out = generation, out
        self.dialogue = dialogue
        self.messages: list[dict[str, Any]] = starting_messages(dialogue)
        self.raw_text = ""
        self.style: Style | None = None  # of the last prompt; raw text has none
        self.session: Session | None = None
        self.turns = 0

    def _prompt(self, line: str) -> list[int]:
        from dsv4.model.chat.messages import Request

        if self.dialogue.raw:
            self.raw_text += line
            return self.tokenizer.encode(self.raw_text)
        request = Request([*self.messages, {"role": "user", "content": line}])
        written = write_prompt(request, self.dialogue.style(request), self.out)
        self.messages, self.style = request.messages, written.style
        return self.tokenizer.encode(written.text)

    def _remember(self, text: str) -> None:
        from dsv4.model.chat.answer import remembered

        if self.style is None:
            self.raw_text += text
        else:
            self.messages.append(remembered(text, self.style.thinking_mode, self.style.edition))

    def _generate(self, prompt: list[int], text: "AnswerText") -> None:
        from dsv4.model.generate import generate

        def on_token(row: int, token: int) -> bool:
            bar.close()
            signals.token.check()
            self.out.data(text.add(token), end="")
            return text.stopped

        self.source.check_prompt(prompt)
        session, self.session = self.session, None  # an interrupted answer leaves a cache that cannot be used
        with TokenProgress(self.out, len(prompt), "prefill") as bar:
            _, statistics, self.session = generate(
                self.model,
                [prompt],
                self.generation.limits,
                self.generation.sampling,
                draft=self.generation.draft,
                first_row=self.turns,
                session=session,
                on_token=on_token,
                on_progress=bar.advance,
            )
        self.out.data(text.rest())
        say_statistics(self.out, statistics, self.generation.draft)
        say_reads(self.model, self.out)

    def answer(self, line: str) -> None:
        """One turn. The part of an interrupted answer stays in the history; any other error undoes the turn."""
        from dsv4.model.chat.answer import AnswerText

        before, before_raw = list(self.messages), self.raw_text
        text = AnswerText(self.tokenizer, self.generation.stop, self.generation.limits.stop_ids)
        try:
            self._generate(self._prompt(line), text)
        except Interrupted as error:
            _go_on_after(error)
            self.out.data(text.rest())
            self.out.say("(stopped)")
        except Dsv4Error as error:
            self.messages, self.raw_text = before, before_raw
            self.out.error(error)
            return
        self._remember(text.text)
        self.turns += 1

    def clear(self) -> None:
        """Forget the conversation."""
        self.messages, self.raw_text, self.session = starting_messages(self.dialogue), "", None

    def _set_effort(self, effort: str) -> None:
        """Think with this effort from now on, if the edition has it."""
        from dsv4.model.chat.messages import Request

        dialogue = replace(self.dialogue, asked=Asked(Mode.think, effort))
        try:
            dialogue.style(Request([]))
        except UsageError as error:
            self.out.error(error)
            return
        self.dialogue = dialogue
        self.out.say(f"mode think, effort {effort}")

    def command(self, line: str) -> bool:
        """A line that starts with a slash; False to leave."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/exit":
            return False
        if name == "/clear":
            self.clear()
            self.out.say("cleared")
        elif name == "/mode" and rest in list(Mode) and not self.dialogue.raw:
            self.dialogue = replace(self.dialogue, asked=Asked(rest))
            self.out.say(f"mode {rest}")
        elif name == "/effort" and rest and not self.dialogue.raw:
            self._set_effort(rest)
        elif name == "/system" and not self.dialogue.raw:
            self.dialogue = replace(self.dialogue, system=rest or None)
            self.clear()
            self.out.say("system message set, conversation cleared" if rest else "no system message")
        else:
            for line in HELP.splitlines():
                self.out.say(line)
        return True


def _read_line(out: Output) -> str | None:
    """One line from the user; None at the end of input."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    try:
        import readline  # noqa: F401  # line editing for input(), where the platform has it
    except ImportError:
        pass
    try:
        return input("> ")
    except EOFError:
        out.say()
        return None


def _turn(chat: Chat) -> bool:
    """Read one line from the user and act on it; False to leave."""
    with signals.raising():
        line = _read_line(chat.out)
    if line is None:
        return False
    if line.startswith("/"):
        return chat.command(line)
    if line.strip():
        chat.answer(line)
    return True


def talk(chat: Chat) -> int:
    """Read lines and answer them until /exit or the end of input; the exit code."""
    if sys.stdin.isatty():
        chat.out.say("Talk to the model. /help lists the commands.")
    going = True
    while going:
        try:
            going = _turn(chat)
        except Interrupted as error:
            _go_on_after(error)
            chat.out.say("(/exit or Ctrl-D leaves)")
    return EXIT_DONE
