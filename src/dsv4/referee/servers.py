"""The servers that can be asked: one row each, with how it is recognised and how it scores a prompt.

Request and answer shapes are those of vLLM 0.33.0, SGLang 0.5.23, llama.cpp's server of 2026-10, and of OpenAI's
completions with `echo`. Token ids are sent, never text, because prompts differ by edition. Where a server tells which
ids it scored, they are compared with those sent.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dsv4.errors import MachineError

from .client import Client
from .scores import UNLISTED, Scores, complete, lacks, member, number

TOP = 20  # likeliest tokens asked for: the most that vLLM gives unless it was started with more
LLAMA_TOP = 1000  # llama.cpp gives any number, and the prompt's own token only if it is among them

Progress = Callable[[int], None]  # called with the number of requests answered


@dataclass(frozen=True)
class Identity:
    """Who answers: the kind of server, its version where it tells, and the model that it serves.

    context: the most tokens of a prompt and its answer together; None where the server does not tell.
    """

    kind: str
    version: str
    model: str
    context: int | None = None


@dataclass(frozen=True)
class Server:
    """A kind of server.

    identify: who it is, None if the address is another kind of server. score: one prompt. per_position: it takes a
    request for every position, because it gives log-probabilities of generated tokens only.
    """

    name: str
    title: str
    identify: Callable[[Client], Identity | None]
    score: Callable[[Client, Identity, Sequence[int], Progress], Scores]
    per_position: bool = False

    def requests(self, tokens: Sequence[int]) -> int:
        """Requests that one prompt takes."""
        return len(tokens) - 1 if self.per_position else 1


def _length(found: Any) -> int | None:
    return found if isinstance(found, int) and found > 0 else None


def _served_model(client: Client) -> tuple[str, int | None] | None:
    """(id, context) of the first model listed."""
    listed = client.find("/v1/models")
    try:
        model = listed["data"][0]
        return str(model["id"]), _length(model.get("max_model_len"))
    except (AttributeError, KeyError, IndexError, TypeError):
        return None


def _find_vllm(client: Client) -> Identity | None:
    version, model = client.find("/version"), _served_model(client)
    if not isinstance(version, dict) or "version" not in version or model is None:
        return None
    return Identity("vLLM", str(version["version"]), *model)


def _token_entries(entries: Any) -> dict[int, float]:
    """`{"17": {"logprob": x, ...}, ...}` -> {17: x}."""
    return {int(token): number(entry["logprob"]) for token, entry in entries.items()}


def _score_vllm(client: Client, identity: Identity, tokens: Sequence[int], progress: Progress) -> Scores:
    title = "vLLM"
    answer = client.post(
        "/v1/completions",
        {
            "model": identity.model, "prompt": list(tokens), "max_tokens": 1, "temperature": 0,
            "prompt_logprobs": TOP, "return_token_ids": True,
        },
    )  # fmt: skip
    progress(1)
    entries = member(answer, title, "choices", 0, "prompt_logprobs")
    if not isinstance(entries, list):
        raise lacks(title, "log-probabilities of the prompt")
    try:
        top = [_token_entries(entry) for entry in complete(entries, len(tokens), title)[1:]]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise lacks(title, "a log-probability by token id at every position of 'prompt_logprobs'") from None
    sent = answer["choices"][0].get("prompt_token_ids")
    other = next((p for p, token in enumerate(tokens[1:]) if token not in top[p]), None)
    if isinstance(sent, list) and sent != list(tokens):
        other = next((p for p, (a, b) in enumerate(zip(sent, tokens, strict=False)) if a != b), 0)
    actual = [each.get(token, float("nan")) for each, token in zip(top, tokens[1:], strict=True)]
    return Scores(actual, top, other)


def _find_sglang(client: Client) -> Identity | None:
    for path in ("/model_info", "/get_model_info"):
        found = client.find(path)
        if isinstance(found, dict) and "model_path" in found:
            server = client.find("/server_info")
            version = server.get("version", "") if isinstance(server, dict) else ""
            _, context = _served_model(client) or ("", None)
            return Identity("SGLang", str(version), str(found["model_path"]), context)
    return None


def _score_sglang(client: Client, identity: Identity, tokens: Sequence[int], progress: Progress) -> Scores:
    title = "SGLang"
    answer = client.post(
        "/generate",
        {
            "input_ids": list(tokens), "sampling_params": {"temperature": 0, "max_new_tokens": 1},
            "return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": TOP,
        },
    )  # fmt: skip
    progress(1)
    answer = answer[0] if isinstance(answer, list) and answer else answer
    entries = complete(member(answer, title, "meta_info", "input_token_logprobs"), len(tokens), title)[1:]
    listed = complete(member(answer, title, "meta_info", "input_top_logprobs"), len(tokens), title)[1:]
    try:
        actual = [number(entry[0]) for entry in entries]
        ids = [int(entry[1]) for entry in entries]
        top = [{int(token): number(value) for value, token, *_ in each or []} for each in listed]
    except (TypeError, ValueError, IndexError):
        raise lacks(title, "a log-probability and a token id at every position of 'input_token_logprobs'") from None
    other = next((p for p, (a, b) in enumerate(zip(ids, tokens[1:], strict=True)) if a != b), None)
    return Scores(actual, top, other)


def _find_llama(client: Client) -> Identity | None:
    found = client.find("/props")
    if not isinstance(found, dict) or not {"default_generation_settings", "build_info"} & set(found):
        return None
    listed, _ = _served_model(client) or ("", None)
    model = found.get("model_path") or found.get("model_alias") or listed
    settings = found.get("default_generation_settings")
    context = _length(settings.get("n_ctx")) if isinstance(settings, dict) else None
    return Identity("llama.cpp", str(found.get("build_info", "")), str(model), context)


def _written_out(client: Client) -> list[list[float]]:
    """A `logit_bias` that makes llama.cpp generate the letter a, whatever it computes.

    It gives no probabilities of a token that is half a character, and fails at some control tokens. The probabilities
    that it gives are those before the bias. [] where a server does not tokenize.
    """
    try:
        token = member(client.post("/tokenize", {"content": "a", "add_special": False}), "llama.cpp", "tokens", 0)
    except MachineError:
        return []
    return [[token, 1e4]]


def _score_llama(client: Client, identity: Identity, tokens: Sequence[int], progress: Progress) -> Scores:
    title, actual, top = "llama.cpp", [], []
    bias = _written_out(client)
    for end in range(1, len(tokens)):
        answer = client.post(
            "/completion",
            {
                "prompt": list(tokens[:end]), "n_predict": 1, "n_probs": LLAMA_TOP, "temperature": -1,
                "cache_prompt": False, "return_tokens": True, "post_sampling_probs": False, "logit_bias": bias,
            },
        )  # fmt: skip
        progress(1)
        first = member(answer, title, "completion_probabilities", 0)
        entries = [*first.get("top_logprobs", []), first]
        try:
            found = {int(entry["id"]): number(entry["logprob"]) for entry in entries}
        except (KeyError, TypeError, ValueError):
            raise lacks(title, "an id and a log-probability in 'completion_probabilities'") from None
        top.append(found)
        actual.append(found.get(tokens[end], UNLISTED))
    return Scores(actual, top)


def _find_openai(client: Client) -> Identity | None:
    model = _served_model(client)
    return None if model is None else Identity("OpenAI-compatible server", "", *model)


def _token_id(name: Any) -> int | None:
    """`token_id:17` -> 17; None for a token given as text."""
    text = str(name)
    return int(text.removeprefix("token_id:")) if text.startswith("token_id:") and text[9:].isdigit() else None


def _score_openai(client: Client, identity: Identity, tokens: Sequence[int], progress: Progress) -> Scores:
    title = "the server"
    body = {"model": identity.model, "prompt": list(tokens), "temperature": 0, "max_tokens": 1, "logprobs": 5}
    answer = client.post("/v1/completions", body | {"echo": True, "return_tokens_as_token_ids": True})
    progress(1)
    found = member(answer, title, "choices", 0, "logprobs")
    values = member(found, title, "token_logprobs")
    if isinstance(values, list) and 1 < len(values) < len(tokens):
        complete(values, len(tokens), title)
    if not isinstance(values, list) or len(values) < len(tokens):
        raise lacks(title, "log-probabilities of the prompt", "It ignores `echo`: it can score generated tokens only.")
    names = [_token_id(name) for name in (found.get("tokens") or [])[: len(tokens)]]
    pairs = enumerate(zip(names[1:], tokens[1:], strict=False))
    other = next((p for p, (name, token) in pairs if name is not None and name != token), None)
    listed = (found.get("top_logprobs") or [])[1 : len(tokens)]
    top: list[dict[int, float]] = []
    for each in listed or [None] * (len(tokens) - 1):
        ids = {_token_id(name): number(value) for name, value in (each or {}).items()}
        top.append({token: value for token, value in ids.items() if token is not None})
    return Scores([number(value) for value in values[1 : len(tokens)]], top, other)


SERVERS = {
    row.name: row
    for row in (
        Server("sglang", "SGLang", _find_sglang, _score_sglang),
        Server("llama.cpp", "llama.cpp", _find_llama, _score_llama, per_position=True),
        Server("vllm", "vLLM", _find_vllm, _score_vllm),
        Server("openai", "OpenAI-compatible", _find_openai, _score_openai),
    )
}
"""By the name that --server takes, in the order in which they are looked for: the last one's signs are the weakest."""


def recognise(client: Client, name: str | None) -> tuple[Server, Identity]:
    """The kind of server at an address and who it is, or the kind that was named. Raises MachineError for none."""
    for row in SERVERS.values() if name is None else (SERVERS[name],):
        identity = row.identify(client)
        if identity is not None:
            return row, identity
    kinds = ", ".join(row.title for row in SERVERS.values())
    wanted = "none of the servers that dsv4 knows" if name is None else f"no {SERVERS[name].title} server"
    raise MachineError(f"{client.address} answers, but is {wanted} ({kinds})", "Name its kind with --server.")
