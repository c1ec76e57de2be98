"""`dsv4 run --compare` with a running server and with a file of logits, as a user types it.

The honest server computes with the engine itself, so it must agree; others have damaged weights or another prompt.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from log_probability_servers import KINDS, LogProbabilityServer, Scorer
from tiny import TINY

from dsv4 import cli
from dsv4.convert.synthetic.checkpoint import make_checkpoint
from dsv4.model import load
from dsv4.model.evaluate.logits import teacher_forced
from dsv4.model.transformer import Transformer

TOKENS = "3,14,15,92,65,35,89,79,32,38"
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("server") / "small", geometry=TINY)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("server") / "other", geometry=TINY, seed=1)


def scorer_of(model: Transformer) -> Scorer:
    def score(tokens: Sequence[int]) -> list[dict[int, float]]:
        logits = teacher_forced(model, tokens, draft=False).logits[:-1]
        return [dict(enumerate(row.tolist())) for row in torch.log_softmax(logits.double(), -1)]

    return score


@pytest.fixture(scope="module")
def honest(folder: Path) -> Scorer:
    return scorer_of(load(folder))


def run(capfd: Capture, *arguments: object, code: int) -> tuple[str, str]:
    found = cli.run(["run", *map(str, arguments)])
    captured = capfd.readouterr()
    assert found == code, captured.err
    return captured.out, captured.err


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.fast_cases(1)
def test_an_honest_server_agrees(kind: str, folder: Path, honest: Scorer, capfd: Capture) -> None:
    with LogProbabilityServer(kind, honest) as server:
        out, err = run(capfd, folder, "--tokens", TOKENS, "--compare", server.address, code=0)
    assert out.startswith("AGREES") and "positions compared" in out and "request(s)" in err


@pytest.mark.parametrize(("nats", "code", "words"), [
    (0.02, 0, "it differs from itself by up to 0.0"),
    (4.0, 1, "DIFFERS: the server contradicts itself"),
])  # fmt: skip
def test_a_noisy_server(nats: float, code: int, words: str, folder: Path, honest: Scorer, capfd: Capture) -> None:
    """Every request gets other noise; a little is named, and of much nothing can be concluded."""
    random = np.random.default_rng(1)

    def noisy(tokens: Sequence[int]) -> list[dict[int, float]]:
        return [{token: value + random.uniform(-nats, nats) for token, value in row.items()} for row in honest(tokens)]

    with LogProbabilityServer("sglang", noisy) as server:
        out, _ = run(capfd, folder, "--tokens", TOKENS, "--compare", server.address, code=code)
    assert words in out


def test_json_names_both_sides_and_every_position(folder: Path, honest: Scorer, capfd: Capture) -> None:
    with LogProbabilityServer("vllm", honest) as server:
        out, _ = run(capfd, folder, "--tokens", TOKENS, "--compare", server.address, "--json", code=0)
    found: dict[str, Any] = json.loads(out)
    assert found["agrees"] and found["cause"] is None and found["compared_with"] == "simulated"
    expected = {"address": server.address, "kind": "vLLM", "version": "0.33.0", "model": "the-model"}
    assert found["server"] == expected | {"context": None} and found["requests"] == 2
    assert found["max_difference"] == 0.0 and found["top1_agreement"] == 1.0
    assert found["positions_compared"] == len(found["prompts"][0]["difference"]) == 9
    assert found["floors"]["server"] == {"mean": 0.0, "worst": 0.0} and found["floors"]["dsv4"]["mean"] > 0


def test_a_server_that_does_not_quantize_activations_is_compared_with_float32(folder: Path, capfd: Capture) -> None:
    exact = scorer_of(load(folder, simulation=False))
    with LogProbabilityServer("llama.cpp", exact) as server:
        out, _ = run(capfd, folder, "--tokens", TOKENS, "--compare", server.address, "--json", code=0)
    assert json.loads(out)["compared_with"] == "float32"


def test_another_model_differs_and_the_page_says_so(folder: Path, other: Path, tmp_path: Path, capfd: Capture) -> None:
    page = tmp_path / "page.html"
    with LogProbabilityServer("sglang", scorer_of(load(other))) as server:
        arguments = (folder, "--tokens", TOKENS, "--compare", server.address, "--report", page, "--api-key", "secret")
        out, err = run(capfd, *arguments, code=1)
    text = page.read_text()
    assert out.startswith("DIFFERS") and f"wrote {page}" in err and "differs" in out
    assert "DIFFERS" in text and '"verdict bad"' in text and "SGLang" in text and "|difference|" in text
    assert "secret" not in text and "<script" not in text


def test_a_shifted_prompt_is_named(folder: Path, honest: Scorer, capfd: Capture) -> None:
    """The server answers with the numbers of the next position."""

    def shifted(tokens: Sequence[int]) -> list[dict[int, float]]:
        rows, following = honest(tokens), [*tokens[2:], 0]
        return [
            row | {token: row[after]}
            for row, token, after in zip(rows[1:] + rows[:1], tokens[1:], following, strict=True)
        ]

    with LogProbabilityServer("vllm", shifted) as server:
        out, _ = run(capfd, folder, "--tokens", TOKENS, "--compare", server.address, "--json", code=1)
    assert "1 position(s) earlier: the prompt is shifted" in json.loads(out)["cause"]


@pytest.mark.slow
def test_the_suite(folder: Path, honest: Scorer, capfd: Capture) -> None:
    with LogProbabilityServer("vllm", honest) as server:
        out, _ = run(capfd, folder, "--suite", "--compare", server.address, "--json", code=0)
    found = json.loads(out)
    assert {"Chinese", "system", "128 tokens", "ids"} <= set(found["names"]) and len(found["names"]) > 15
    assert all(2 <= len(tokens) <= 200 for tokens in found["token_ids"])


def test_the_suite_leaves_out_what_the_server_was_not_started_for(folder: Path, honest: Scorer, capfd: Capture) -> None:
    with LogProbabilityServer("vllm", honest, context=5) as server:
        out, err = run(capfd, folder, "--suite", "--compare", server.address, "--json", code=0)
    assert json.loads(out)["names"] == ["2 tokens", "3 tokens"]
    assert "of the suite are left out: vLLM was started for 5 tokens" in err


def test_many_prompts_from_a_file(folder: Path, honest: Scorer, tmp_path: Path, capfd: Capture) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hello\nwhy?\n")
    with LogProbabilityServer("vllm", honest) as server:
        out, _ = run(capfd, folder, "--file", prompts, "--compare", server.address, "--json", code=0)
    assert json.loads(out)["names"] == ["prompt 0", "prompt 1"]


@pytest.mark.parametrize(("arguments", "words"), [
    (("--server", "vllm"), "--server belongs to --compare"),
    (("--api-key", "k"), "--api-key belongs to --compare"),
    (("--timeout", "5"), "--timeout belongs to --compare"),
    (("--compare", "http://h", "--prefill", "1"), "--prefill"),
    (("--compare", "http://h", "--tolerance", "1"), "--tolerance"),
    (("--compare", "http://h", "--suite"), "as --tokens and as --suite"),
])  # fmt: skip
def test_options_that_do_not_go_together(arguments: tuple[str, ...], words: str, folder: Path, capfd: Capture) -> None:
    _, err = run(capfd, folder, "--tokens", "1,2", *arguments, code=2)
    assert words in err


@pytest.mark.parametrize("arguments", [("--suite",), ("--suite", "--compare", "folder")])
def test_the_suite_is_for_servers(arguments: tuple[str, ...], folder: Path, capfd: Capture) -> None:
    assert "--suite belongs to --compare" in run(capfd, folder, *arguments, code=2)[1]


def test_a_server_that_is_not_there(folder: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib3.Retry.sleep", lambda *_: None)
    with LogProbabilityServer("vllm", lambda tokens: []) as server:
        pass
    _, err = run(capfd, folder, "--tokens", "1,2", "--compare", server.address, "--server", "vllm", code=4)
    assert "cannot be reached" in err and "Is the server running" in err


@pytest.mark.slow
def test_logits_of_another_run(folder: Path, other: Path, tmp_path: Path, capfd: Capture) -> None:
    golden = tmp_path / "golden.safetensors"
    run(capfd, folder, "--tokens", TOKENS, "--logits", golden, code=0)
    out, _ = run(capfd, folder, "--compare", golden, "--prefill", "4", code=0)
    assert out.startswith("BIT-EQUAL")
    out, _ = run(capfd, other, "--compare", golden, "--json", code=1)
    assert json.loads(out)["checkpoints"] == [str(golden), str(other)]
    _, err = run(capfd, folder, "--tokens", "1,2", "--compare", golden, code=3)
    assert "other tokens" in err


@pytest.mark.parametrize("content", [b"", b"x" * 100, None])
def test_a_file_that_holds_no_logits(content: bytes | None, folder: Path, tmp_path: Path, capfd: Capture) -> None:
    path = next(folder.glob("*.safetensors")) if content is None else tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    _, err = run(capfd, folder, "--compare", path, code=3)
    assert str(path) in err and "--logits" in err
