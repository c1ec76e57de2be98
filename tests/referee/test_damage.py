"""Each damage to a server's model or prompt shows in its numbers, and the verdict names it.

The model is small, but its tokens are far from chance, its attention depends on positions, and its prompt is a text of
its own. Its routed experts count little, so that the simulated quantizations do not hide the rest.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from log_probability_servers import LogProbabilityServer, Scorer
from safetensors.torch import load_file, save_file
from tiny import TINY

from dsv4 import cli
from dsv4.convert.synthetic.checkpoint import make_checkpoint
from dsv4.model import load
from dsv4.model.evaluate.logits import teacher_forced
from dsv4.model.generate import Limits, generate
from dsv4.model.sampling import Sampling
from dsv4.model.transformer import Transformer

LENGTH = 160
Tensors = dict[str, torch.Tensor]
Change = Callable[[str, torch.Tensor], torch.Tensor]


class Model(NamedTuple):
    """A checkpoint and a prompt that it wrote."""

    folder: Path
    prompt: list[int]


def with_exponent(scale: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    return change(scale.view(torch.uint8)).view(scale.dtype)


def changed(source: Path, folder: Path, change: Change) -> Path:
    shutil.copytree(source, folder)
    for shard in folder.glob("*.safetensors"):
        save_file({name: change(name, tensor).contiguous() for name, tensor in load_file(shard).items()}, shard)
    return folder


def expressive(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if name == "head.weight":
        return tensor * 2
    if name.endswith(".attn.compressor.norm.weight"):
        return tensor * 3
    return with_exponent(tensor, lambda bits: bits - 5) if name.endswith(".w2.scale") else tensor


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    place = tmp_path_factory.mktemp("damage")
    folder = changed(make_checkpoint(place / "made", geometry=TINY), place / "model", expressive)
    (answer,), _, _ = generate(load(folder), [[3, 14, 15]], Limits(LENGTH - 3), Sampling(seed=1))
    return Model(folder, [3, 14, 15, *answer.tokens])


def rows_of(transformer: Transformer, tokens: Sequence[int]) -> list[dict[int, float]]:
    logits = teacher_forced(transformer, tokens, draft=False).logits[:-1]
    return [dict(enumerate(row.tolist())) for row in torch.log_softmax(logits.double(), -1)]


def honest(model: Model, place: Path) -> Scorer:
    transformer = load(model.folder)
    return lambda tokens: rows_of(transformer, tokens)


def scales_are_their_bytes(model: Model, place: Path) -> Scorer:
    """E8M0 copied into float32 as a number (vllm issue 43416): 2**-9 is the byte 118, so about 2**7."""

    def misread(name: str, tensor: torch.Tensor) -> torch.Tensor:
        is_scale = ".experts." in name and name.endswith(".scale")
        return with_exponent(tensor, lambda bits: torch.full_like(bits, 127 + 7)) if is_scale else tensor

    transformer = load(changed(model.folder, place / "damaged", misread))
    return lambda tokens: rows_of(transformer, tokens)


def yarn_is_lost(model: Model, place: Path) -> Scorer:
    folder = Path(shutil.copytree(model.folder, place / "damaged"))
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config["rope_scaling"]["factor"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    transformer = load(folder)
    return lambda tokens: rows_of(transformer, tokens)


def another_prefix(model: Model, place: Path) -> Scorer:
    transformer = load(model.folder)
    return lambda tokens: rows_of(transformer, [7, 8, 9, *tokens[3:]])


@pytest.mark.parametrize(("server", "verdict"), [
    (honest, "AGREES"),
    (scales_are_their_bytes, "chance level from the first token"),
    (yarn_is_lost, "grows with the position: as when YaRN"),
    (another_prefix, "only the beginning differs"),
])  # fmt: skip
@pytest.mark.fast_cases(2)
def test_each_damage_is_named(
    server: Callable[[Model, Path], Scorer], verdict: str, model: Model, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    tokens = ",".join(map(str, model.prompt))
    with LogProbabilityServer("vllm", server(model, tmp_path)) as running:
        code = cli.run(["run", str(model.folder), "--tokens", tokens, "--compare", running.address])
    out, err = capfd.readouterr()
    assert code == (not out.startswith("AGREES")), err
    assert verdict in out.splitlines()[0]
