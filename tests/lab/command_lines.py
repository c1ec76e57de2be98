"""Checks that dsv4 accepts the command lines in documents and scripts, without running them."""

import re
import shlex

import typer

from dsv4 import cli


def dsv4_commands(text: str) -> list[list[str]]:
    """The arguments of every `dsv4 …` line of `text`, prompts and comments taken off, continued lines joined."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        line = line.removeprefix("$ ")
        if line.startswith("dsv4 "):
            found.append(shlex.split(line, comments=True)[1:])
        elif line.startswith("torchrun ") and " -m dsv4 " in line:
            words = shlex.split(line, comments=True)
            found.append(words[words.index("dsv4") + 1 :])
    return found


def inline_commands(markdown: str) -> list[list[str]]:
    """Command lines within the text, such as `dsv4 verify A B`; not a command's name alone or with an option only."""
    text = re.sub(r"^```.*?^```$", "", markdown, flags=re.MULTILINE | re.DOTALL).replace(" ENGINE", " vllm")
    found = [shlex.split(line)[1:] for line in re.findall(r"`(dsv4 [^`…]+)`", text)]
    return [words for words in found if len(words) > 1 and not words[1].startswith("-")]


def parse(arguments: list[str]) -> None:
    """Parse a command line as `dsv4` would. Raises what Typer raises for an unknown command, option or value."""
    commands = typer.main.get_command(cli.app).commands
    assert arguments[0] in commands, f"there is no dsv4 {arguments[0]}"
    commands[arguments[0]].make_context(arguments[0], list(arguments[1:]))


def blocks(markdown: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", markdown, flags=re.MULTILINE | re.DOTALL)
