"""`dsv4 run --draft` and what `--logits` and `--compare` make of draft stages, as command lines."""

import json
import re
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from drafting import agreeable_drafts, agreeable_mtp, random_drafts
from exact_values import convert, dsv4
from ranks import run_ranks, torchrun
from safetensors.torch import load_file
from tiny import flipped

from dsv4.model import load
from dsv4.model.evaluate.logits import teacher_forced

TOKENS = "3,1,4,1,5,9,2,6,5,3,5,8,9,7,9,3,2,3,8,4,6"
GREEDY = ("--tokens", TOKENS, "--temperature", "0", "--max-new-tokens", "20")
PARTS = {"draft_tokens", "draft_logits", "draft_confidence"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return agreeable_drafts(tmp_path_factory.mktemp("run-draft") / "checkpoint")


def test_the_answer_is_the_same_and_drafts_are_counted(folder: Path) -> None:
    made = [dsv4("run", folder, *GREEDY, "--json", *option) for option in ((), ("--draft",), ("--mtp",))]
    assert [code for code, _, _ in made] == [0, 0, 0]
    plain, draft, mtp = (json.loads(out) for _, out, _ in made)
    assert plain["answers"] == draft["answers"] == mtp["answers"]
    found, steps = draft["statistics"], draft["statistics"]["decode_steps"]
    assert 0 < found["accepted_tokens"] < found["drafted_tokens"]
    assert found["acceptance_rate"] == found["accepted_tokens"] / found["drafted_tokens"]
    assert found["tokens_per_step"] == 19 / steps == (steps + found["accepted_tokens"]) / steps > 1
    assert plain["statistics"]["tokens_per_step"] == 1 and plain["statistics"]["acceptance_rate"] is None


def test_the_closing_lines(folder: Path) -> None:
    code, _, err = dsv4("run", folder, *GREEDY, "--draft")
    assert code == 0
    assert re.search(r"drafts: \d+ of \d+ accepted \(\d+%\)", err)
    assert re.search(r"decode in \d+ steps, \d\.\d\d tokens per step", err)
    assert "tokens per step" not in dsv4("run", folder, *GREEDY)[2]


def test_logits_have_a_draft_from_every_position(folder: Path, tmp_path: Path) -> None:
    code, out, _ = dsv4("run", folder, "--tokens", TOKENS, "--logits", tmp_path / "l", "--prefill", 5, "--json")
    tensors, ids = load_file(tmp_path / "l"), [int(token) for token in TOKENS.split(",")]
    expected = teacher_forced(load(folder), ids).drafts
    assert code == 0 and tensors.keys() == {"token_ids", "logits"} | PARTS and expected is not None
    assert all(torch.equal(tensors[f"draft_{name}"], part) for name, part in expected._asdict().items())
    assert json.loads(out)["shapes"] == {name: list(t.shape) for name, t in tensors.items() if name != "token_ids"}
    assert tensors["draft_logits"].shape == (21, 5, 64) and tensors["draft_confidence"].shape == (21, 5)


@pytest.mark.slow
def test_compare_sees_a_damaged_stage(folder: Path, tmp_path: Path) -> None:
    """The main model's logits are equal; the stage is named, and how far the drafts are apart."""
    other = flipped(folder, tmp_path / "damaged", "mtp.1.attn.wkv.weight")
    code, out, _ = dsv4("run", folder, "--tokens", TOKENS, "--compare", other, "--json")
    found = json.loads(out)
    assert code == 1 and not found["bit_equal"] and found["max_difference"] == 0
    assert found["mtp_max_difference"] > 0 and found["first_module"] == "mtp.1.attn"
    assert dsv4("run", folder, "--tokens", TOKENS, "--compare", folder)[0] == 0


@pytest.mark.slow
def test_ranks_have_the_same_bits(folder: Path, tmp_path: Path) -> None:
    """Of the checkpoint and of its rank files, by one process and two."""
    convert(folder, tmp_path / "mp", "--layout", "mp", "--model-parallel", "2")
    options = ["--tokens", TOKENS, "--logits", "out", "--prefill", "9"]
    code, _, _ = dsv4("run", folder, *options[:2], "--logits", tmp_path / "one", "--prefill", "9")
    expected = load_file(tmp_path / "one")
    for source in (folder, tmp_path / "mp"):
        for count in (1, 2):
            ended = run_ranks(count, tmp_path, "run", source, *options)
            assert code == 0 and ended.codes == [0] * count, ended.err
            found = load_file(tmp_path / "out")
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.slow
def test_drafts_under_torchrun(folder: Path) -> None:
    code, out, _ = dsv4("run", folder, *GREEDY)
    ended = torchrun(2, "run", folder, *GREEDY, "--draft")
    assert code == 0 and ended.returncode == 0, ended.stderr
    assert ended.stdout == out and "accepted" in ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("drawing", [("--temperature", "0"), ("--temperature", "0.7", "--seed", "5")])
def test_chained_mtp_drafts_on_ranks(drawing: tuple[str, ...], tmp_path: Path) -> None:
    """Three tokens at a time, some of them accepted: of the checkpoint and of rank files, by one process and two."""
    source, mp = agreeable_mtp(tmp_path / "source"), tmp_path / "mp"
    convert(source, mp, "--layout", "mp", "--model-parallel", "2")
    options = ("--tokens", TOKENS, "--max-new-tokens", "20", *drawing)
    code, plain, _ = dsv4("run", source, *options)
    assert code == 0
    code, out, err = dsv4("run", mp, *options, "--draft")
    ended = [run_ranks(2, tmp_path, "run", folder, *options, "--draft") for folder in (source, mp)]
    assert code == 0 and [each.codes for each in ended] == [[0, 0]] * 2, ended
    assert out == ended[0].out[0] == ended[1].out[0] == plain
    counts = [re.findall(r"drafts: (\d+) of (\d+) accepted", each) for each in (err, *(one.err[0] for one in ended))]
    assert counts[0] == counts[1] == counts[2]
    [(accepted, drafted)] = counts[0]
    assert 3 < int(accepted) < int(drafted)
    steps = re.search(r"decode in (\d+) steps", err)
    assert steps is not None and int(steps[1]) == 19 - int(accepted)


def test_teacher_forcing_drafts_anyway(folder: Path, tmp_path: Path) -> None:
    code, _, err = dsv4("run", folder, "--tokens", "1,2", "--logits", tmp_path / "l", "--draft")
    assert code == 2 and "--logits and --compare run the draft stages anyway" in err


def test_little_memory_counts_the_drafts(tmp_path: Path) -> None:
    """The bound holds for a run with drafts: their logits are among what is not for weights."""
    from dsv4.commands.run.options import RunOptions
    from dsv4.commands.run.placement import Work, working_memory
    from dsv4.commands.run.source import open_source
    from dsv4.output import configure

    folder = str(random_drafts(tmp_path / "checkpoint"))
    with ExitStack() as stack:
        source = open_source(folder, RunOptions(checkpoint=folder), stack, configure(False, True, False))
    assert source.rows_per_position == 6
    needed = [working_memory(source.config, Work(1, 100, 100, 100, rows), True) for rows in (2, 6)]
    assert needed[1] - needed[0] == 4 * (100 + 100) * 4 * source.config.vocab_size
