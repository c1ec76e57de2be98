"""Every kind of server is recognised, asked with token ids, and told apart from one that answers badly."""

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from log_probability_servers import KINDS, LogProbabilityServer, made_up

from dsv4.commands.run.options import ServerName
from dsv4.errors import MachineError, UsageError
from dsv4.output import Output
from dsv4.referee import client as client_module
from dsv4.referee.client import Client, api_key
from dsv4.referee.command import ask
from dsv4.referee.scores import UNLISTED, likeliest, number
from dsv4.referee.servers import SERVERS, TOP, recognise
from dsv4.referee.words import Asked

TOKENS = [3, 14, 15, 9, 2, 6, 5]
QUIET = Output("silent")


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(client_module.Retry, "get_backoff_time", lambda self: 0.0)
    yield


def asked(server: LogProbabilityServer, tokens: Sequence[int] = TOKENS) -> Asked:
    client = Client(server.address, None)
    return ask(client, recognise(client, None), [tokens], QUIET)


def test_the_command_line_takes_every_row() -> None:
    assert {name.value for name in ServerName} == set(SERVERS) == set(KINDS)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_server_is_recognised_and_its_numbers_are_read(kind: str) -> None:
    with LogProbabilityServer(kind, made_up) as server:
        found = asked(server)
    assert found.server.name == kind and found.noise == [0.0] * (len(TOKENS) - 1)
    rows = made_up(TOKENS)
    (scores,) = found.scores
    assert scores.actual == pytest.approx([row[t] for row, t in zip(rows, TOKENS[1:], strict=True)], abs=0)
    assert all(listed.items() <= row.items() for listed, row in zip(scores.top, rows, strict=True))
    assert list(map(likeliest, scores.top)) == list(map(likeliest, rows))
    assert scores.other_tokens is None and scores.not_a_number is None
    for path, _, body in server.requests:
        assert path == KINDS[kind][1]
        prompt = body[KINDS[kind][2]]
        assert prompt == TOKENS[: len(prompt)] and all(isinstance(token, int) for token in prompt)
    expected = 2 * (len(TOKENS) - 1) if kind == "llama.cpp" else 2
    assert len(server.requests) == found.requests == expected


@pytest.mark.slow
def test_a_long_prompt_is_repeated_in_part_where_each_position_is_a_request() -> None:
    long = [token % 50 for token in range(90)]
    with LogProbabilityServer("llama.cpp", made_up) as server:
        client = Client(server.address, None)
        found = ask(client, recognise(client, None), [long, TOKENS], QUIET)
    assert len(server.requests) == found.requests == 89 + 6 + 6 and len(found.noise) == 6


def test_the_kind_can_be_named() -> None:
    with LogProbabilityServer("vllm", made_up) as server:
        client = Client(server.address + "/v1/", None)
        assert recognise(client, "openai")[0].name == "openai"
        with pytest.raises(MachineError, match="no SGLang server"):
            recognise(client, "sglang")
    with pytest.raises(MachineError, match="cannot be reached"):
        recognise(Client(server.address, None, retries=0), None)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_prompt_that_is_longer_than_the_context_is_not_sent(kind: str) -> None:
    """vLLM and SGLang tell it for each model, llama.cpp among its settings; one token is generated."""
    with LogProbabilityServer(kind, made_up, context=len(TOKENS)) as server:
        with pytest.raises(UsageError, match=r"prompt 0 has 7 tokens, .* was started for 7"):
            asked(server)
        assert not server.requests
        assert asked(server, TOKENS[:-1]).identity.context == 7


@pytest.mark.parametrize("address", ["http://", "http://a?b=1", "http://a#b"])
def test_an_address_names_a_host(address: str) -> None:
    with pytest.raises(UsageError, match="not the address of a server"):
        Client(address, None)


def test_the_key_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in client_module.KEYS:
        monkeypatch.delenv(name, raising=False)
    assert api_key(None) is None
    monkeypatch.setenv("OPENAI_API_KEY", "from-environment")
    assert api_key(None) == "from-environment" and api_key("given") == "given"
    with LogProbabilityServer("vllm", made_up) as server:
        client = Client(server.address, "given")
        ask(client, recognise(client, None), [TOKENS], QUIET)
    assert {headers["Authorization"] for _, headers, _ in server.requests} == {"Bearer given"}


def test_https_is_not_http() -> None:
    with LogProbabilityServer("vllm", made_up) as server:
        with pytest.raises(MachineError, match="no trusted connection") as caught:
            recognise(Client(server.address.replace("http:", "https:"), None, retries=0), None)
    assert "speak https" in caught.value.hint


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_busy_server_is_asked_again(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib3.Retry.sleep", lambda *_: None)
    with LogProbabilityServer(kind, made_up, fault="busy", times=2) as server:
        assert asked(server).scores[0].not_a_number is None
    with LogProbabilityServer(kind, made_up, fault="busy") as server, pytest.raises(MachineError, match=r"503.*busy"):
        asked(server)
    assert len(server.requests) == 1 + client_module.RETRIES


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize(("fault", "words"), [
    ("forbidden", "401"), ("refused", "400: it is refused"), ("page", "not JSON"), (lambda answer: {}, "without"),
    (lambda answer: [], "without"), (lambda answer: {"choices": [{}], "meta_info": {}}, "without"),
])  # fmt: skip
def test_what_is_no_answer_is_said(kind: str, fault: Any, words: str) -> None:
    with LogProbabilityServer(kind, made_up, fault) as server, pytest.raises(MachineError) as caught:
        asked(server)
    assert words in str(caught.value) and caught.value.hint
    if fault == "forbidden":
        assert "--api-key" in caught.value.hint


def cut(answer: Any) -> Any:
    """Fewer positions than tokens."""
    text = json.loads(json.dumps(answer))
    for path in (
        ("choices", 0, "prompt_logprobs"),
        ("meta_info", "input_token_logprobs"),
        ("choices", 0, "logprobs", "token_logprobs"),
    ):
        holder: Any = text
        try:
            for step in path[:-1]:
                holder = holder[step]  # type: ignore[index]
            holder[path[-1]] = holder[path[-1]][:3]
        except (KeyError, TypeError):
            continue
    return text


@pytest.mark.parametrize("kind", ["vllm", "sglang", "openai"])
def test_a_prompt_that_was_cut(kind: str) -> None:
    with LogProbabilityServer(kind, made_up, cut) as server, pytest.raises(MachineError, match="3 of 7"):
        asked(server)


@pytest.mark.parametrize(("kind", "field"), [
    ("vllm", "logprob"), ("sglang", "input_token_logprobs"), ("llama.cpp", "logprob"), ("openai", "token_logprobs"),
])  # fmt: skip
def test_a_field_that_is_missing_is_no_nan(kind: str, field: str) -> None:
    def renamed(answer: Any) -> Any:
        return json.loads(json.dumps(answer).replace(f'"{field}":', '"value":'))

    with LogProbabilityServer(kind, made_up, renamed) as server, pytest.raises(MachineError, match="without"):
        asked(server)


def test_a_slow_server_is_not_asked_again() -> None:
    with LogProbabilityServer("vllm", made_up, "slow") as server:
        recognised = recognise(Client(server.address, None), None)  # its other answers are waited for
        with pytest.raises(MachineError, match=r"did not answer within 0\.2 s") as caught:
            ask(Client(server.address, None, seconds=0.2), recognised, [TOKENS], QUIET)
    assert len(server.requests) == 1 and "--timeout" in caught.value.hint


def test_an_answer_that_breaks_off() -> None:
    with LogProbabilityServer("sglang", made_up, "broken off") as server:
        with pytest.raises(MachineError, match="/generate broke off its answer: IncompleteRead"):
            asked(server)


def test_tokens_that_were_not_sent() -> None:
    def other(answer: Any) -> Any:
        answer["meta_info"]["input_token_logprobs"][4][1] = 49
        return answer

    with LogProbabilityServer("sglang", made_up, other) as server:
        assert asked(server).scores[0].other_tokens == 3

    def with_bos(answer: Any) -> Any:
        answer["choices"][0]["prompt_token_ids"] = [0, *TOKENS[:-1]]
        return answer

    with LogProbabilityServer("vllm", made_up, with_bos) as server:
        assert asked(server).scores[0].other_tokens == 0


@pytest.mark.parametrize("value", [None, -9999, -9999.0, math.nan, math.inf, "x", True, [1]])
def test_what_is_no_logarithm_is_not_a_number(value: Any) -> None:
    assert math.isnan(number(value)) and number(-1) == -1.0 and math.isnan(number(UNLISTED))


@pytest.mark.parametrize("value", [0.0, -9999.0, math.nan])
def test_an_interface_without_log_probabilities(value: float) -> None:
    def constant(tokens: Sequence[int]) -> list[dict[int, float]]:
        return [dict.fromkeys(row, value) for row in made_up(tokens)]

    with LogProbabilityServer("openai", constant) as server, pytest.raises(MachineError, match="for every token"):
        asked(server)


def test_a_nan_at_one_position() -> None:
    def broken(tokens: Sequence[int]) -> list[dict[int, float]]:
        return [dict.fromkeys(row, math.nan) if n == 4 else row for n, row in enumerate(made_up(tokens))]

    with LogProbabilityServer("vllm", broken) as server:
        assert asked(server).scores[0].not_a_number == 4


def test_llama_cpp_gives_nothing_for_half_a_character() -> None:
    """The real server leaves out the probabilities of a generated token that is no whole character."""
    halves = [p for p, row in enumerate(made_up([*TOKENS])) if max(row, key=lambda token: row[token]) % 2]
    assert halves  # so that the test can fail
    with LogProbabilityServer("llama.cpp", made_up) as server:
        assert len(asked(server).scores[0].actual) == len(TOKENS) - 1
    with LogProbabilityServer("llama.cpp", made_up, "no tokenizer") as server:
        with pytest.raises(MachineError, match="without 'completion_probabilities'"):
            asked(server)


def test_a_token_that_is_not_listed() -> None:
    wide = lambda tokens: made_up(tokens, 5000)  # noqa: E731
    with LogProbabilityServer("llama.cpp", wide) as server:
        scores = asked(server).scores[0]
    rows = made_up(TOKENS, 5000)
    for value, row, token in zip(scores.actual, rows, TOKENS[1:], strict=True):
        listed = sum(other > row[token] for other in row.values()) < 1000 or token == 2  # the one that is written out
        assert value == (row[token] if listed else UNLISTED)
    assert UNLISTED in scores.actual and TOP == 20


def test_one_token_predicts_nothing() -> None:
    with LogProbabilityServer("vllm", made_up) as server, pytest.raises(UsageError, match="one token"):
        asked(server, [5])
    assert not server.requests
