"""Servers on loopback in the shape of vLLM, SGLang, llama.cpp and OpenAI's completions, and faults on demand.

    with LogProbabilityServer("vllm", scorer) as server:
        server.address, server.requests

`scorer(tokens)` gives one dict {token id: log-probability} for each position but the last. A fault is a function that
changes an answer before it is sent, one of the names in STATUS, or "slow", "page", "no tokenizer", "broken off".
"""

import json
import math
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

Scorer = Callable[[Sequence[int]], list[dict[int, float]]]
Fault = Callable[[Any], Any]
STATUS = {"busy": 503, "forbidden": 401, "refused": 400, "failed": 500}
LISTED = 20


def likeliest(row: dict[int, float], count: int) -> list[tuple[int, float]]:
    return sorted(row.items(), key=lambda item: -item[1])[:count]


def vllm(tokens: Sequence[int], rows: list[dict[int, float]], body: Any) -> Any:
    entries: list[Any] = [None]
    for token, row in zip(tokens[1:], rows, strict=True):
        kept = dict(likeliest(row, body["prompt_logprobs"])) | {token: row[token]}
        entries.append({str(t): {"logprob": v, "rank": 1, "decoded_token": "x"} for t, v in kept.items()})
    return {"choices": [{"prompt_logprobs": entries, "prompt_token_ids": list(tokens), "token_ids": [0]}]}


def sglang(tokens: Sequence[int], rows: list[dict[int, float]], body: Any) -> Any:
    given = [[None, tokens[0], None], *([row[t], t, None] for t, row in zip(tokens[1:], rows, strict=True))]
    top = [None, *([[v, t, None] for t, v in likeliest(row, body["top_logprobs_num"])] for row in rows)]
    return {"text": "", "meta_info": {"input_token_logprobs": given, "input_top_logprobs": top}}


def llama(tokens: Sequence[int], rows: list[dict[int, float]], body: Any) -> Any:
    found = [{"id": t, "token": "x", "bytes": [], "logprob": v} for t, v in likeliest(rows[-1], body["n_probs"])]
    raised = [{**found[0], "id": token, "logprob": rows[-1][token]} for token, _ in body["logit_bias"]]
    generated = (raised or found)[0]
    if generated["id"] % 2:  # half a character, which the real server leaves out
        return {"content": "\ufffd"}
    return {"completion_probabilities": [{**generated, "top_logprobs": found}]}


def openai(tokens: Sequence[int], rows: list[dict[int, float]], body: Any) -> Any:
    values = [None, *(row[t] for t, row in zip(tokens[1:], rows, strict=True)), -1.0]
    top = [None, *({f"token_id:{t}": v for t, v in likeliest(row, body["logprobs"])} for row in rows), {}]
    names = [*(f"token_id:{t}" for t in tokens), "token_id:0"]
    return {"choices": [{"logprobs": {"tokens": names, "token_logprobs": values, "top_logprobs": top}}]}


MODELS: dict[str, list[dict[str, Any]]] = {"data": [{"id": "the-model"}]}
KINDS: dict[str, tuple[Callable[..., Any], str, str, dict[str, Any]]] = {
    "vllm": (vllm, "/v1/completions", "prompt", {"/version": {"version": "0.33.0"}, "/v1/models": MODELS}),
    "sglang": (sglang, "/generate", "input_ids", {"/model_info": {"model_path": "the-model"}, "/v1/models": MODELS}),
    "llama.cpp": (llama, "/completion", "prompt", {"/props": {"build_info": "b1", "model_path": "m.gguf"}}),
    "openai": (openai, "/v1/completions", "prompt", {"/v1/models": MODELS}),
}


def with_context(kind: str, pages: dict[str, Any], context: int) -> dict[str, Any]:
    if kind == "llama.cpp":
        return {"/props": pages["/props"] | {"default_generation_settings": {"n_ctx": context}}}
    return {"/v1/models": {"data": [MODELS["data"][0] | {"max_model_len": context}]}}


class LogProbabilityServer:
    """One server. `fault` strikes the answers to scoring requests, the first `times` of them.

    context: the tokens that it says it was started for.
    """

    def __init__(
        self, kind: str, scorer: Scorer, fault: Fault | str | None = None, times: int = 10**9,
        context: int | None = None,
    ) -> None:  # fmt: skip
        self.kind, self.scorer, self.fault, self.times = kind, scorer, fault, times
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        self._ended = threading.Event()  # a slow answer comes too late for any client
        self._answer, self._path, self._prompt, pages = KINDS[kind]
        self._pages = pages | (with_context(kind, pages, context) if context else {})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

    def _scored(self, body: Any) -> tuple[int, bytes]:
        tokens = body[self._prompt]
        strikes = self.fault is not None and self.times > 0
        self.times -= strikes
        if strikes and isinstance(self.fault, str) and self.fault in STATUS:
            return STATUS[self.fault], json.dumps({"error": {"message": f"it is {self.fault}"}}).encode()
        if self.fault == "slow":
            self._ended.wait()
        if strikes and self.fault == "page":
            return 200, b"<html><title>Log in</title></html>"
        scored = [*tokens, 0] if self.kind == "llama.cpp" else tokens  # it tells what follows the last token
        answer = self._answer(tokens, self.scorer(scored), body)
        if strikes and callable(self.fault):
            answer = self.fault(answer)
        return 200, json.dumps(answer).replace("NaN", "null").encode()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                known = self.path in outer._pages
                self._send(200 if known else 404, json.dumps(outer._pages.get(self.path, {})).encode())

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path == "/tokenize" and outer.kind == "llama.cpp" and outer.fault != "no tokenizer":
                    self._send(200, b'{"tokens": [2]}')
                    return
                outer.requests.append((self.path, dict(self.headers), body))
                self._send(*(outer._scored(body) if self.path == outer._path else (404, b"{}")))

            def _send(self, status: int, content: bytes) -> None:
                self.send_response(status)
                broken_off = outer.fault == "broken off" and self.command == "POST"
                self.send_header("Content-Length", str(len(content) + broken_off))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()


def made_up(tokens: Sequence[int], vocabulary: int = 50) -> list[dict[int, float]]:
    """Log-probabilities that depend on position and token, and add up to one."""
    rows = []
    for position in range(len(tokens) - 1):
        weights = {token: math.exp(math.sin(7 * token + 3 * position) * 2) for token in range(vocabulary)}
        total = sum(weights.values())
        rows.append({token: math.log(weight / total) for token, weight in weights.items()})
    return rows
