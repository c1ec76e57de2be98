"""The HTML page of a comparison with a server, in the style of the other pages, with curves by position."""

import math
from pathlib import Path

from dsv4 import output
from dsv4.commands.run.report import agreement, curve
from dsv4.convert.proof.report.page import made_by
from dsv4.convert.proof.report.template import render_page
from dsv4.files import result_file

from .agreement import PromptAgreement
from .words import Asked, Comparison, Judged, facts

PROMPTS_DRAWN = 12  # the longest ones; the table of the page has all


def _charts(name: str, prompt: PromptAgreement) -> list[object]:
    difference = [0.0 if math.isnan(value) else value for value in prompt.difference]
    kl = [0.0 if math.isnan(value) else value for value in prompt.kl]
    charts: list[object] = [
        curve(difference, f"{name}: |difference| of the token's log-probability, by position"),
        curve(kl, f"{name}: KL divergence, lower bound in nats, by position"),
    ]
    return [*charts, agreement(prompt.top1)] if prompt.top1 else charts


def render(comparison: Comparison, asked: Asked, judged: Judged, sentence: str) -> str:
    """The page as text."""
    made, result = made_by(comparison.command), judged.result
    word, _, rest = sentence.partition(":")
    drawn = sorted(range(len(result.prompts)), key=lambda n: -len(result.prompts[n].difference))[:PROMPTS_DRAWN]
    return render_page(
        "server.html.j2",
        Path(__file__).parent,
        good=result.agrees,
        word=word,
        rest=f":{rest}" if rest else "",
        facts=[
            ("Checkpoint", comparison.checkpoint),
            ("Server", f"{asked.identity.kind} {asked.identity.version}, {comparison.address}"),
            ("It serves", asked.identity.model),
            ("Made by", f"dsv4 {made['version']}, {made['date']}"),
            ("Command", made["command"]),
        ],
        rows=facts(result, comparison.names, judged.simulated),
        charts=[
            chart for number in sorted(drawn) for chart in _charts(comparison.names[number], result.prompts[number])
        ],
    )


def write(path: Path, comparison: Comparison, asked: Asked, judged: Judged, sentence: str) -> None:
    """Write the page; on an error an older file stays."""
    with result_file(str(path), output.current().warn_once) as file:
        file.write(render(comparison, asked, judged, sentence).encode())
