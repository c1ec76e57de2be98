"""The command line of `dsv4 run`: every option with its help, and which of them exclude each other."""

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer

from dsv4.commands.prompting import Asked, EditionOption, EffortOption, Mode, ModeOption
from dsv4.errors import UsageError
from dsv4.options import CacheDir, Json, MaxMemory, Revision, Token, Verbose, as_text, named

HOST_AND_PORT = re.compile(r"(?!(?:hf|ms):)[\w.-]+:\d+(/.*)?")


class ServerName(StrEnum):
    """The servers that can be asked for log-probabilities; `referee/servers.py` has a row for each."""

    vllm = "vllm"
    sglang = "sglang"
    llama_cpp = "llama.cpp"
    openai = "openai"


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What one `dsv4 run` was asked to do. Raises UsageError for options that contradict each other."""

    checkpoint: Annotated[
        str,
        typer.Argument(
            parser=named, metavar="CHECKPOINT", help="Folder of a checkpoint in any format, hf:org/name or ms:org/name."
        ),
    ]
    text: Annotated[
        str | None, typer.Argument(parser=as_text, metavar="PROMPT", help="A question. Omit it to start a chat.")
    ] = None
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", parser=as_text, metavar="TEXT", help="The same as PROMPT.")
    ] = None
    file: Annotated[
        str | None, typer.Option("--file", metavar="FILE", help="One prompt per line, or a JSON list of message lists.")
    ] = None
    messages: Annotated[
        str | None,
        typer.Option(
            "--messages", metavar="FILE", help="OpenAI-style messages, or a request with tools; - reads stdin."
        ),
    ] = None
    tokens: Annotated[
        str | None, typer.Option("--tokens", metavar="IDS", help="Token ids, 0,17,4 or a file; needs no tokenizer.")
    ] = None
    mode: ModeOption = None
    effort: EffortOption = None
    edition: EditionOption = None
    system: Annotated[
        str | None, typer.Option("--system", parser=as_text, metavar="TEXT", help="The system message.")
    ] = None
    tools: Annotated[
        str | None, typer.Option("--tools", metavar="FILE", help="JSON list of tools that the model may call.")
    ] = None
    raw: Annotated[bool, typer.Option("--raw", help="Send the text as it is, without the chat encoding.")] = False
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="N", min=1, help="Longest answer, in tokens.")
    ] = 1024
    temperature: Annotated[
        float, typer.Option("--temperature", metavar="X", min=0, help="0 takes the likeliest token.")
    ] = 1.0
    top_p: Annotated[
        float,
        typer.Option(
            "--top-p", metavar="X", min=0, max=1, help="Sample from the likeliest tokens that reach this probability."
        ),
    ] = 1.0
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", min=0, help="Random seed: the same seed, the same answer.")
    ] = None
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="End the answer at this text; may be repeated.")
    ] = None
    draft: Annotated[
        bool, typer.Option("--draft", "--mtp", help="Draft tokens with the checkpoint's own stages; same answer.")
    ] = False
    logits: Annotated[
        str | None, typer.Option("--logits", metavar="FILE", help="Write the logits of every position (safetensors).")
    ] = None
    prefill: Annotated[
        int | None, typer.Option("--prefill", metavar="K", min=1, help="Compute K tokens at once, the rest one by one.")
    ] = None
    compare: Annotated[
        str | None,
        typer.Option(
            "--compare",
            parser=named,
            metavar="OTHER",
            help="Compare with OTHER on the same tokens: a checkpoint, a file that --logits wrote, or the address of a "
            "running server (vLLM, SGLang, llama.cpp, or OpenAI-compatible with prompt log-probabilities).",
        ),
    ] = None
    server: Annotated[
        ServerName | None,
        typer.Option("--server", help="Kind of the server at --compare's address. Default: detected by its endpoints."),
    ] = None
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", metavar="KEY", help="The server's key, if not in OPENAI_API_KEY or the like."),
    ] = None
    timeout: Annotated[
        float | None,
        typer.Option("--timeout", metavar="SECONDS", min=1, help="Longest time for a server's answer. Default: 600."),
    ] = None
    suite: Annotated[bool, typer.Option("--suite", help="Ask the server the few dozen test prompts of dsv4.")] = False
    tolerance: Annotated[
        float,
        typer.Option("--tolerance", metavar="X", min=0, help="Largest difference of a logit that counts as the same."),
    ] = 0.0
    report: Annotated[
        str | None, typer.Option("--report", metavar="FILE", help="Write the comparison as an HTML page.")
    ] = None
    trace: Annotated[
        str | None, typer.Option("--trace", metavar="FILE", help="Write every module's statistics (JSON lines).")
    ] = None
    no_simulation: Annotated[
        bool, typer.Option("--no-simulation", help="Compute in float32, without the simulated quantizations.")
    ] = False
    released_index_keys: Annotated[
        bool,
        typer.Option("--released-index-keys", help="V4.1: at single steps, choose keys as the released code does."),
    ] = False
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say how many bytes would be read and fetched, and stop.")
    ] = False
    revision: Revision = None
    cache_dir: CacheDir = None
    token: Token = None
    max_memory: MaxMemory = None
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="cpu, cuda, mps or any other torch device.")
    ] = "cpu"
    json: Json = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the answer and errors only.")] = False
    verbose: Verbose = False

    def __post_init__(self) -> None:
        self._check_prompt()
        self._check_address()
        for wrong, text in (
            (self.logits and self.compare, "--logits and --compare cannot be used together"),
            (self.prefill and not self.teacher_forced, "--prefill belongs to --logits and --compare"),
            (self.report and not self.compare, "--report belongs to --compare"),
            (self.server and not self.asks_a_server, "--server belongs to --compare with the address of a server"),
            (self.api_key and not self.asks_a_server, "--api-key belongs to --compare with the address of a server"),
            (self.timeout and not self.asks_a_server, "--timeout belongs to --compare with the address of a server"),
            (self.suite and not self.asks_a_server, "--suite belongs to --compare with the address of a server"),
            (self.asks_a_server and self.prefill, "--prefill does not change what a server is asked: leave it out"),
            (self.asks_a_server and self.tolerance, "--tolerance is not for servers: their noise is measured"),
            (self.trace and self.compare, "--compare traces both by itself, leave out --trace"),
            (self.draft and self.teacher_forced, "--logits and --compare run the draft stages anyway"),
            (self.logits and self.is_chat, "--logits needs a prompt: a text, --messages or --tokens"),
            (
                self.compare and self.is_chat and not self.has_own_prompt,
                "--compare needs a prompt: a text, --messages or --tokens",
            ),
            (self.trace and self.is_chat, "--trace needs a prompt: a text, --messages or --tokens"),
        ):
            if wrong:
                raise UsageError(text)
        if self.json and self.is_chat and not self.has_own_prompt and not self.dry_run:
            raise UsageError("--json needs a prompt", "A chat has no single result: add -p, --file or --tokens.")

    def _check_prompt(self) -> None:
        """Raise UsageError for two prompts, and for options that do not go with the prompt's form."""
        if self.text is not None and self.prompt is not None:
            raise UsageError("the prompt is given twice", "Use either PROMPT or -p.")
        forms = {"a prompt": self.question, "--file": self.file, "--messages": self.messages, "--tokens": self.tokens}
        given = [name for name, value in forms.items() if value is not None] + ["--suite"] * self.suite
        if len(given) > 1:
            raise UsageError(
                f"the prompt is given {len(given)} times: as {' and as '.join(given)}",
                "Use one of a prompt, --file, --messages, --tokens and --suite.",
            )
        asked = self.asked not in (Asked(), Asked(Mode.chat))
        encoded = asked or self.system is not None or self.tools is not None
        left_out = "--mode, --effort, --edition, --system, --tools"
        if self.raw and encoded:
            raise UsageError("--raw sends the text as it is", f"Leave out {left_out}.")
        if self.tokens is not None and (encoded or self.raw or self.stop):
            raise UsageError("--tokens needs no encoding", f"Leave out {left_out}, --raw and --stop.")

    def _check_address(self) -> None:
        """Raise UsageError for an address of a server without http://."""
        if self.compare is not None and HOST_AND_PORT.fullmatch(self.compare) and not Path(self.compare).exists():
            raise UsageError(f"'{self.compare}' is no checkpoint", f"The address of a server is http://{self.compare}.")

    @property
    def asked(self) -> Asked:
        """What decides how messages are encoded."""
        return Asked(self.mode, self.effort, self.edition)

    @property
    def question(self) -> str | None:
        """The prompt as a text: PROMPT or --prompt."""
        return self.text if self.prompt is None else self.prompt

    @property
    def is_chat(self) -> bool:
        """Whether no prompt is given, so that the user types them."""
        return all(given is None for given in (self.question, self.file, self.messages, self.tokens))

    @property
    def asks_a_server(self) -> bool:
        """Whether --compare names the address of a server."""
        return self.compare is not None and urlsplit(self.compare).scheme.lower() in ("http", "https")

    @property
    def compares_with_a_file(self) -> bool:
        """Whether --compare names a file of logits, which has its own tokens."""
        return self.compare is not None and not self.asks_a_server and Path(self.compare).is_file()

    @property
    def compares_checkpoints(self) -> bool:
        """Whether --compare names another checkpoint."""
        return self.compare is not None and not (self.asks_a_server or self.compares_with_a_file)

    @property
    def has_own_prompt(self) -> bool:
        """Whether there is something to compute although no prompt is given."""
        return self.suite or self.compares_with_a_file

    @property
    def teacher_forced(self) -> bool:
        """Whether logits of given tokens are computed instead of answers."""
        return self.logits is not None or self.compare is not None
