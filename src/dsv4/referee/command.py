"""`dsv4 run CHECKPOINT --compare http://host:port`: a running server's log-probabilities beside dsv4's own.

The server is asked first, so that its errors show before the weights are loaded. Every prompt is sent twice, to measure
the server's own noise; to a server that takes one request per position, only a few prompts are.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4.errors import EXIT_DIFFERENCE, EXIT_DONE, UsageError
from dsv4.machine import peak_memory
from dsv4.output import Output
from dsv4.text import aligned

from .agreement import Agreement, Ours, differences, judge
from .client import Client
from .scores import refuse_constant
from .servers import Identity, Server
from .words import Asked, Comparison, Judged, facts, verdict

if TYPE_CHECKING:
    import torch

    from dsv4.model.transformer import Transformer

REPEATED_REQUESTS = 64  # of a server that takes one for each position
POSITIONS_SHOWN = 20  # without -v


def _repeated(server: Server, prompts: Sequence[Sequence[int]]) -> list[int]:
    """The prompts that are asked for a second time."""
    if not server.per_position:
        return list(range(len(prompts)))
    by_length = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    chosen, requests = by_length[:1], server.requests(prompts[by_length[0]])
    for number in by_length[1:]:
        requests += server.requests(prompts[number])
        if requests > REPEATED_REQUESTS:
            break
        chosen.append(number)
    return chosen


def fits(tokens: Sequence[int], identity: Identity) -> bool:
    """Whether a prompt and one more token are within the server's context, as far as it is known."""
    return identity.context is None or len(tokens) < identity.context


def _check_lengths(prompts: Sequence[Sequence[int]], identity: Identity) -> None:
    for number, tokens in enumerate(prompts):
        if not fits(tokens, identity):
            text = f"prompt {number} has {len(tokens)} tokens, {identity.kind} was started for {identity.context}"
            raise UsageError(text, "The last one is for its answer. Start the server with a longer context.")


def ask(client: Client, found: tuple[Server, Identity], prompts: Sequence[Sequence[int]], out: Output) -> Asked:
    """Score all prompts. Raises UsageError for prompts too short or too long, MachineError for errors of the server."""
    short = next((number for number, tokens in enumerate(prompts) if len(tokens) < 2), None)
    if short is not None:
        raise UsageError(f"prompt {short} has one token: there is nothing to predict", "Give two tokens or more.")
    server, identity = found
    _check_lengths(prompts, identity)
    again = _repeated(server, prompts)
    requests = sum(map(server.requests, prompts)) + sum(server.requests(prompts[number]) for number in again)
    version = f" {identity.version}" if identity.version else ""
    out.say(f"{identity.kind}{version} serves {identity.model}; {requests} request(s), a second one for its noise")
    with out.progress(requests, "asking the server", " requests") as bar:
        scores = [server.score(client, identity, tokens, bar.advance) for tokens in prompts]
        refuse_constant(scores, identity.kind)
        noise: list[float] = []
        for number in again:
            second = server.score(client, identity, prompts[number], bar.advance)
            noise += differences(scores[number].actual, second.actual)
    return Asked(server, identity, scores, noise, requests)


def _rows(logits: "torch.Tensor", tokens: Sequence[int], listed: Sequence[dict[int, float]]) -> Ours:
    """Our numbers at the tokens that the server listed, from logits float32 [n, V]."""
    import torch

    actual, top, best = [], [], []
    for position, ids in enumerate(listed):
        row = torch.log_softmax(logits[position].to(torch.float64), dim=-1)
        actual.append(float(row[tokens[position + 1]]))
        wanted = [token for token in ids if 0 <= token < len(row)]
        top.append(dict(zip(wanted, row[wanted].tolist(), strict=True)))
        best.append(int(row.argmax()))
    return Ours(actual, top, best)


def compute(model: "Transformer", prompts: Sequence[Sequence[int]], asked: Asked, out: Output) -> list[Ours]:
    """dsv4's numbers of all prompts, one prompt after the other."""
    from dsv4.model.evaluate.logits import teacher_forced

    ours, done = [], 0.0
    with out.progress(sum(map(len, prompts)), "computing", " tokens", passing=True) as bar:

        def advance(tokens: float) -> None:
            nonlocal done
            done += tokens
            bar.advance(round(done) - bar.done)

        for tokens, scores in zip(prompts, asked.scores, strict=True):
            logits = teacher_forced(model, tokens, draft=False, on_progress=advance).logits
            ours.append(_rows(logits, tokens, scores.top))
    return ours


def _print(result: Agreement, names: Sequence[str], identity: Identity, simulated: bool, out: Output) -> None:
    out.data(verdict(result, identity))
    for line in aligned([[name, value] for name, value in facts(result, names, simulated)]):
        out.data(line)
    if result.agrees:
        return
    rows = [["prompt", "position", "|difference|", "KL", "top-1"]]
    for name, prompt in zip(names, result.prompts, strict=True):
        for position, value in enumerate(prompt.difference):
            same = "" if position >= len(prompt.top1) else "same" if prompt.top1[position] else "differs"
            rows.append([name, str(position), f"{value:.3g}", f"{prompt.kl[position]:.3g}", same])
    shown = rows if out.verbose else rows[: POSITIONS_SHOWN + 1]
    for line in aligned(shown, right=(1, 2, 3)):
        out.data(line)
    if len(shown) < len(rows):
        out.data(f"and {len(rows) - len(shown)} more positions (-v lists all, --json has the numbers)")


def nearer(simulated: list[Ours], exact: list[Ours], asked: Asked, vocabulary: int) -> Judged:
    """Judge against the release's simulated quantizations and against float32: engines do the one or the other."""
    pairs = zip(simulated, exact, strict=True)
    own_noise = [value for a, b in pairs for value in differences(a.actual, b.actual)]
    judged = [
        Judged(judge(ours, asked.scores, asked.noise, own_noise, vocabulary), is_simulated)
        for ours, is_simulated in ((simulated, True), (exact, False))
    ]

    def distance(one: Judged) -> tuple[bool, float]:
        values = one.result.compared
        return not one.result.agrees, sum(values) / max(len(values), 1)

    return min(judged, key=distance)


def compare_with_server(comparison: Comparison, asked: Asked, model: "Transformer", out: Output) -> int:
    """Compute, judge, print, write the page; the exit code."""
    from dsv4.model.loading import with_simulation

    simulated = compute(with_simulation(model, True), comparison.prompts, asked, out)
    exact = compute(with_simulation(model, False), comparison.prompts, asked, out)
    judged = nearer(simulated, exact, asked, model.config.vocab_size)
    _print(judged.result, comparison.names, asked.identity, judged.simulated, out)
    out.result(_as_json(comparison, asked, judged))
    if comparison.report is not None:
        from .page import write

        write(Path(comparison.report), comparison, asked, judged, verdict(judged.result, asked.identity))
        out.say(f"wrote {comparison.report}")
    return EXIT_DONE if judged.result.agrees else EXIT_DIFFERENCE


def _as_json(comparison: Comparison, asked: Asked, judged: Judged) -> dict[str, Any]:
    return {
        "checkpoint": comparison.checkpoint,
        "server": {"address": comparison.address} | vars(asked.identity),
        "requests": asked.requests,
        "compared_with": "simulated" if judged.simulated else "float32",
        "names": comparison.names,
        "token_ids": comparison.prompts,
        "peak_memory_bytes": peak_memory(),
    } | judged.result.as_json()
