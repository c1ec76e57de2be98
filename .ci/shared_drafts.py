"""Checks drafts on checkpoints with DSpark stages that others made, where they lie beside the project.

    python .ci/shared_drafts.py FOLDER

logits.exact.npz       main hidden states, drafts and confidences of whole runs, judged by the program beside them
logits.simulated.npz   drafts with simulation, from the recorded hidden states
agreeable.json         how many tokens of which draft are accepted, and the main passes of an answer

The recorded simulated drafts come from a CPU. There torch's rsqrt for bfloat16 also rounds the square root, for those
elements of a call that fill no vector of 32. dsv4 rounds once, as a GPU does; this check computes the norm of the query
heads as the recording did, draft by draft.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsv4.model import load, loading
from dsv4.model.drafting.dspark import Drafts
from dsv4.model.evaluate.logits import teacher_forced
from dsv4.model.generate import Limits, generate
from dsv4.model.kernels.deterministic import tree_sum
from dsv4.model.kernels.table import select_kernels
from dsv4.model.sampling import Sampling
from dsv4.model.transformer import Transformer

CHECKPOINTS = ("tiny-dspark", "tiny-v41")
SAME = 1e-5  # relative difference of logits from equal vectors: float32 sums in another order
SMALLEST_SHARE = 0.5  # of simulated drafts that are the same; the others were rounded another way somewhere
GREEDY = Sampling(temperature=0)


def recorded_head_norm(q: torch.Tensor, eps: float) -> torch.Tensor:
    """`head_norm` of one draft after the other, with torch's rsqrt."""
    mean = (tree_sum((q * q).to(torch.float32)) / q.shape[-1]).to(q.dtype)
    return q * torch.cat([torch.rsqrt(part.contiguous() + eps) for part in mean.split(5)]).unsqueeze(-1)


def relative(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Relative L2 difference of each row of logits, centred."""
    one, other = (x.astype(float) - x.astype(float).mean(-1, keepdims=True) for x in (found, wanted))
    difference: np.ndarray = np.linalg.norm(one - other, axis=-1) / np.linalg.norm(other, axis=-1)
    return difference


@torch.inference_mode()
def drafts_from(model: Transformer, hidden: torch.Tensor, anchors: list[int]) -> Drafts:
    assert model.dspark is not None
    parts = model.dspark.draft_everywhere(model.dspark.new_context(), hidden, anchors, lambda end: None)
    return Drafts(*(torch.cat(each) for each in zip(*(drafts for _, drafts in parts), strict=True)))


def check_simulated(checkpoint: Path) -> None:
    golden = np.load(checkpoint / "expected" / "logits.simulated.npz")
    recorded = replace(select_kernels(torch.device("cpu")), head_norm=recorded_head_norm)
    loading.select_kernels = lambda device: recorded  # type: ignore[assignment]
    model = load(checkpoint)
    loading.select_kernels = select_kernels
    for case in (name.removesuffix(".main_hidden") for name in golden.files if name.endswith(".main_hidden")):
        hidden = torch.from_numpy(golden[f"{case}.main_hidden"]).to(torch.bfloat16)
        first, wanted = int(case[1:]) - 1, golden[f"{case}.draft_logits"]
        anchors = golden[f"{case}.tokens"][1 : len(hidden) + 1].tolist()
        found = drafts_from(model, hidden[: len(anchors)], anchors).logits[first:].numpy()
        count = min(len(found), len(wanted))
        difference = relative(found[:count, 0], wanted[:count, 0])
        same = (difference < SAME).mean()
        print(f"{checkpoint.name} {case}: {same:.0%} of {count} simulated drafts are the recorded ones", flush=True)
        assert same >= SMALLEST_SHARE, difference


def check_exact(shared: Path, checkpoint: Path) -> None:
    judge = [sys.executable, str(shared / "check_v41.py"), str(checkpoint)]
    subprocess.run([*judge, str(checkpoint / "expected" / "logits.exact.npz"), "--splits"], check=True)


def accepted(tokens: list[int], after: list[int]) -> int:
    """How many tokens of a draft are those of the text."""
    return next((i for i, (one, other) in enumerate(zip(tokens, after, strict=False)) if one != other), len(tokens))


def check_counts(model: Transformer, case: dict[str, Any]) -> None:
    """Drafts of a text that goes on with the recorded continuation, and the passes of an answer."""
    prompt, greedy, first = case["prompt"], case["greedy"], case["first_draft_after"]
    text = [*prompt, *greedy]
    drafts = teacher_forced(model, text).drafts
    assert drafts is not None
    complete = len(text) - first - drafts.tokens.shape[1]  # later drafts reach beyond the recorded text
    counts = [accepted(drafts.tokens[first - 1 + i].tolist(), text[first + 1 + i :]) for i in range(complete)]
    assert counts == case["accepted"][:complete]
    undrafted = first - len(prompt)  # nothing is drafted after the first token of a text; that pass is not counted
    [answer], statistics, _ = generate(model, [prompt], Limits(61), GREEDY, draft=True)
    assert answer.tokens == greedy[:61]
    assert statistics.steps - undrafted == case["passes_for_60_tokens"], statistics


def check_equality(model: Transformer, prompts: list[list[int]]) -> None:
    """Drafted answers are the plain ones."""
    for sampling in (GREEDY, Sampling(0.7, 0.9, 1), Sampling(1.0, 1.0, 2)):
        plain, drafted = (generate(model, prompts, Limits(40), sampling, draft=draft) for draft in (False, True))
        assert [answer.tokens for answer in plain[0]] == [answer.tokens for answer in drafted[0]]
        assert drafted[1].accepted > 0


def check_agreeable(shared: Path, name: str) -> None:
    cases = json.loads((shared / "agreeable.json").read_text())[name]
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / name
        subprocess.run([sys.executable, str(shared / "agreeable.py"), str(shared / name), str(folder)], check=True)
        exact = load(folder, simulation=False)
        for case in cases:
            check_counts(exact, case)
        for model in (exact, load(folder)):
            check_equality(model, [case["prompt"] for case in cases])
    print(f"{name}: accepted tokens and passes as recorded; drafted answers are the plain ones", flush=True)


def main() -> None:
    shared = Path(sys.argv[1])
    for name in CHECKPOINTS:
        check_simulated(shared / name)
        check_agreeable(shared, name)
        check_exact(shared, shared / name)


if __name__ == "__main__":
    main()
