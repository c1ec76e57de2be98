"""The result of a comparison with a server, and its sentences for terminal and page."""

from collections.abc import Sequence
from dataclasses import dataclass

from .agreement import PERCENTILES, ROUNDING, Agreement
from .scores import Scores
from .servers import Identity, Server


@dataclass(frozen=True)
class Asked:
    """A server's answers: per prompt, and the differences between two answers to the same request."""

    server: Server
    identity: Identity
    scores: list[Scores]
    noise: list[float]
    requests: int


@dataclass(frozen=True)
class Judged:
    """The verdict, and against which of dsv4's two computations: the nearer one."""

    result: Agreement
    simulated: bool


@dataclass(frozen=True)
class Comparison:
    """The two sides of a comparison: for the sentences, `--json` and the page."""

    checkpoint: str
    address: str
    names: list[str]
    prompts: list[list[int]]
    command: str
    report: str | None


def verdict(result: Agreement, identity: Identity) -> str:
    """The sentence that the comparison ends in."""
    if result.agrees:
        noise = result.server_floor
        unsteady = f"; it differs from itself by up to {noise.worst:.3g} nats" if noise.worst > ROUNDING else ""
        return (
            f"AGREES: {identity.kind} computes this model; its differences are within the noise measured here{unsteady}"
        )
    cause = f": {result.cause}" if result.cause else ", in no pattern that is known"
    return f"DIFFERS{cause}"


def _off(result: Agreement, names: Sequence[str]) -> str:
    prompt, position = result.first_off or (0, 0)
    return f"{names[prompt]}, position {position}" if result.first_off else "no single position is beyond the limit"


def facts(result: Agreement, names: Sequence[str], simulated: bool) -> list[tuple[str, str]]:
    """The numbers in sum, as (name, value) for the terminal and the page."""
    values = result.as_json()
    if not values["positions_compared"]:
        return [("positions compared", "none: the server lists none of the prompts' tokens")]
    kl = values["mean_kl_lower_bound"]
    percentiles = ", ".join(f"{p} % {values['percentiles'][str(p)]:.3g}" for p in PERCENTILES)
    top1 = values["top1_agreement"]
    return [
        ("positions compared", str(values["positions_compared"])),
        ("mean |difference|", f"{values['mean_difference']:.3g} nats (limit {result.mean_limit:.3g})"),
        ("max |difference|", f"{values['max_difference']:.3g} nats (limit {result.worst_limit:.3g}); {percentiles}"),
        ("top-1 agreement", "not told" if top1 is None else f"{100 * top1:.1f} %"),
        ("KL, lower bound", "not told" if kl is None else f"mean {kl:.3g} nats"),
        ("first position off", _off(result, names)),
        ("server with itself", f"mean {result.server_floor.mean:.3g}, max {result.server_floor.worst:.3g} nats"),
        ("dsv4, simulated or not", f"mean {result.own_floor.mean:.3g}, max {result.own_floor.worst:.3g} nats"),
        ("compared with", "dsv4 with simulated quantizations" if simulated else "dsv4 in float32"),
    ]  # fmt: skip
