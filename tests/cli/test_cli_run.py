"""`dsv4 run` from the command line, on a checkpoint small enough to answer in milliseconds."""

import errno
import html
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from full_disk import files_of_at_most
from mixed_scales import mix_scales
from program import as_program
from safetensors.torch import load_file
from tiny import TINY, flipped

from dsv4 import cli, signals
from dsv4.commands.run import chat as run_chat
from dsv4.commands.run.placement import Placement, load_model
from dsv4.commands.run.source import Source
from dsv4.convert.synthetic.checkpoint import Geometry, make_checkpoint
from dsv4.errors import Interrupted
from dsv4.model import load
from dsv4.model.chat.encoding import encode_messages
from dsv4.model.chat.tokenizer import load_tokenizer
from dsv4.model.generate import Answer, Limits, Statistics, generate
from dsv4.model.sampling import Sampling
from dsv4.model.transformer import Transformer
from dsv4.output import Output

FEW = ("--max-new-tokens", "4", "--temperature", "0")
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("run") / "small", geometry=TINY))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("run") / "other", geometry=TINY, seed=1))


def run(capfd: Capture, *arguments: str, code: int = 0) -> tuple[str, str]:
    found = cli.run(["run", *arguments])
    captured = capfd.readouterr()
    assert found == code, captured.err
    return captured.out, captured.err


def run_json(capfd: Capture, *arguments: str, code: int = 0) -> dict[str, Any]:
    return json.loads(run(capfd, *arguments, "--json", code=code)[0])


def greedy(folder: str, ids: list[int], count: int = 4) -> list[int]:
    return generate(load(folder), [ids], Limits(count, frozenset([1])), Sampling(temperature=0))[0][0].tokens


# --- prompts ---


def test_a_prompt_in_each_mode(capfd: Capture, folder: str) -> None:
    tokenizer = load_tokenizer(folder)
    modes = (("chat", "chat", None), ("think", "thinking", None), ("think-max", "thinking", "max"))
    for mode, thinking, effort in modes:
        messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hello"}]
        ids = tokenizer.encode(encode_messages(messages, thinking_mode=thinking, reasoning_effort=effort))
        if len(ids) > TINY.max_position_embeddings:
            assert "context" in run(capfd, folder, "Hello", "--system", "S", "--mode", mode, *FEW, code=3)[1]
            continue
        answer = run_json(capfd, folder, "Hello", "--system", "S", "--mode", mode, *FEW)["answers"][0]
        assert answer["prompt_tokens"] == len(ids)
        assert answer["tokens"] == greedy(folder, ids)
        assert answer["text"] == tokenizer.decode(answer["tokens"])


def test_positional_p_and_messages_are_the_same(capfd: Capture, folder: str, tmp_path: Path) -> None:
    path = tmp_path / "messages.json"
    path.write_text(json.dumps([{"role": "user", "content": "Hello"}]))
    answers = [
        run_json(capfd, folder, *how, *FEW)["answers"]
        for how in (("Hello",), ("-p", "Hello"), ("--messages", str(path)))
    ]
    assert answers[0] == answers[1] == answers[2]


def test_the_answer_goes_to_stdout_and_the_rest_to_stderr(capfd: Capture, folder: str) -> None:
    text = run_json(capfd, folder, "Hello", *FEW)["answers"][0]["text"]
    out, err = run(capfd, folder, "Hello", *FEW)
    assert out == text + "\n"
    number = r"\d+(\.\d+)?"
    assert re.search(rf"prefill \d+ tokens, {number} tokens/s; decode 3 tokens, {number} tokens/s\n", err)
    assert re.search(r"first token after \S+ s, peak memory [\d.]+ [MG]B\n", err)
    assert run(capfd, folder, "Hello", *FEW, "-q") == (out, "")
    assert "decode" not in run(capfd, folder, "Hello", "--max-new-tokens", "1")[1]  # the prefill gives the first token


def test_raw_sends_the_text_as_it_is(capfd: Capture, folder: str) -> None:
    ids = load_tokenizer(folder).encode("Hello<think>")
    answer = run_json(capfd, folder, "Hello<think>", "--raw", *FEW)["answers"][0]
    assert answer["prompt_tokens"] == len(ids) and answer["tokens"] == greedy(folder, ids)
    assert "message" not in answer


def test_tokens_inline_and_from_a_file(capfd: Capture, folder: str, tmp_path: Path) -> None:
    expected = greedy(folder, [0, 17, 4])
    for text in ("0,17,4", " [0, 17, 4]\n", "0 17\n4"):
        path = tmp_path / "ids"
        path.write_text(text)
        assert run_json(capfd, folder, "--tokens", str(path), *FEW)["answers"][0]["tokens"] == expected
    assert run(capfd, folder, "--tokens", "0,17,4", *FEW, "-q")[0] == ",".join(map(str, expected)) + "\n"


def test_tokens_need_no_tokenizer(capfd: Capture, tmp_path: Path) -> None:
    bare = str(make_checkpoint(tmp_path / "bare", geometry=TINY, tokenizer=False))
    assert len(run_json(capfd, bare, "--tokens", "0,17,4", *FEW)["answers"][0]["tokens"]) == 4
    assert "--tokens" in run(capfd, bare, "Hello", code=3)[1]


@pytest.mark.slow
def test_a_file_of_prompts(capfd: Capture, folder: str, tmp_path: Path) -> None:
    alone = [run_json(capfd, folder, text, *FEW)["answers"][0] for text in ("Hello", "The world of the", "a")]
    lines, lists = tmp_path / "lines.txt", tmp_path / "lists.json"
    lines.write_text("Hello\n\nThe world of the\na\n")
    lists.write_text(json.dumps([[{"role": "user", "content": "Hello"}], "The world of the", "a"]))
    for path in (lines, lists):
        assert run_json(capfd, folder, "--file", str(path), *FEW)["answers"] == alone
    out, err = run(capfd, folder, "--file", str(lines), *FEW)
    assert out == "".join(answer["text"] + "\n" for answer in alone)
    assert "[3]" in err


def test_tools_reach_the_prompt(capfd: Capture, folder: str, tmp_path: Path) -> None:
    tools, messages = [{"type": "function", "function": {"name": "f"}}], [{"role": "user", "content": "Hello"}]
    (tmp_path / "tools.json").write_text(json.dumps(tools))
    (tmp_path / "messages.json").write_text(json.dumps({"messages": messages, "tools": tools}))
    prompt = encode_messages([{"role": "system", "content": "", "tools": tools}, *messages], thinking_mode="chat")
    needed = len(load_tokenizer(folder).encode(prompt))
    for how in (("Hello", "--tools", str(tmp_path / "tools.json")), ("--messages", str(tmp_path / "messages.json"))):
        _, err = run(capfd, folder, *how, code=3)  # longer than this model's context, which is what we can see it by
        assert f"the prompt has {needed} tokens, the model's context 200" in err


def scripted(monkeypatch: pytest.MonkeyPatch, tokens: list[int]) -> None:
    """Make every answer these tokens."""

    def answer(model: Any, prompts: Any, *_: Any, on_token: Any, **__: Any) -> Any:
        for token in tokens:
            on_token(0, token)
        return [Answer(tokens, "stop")], Statistics(), None

    monkeypatch.setattr("dsv4.model.generate.generate", answer)


def test_the_reply_is_parsed(capfd: Capture, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    called = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1, "city": "Zürich"}'}}]
    reply = {"role": "assistant", "content": "Wait. 🌍", "reasoning_content": "hm", "tool_calls": called}
    question = [{"role": "user", "content": "q"}]
    prompt, whole = (encode_messages(messages, thinking_mode="thinking") for messages in (question, [*question, reply]))
    scripted(monkeypatch, load_tokenizer(folder).encode(whole.removeprefix(prompt)))
    answer = run_json(capfd, folder, "q", "--mode", "think")["answers"][0]
    expected = [{"type": "function", "function": called[0]["function"]}]
    assert answer["message"] == {**reply, "tool_calls": expected}
    assert answer["text"] == whole.removeprefix(prompt).removesuffix("<｜end▁of▁sentence｜>")
    assert run(capfd, folder, "q", "--mode", "think", "-q")[0] == answer["text"] + "\n"


def test_a_reply_that_breaks_the_protocol_is_shown_all_the_same(
    capfd: Capture, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    scripted(monkeypatch, load_tokenizer(folder).encode("hello<think>"))
    answer = run_json(capfd, folder, "q")["answers"][0]
    assert answer["message"] is None and answer["text"] == "hello<think>"
    assert answer["problem"] == "completion, character 5: <think> inside the content"


# --- drawing and stopping ---


def test_the_seed_is_reported_and_repeats_the_answer(capfd: Capture, folder: str) -> None:
    first = run_json(capfd, folder, "--tokens", "0,5", "--max-new-tokens", "6")
    again = run_json(capfd, folder, "--tokens", "0,5", "--max-new-tokens", "6", "--seed", str(first["seed"]))
    assert again["answers"] == first["answers"]
    other = run_json(capfd, folder, "--tokens", "0,5", "--max-new-tokens", "6", "--seed", str(first["seed"] + 1))
    assert other["answers"] != first["answers"]


def test_mtp_changes_nothing_and_is_counted(capfd: Capture, folder: str) -> None:
    arguments = (folder, "--tokens", "0,5,9", "--max-new-tokens", "8")
    for how in (("--temperature", "0"), ("--seed", "3")):
        plain, drafting = run_json(capfd, *arguments, *how), run_json(capfd, *arguments, *how, "--mtp")
        assert plain["answers"] == drafting["answers"]
        assert plain["statistics"]["acceptance_rate"] is None
        assert drafting["statistics"]["drafted_tokens"] > 0
    assert re.search(r"drafts: \d+ of \d+ accepted \(\d+%\)", run(capfd, *arguments, "--mtp")[1])


def test_rates_count_the_tokens_of_their_own_seconds(
    capfd: Capture, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefill computes each row's first new token, so decoding made one less in its seconds."""
    took: list[Statistics] = []

    def watched(*arguments: Any, **more: Any) -> Any:
        result = generate(*arguments, **more)
        took.append(result[1])
        return result

    monkeypatch.setattr("dsv4.model.generate.generate", watched)
    (tmp_path / "prompts").write_text("one\ntwo\nthree\n")
    found = run_json(capfd, folder, "--file", str(tmp_path / "prompts"), *FEW)["statistics"]
    assert found["new_tokens"] == 3 * 4
    assert found["decode_tokens_per_second"] == 3 * 3 / took[0].decode_seconds
    assert found["prefill_tokens_per_second"] == found["prompt_tokens"] / took[0].prefill_seconds


def test_stop_strings(capfd: Capture, folder: str) -> None:
    arguments = (folder, "Hello", "--seed", "6", "--max-new-tokens", "24")
    whole = run_json(capfd, *arguments)["answers"][0]["text"]
    stop = next(c for i, c in enumerate(whole) if i and c.isalnum() and c not in whole[:i])
    answer = run_json(capfd, *arguments, "--stop", stop, "--stop", "never in there")["answers"][0]
    assert answer["text"] == whole[: whole.index(stop)]
    assert answer["finish"] == "stop"
    assert run(capfd, *arguments, "--stop", stop, "-q")[0] == answer["text"] + "\n"


def test_the_end_token_ends_the_answer(capfd: Capture, folder: str, tmp_path: Path) -> None:
    tokens = greedy(folder, [0, 17, 4])
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"eos_token_id": [1, tokens[1]]}))
    answer = run_json(capfd, str(copy), "--tokens", "0,17,4", *FEW)["answers"][0]
    assert answer["tokens"] == tokens[: tokens.index(tokens[1]) + 1] and answer["finish"] == "stop"


# --- logits, traces, comparison ---


def allow_weights(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Leave memory for so many bytes of weights. With --max-memory that cannot be aimed at: pytest itself varies."""
    monkeypatch.setattr("dsv4.commands.run.placement.memory_for_weights", lambda *_: (count, 0))


@pytest.mark.parametrize("weights", [None, 900_000, 200_000])
@pytest.mark.parametrize("how", [(), ("--no-simulation",), ("--prefill", "3")])
@pytest.mark.fast_cases(2)
def test_logits_of_every_position(
    capfd: Capture,
    folder: str,
    tmp_path: Path,
    how: tuple[str, ...],
    weights: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if weights is not None:
        allow_weights(monkeypatch, weights)
    ids = [0, 5, 9, 200, 7, 7, 31]
    path = tmp_path / "logits.safetensors"
    run(capfd, folder, "--tokens", ",".join(map(str, ids)), "--logits", str(path), "-q", *how)
    tensors = load_file(path)
    model = load(folder, simulation="--no-simulation" not in how)
    output = model.forward(torch.tensor([ids]), model.new_cache(1))
    mtp = model.mtp_logits(output.hidden[:, :-1], torch.tensor([ids[1:]]), model.new_mtp_cache(1))
    assert tensors["token_ids"].tolist() == ids and tensors["token_ids"].dtype == torch.int64
    assert torch.equal(tensors["logits"], output.logits[0]) and tensors["logits"].dtype == torch.float32
    assert torch.equal(tensors["mtp_logits"], mtp[0])


def test_logits_go_where_they_are_told(capfd: Capture, folder: str, tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    run(capfd, folder, "--tokens", "0,5", "--logits", str(link), "-q")
    assert link.is_symlink() and set(load_file(target)) == {"token_ids", "logits", "mtp_logits"}
    assert "is a folder" in run(capfd, folder, "--tokens", "0,5", "--logits", str(tmp_path), code=2)[1]


@pytest.mark.parametrize("option", ["--logits", "--trace"])
def test_a_full_disk_is_named_and_an_older_file_survives(
    capfd: Capture, folder: str, tmp_path: Path, option: str
) -> None:
    path = tmp_path / "result"
    path.write_text("older")
    with files_of_at_most(4096):
        _, err = run(capfd, folder, "--tokens", "0,5,9", "--max-new-tokens", "4", option, str(path), code=4)
    assert f"error: {path}: File too large" in err
    assert path.read_text() == "older" and [entry.name for entry in tmp_path.iterdir()] == ["result"]


def test_an_interrupted_trace_leaves_the_older_one(
    capfd: Capture, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise Interrupted("interrupted")

    monkeypatch.setattr("dsv4.model.evaluate.trace.TraceWriter.__call__", interrupt)
    path = tmp_path / "trace"
    path.write_text("older")
    run(capfd, folder, "--tokens", "0,5", *FEW, "--trace", str(path), code=130)
    assert path.read_text() == "older" and [entry.name for entry in tmp_path.iterdir()] == ["trace"]


def test_results_into_a_device(capfd: Capture, folder: str) -> None:
    for option in ("--logits", "--trace"):
        run(capfd, folder, "--tokens", "0,5", "--max-new-tokens", "2", option, "/dev/null", "-q")
    assert Path("/dev/null").is_char_device()


def test_trace(capfd: Capture, folder: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    run(capfd, folder, "--tokens", "0,5,9,4", "--logits", str(tmp_path / "l"), "--trace", str(path), "--prefill", "3")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    modules = [line["module"] for line in lines if line["positions"] == [0, 3]]
    assert modules[0] == "embed" and {"layers.0", "layers.1.attn", "mtp.0", "mtp.0.logits", "logits"} <= set(modules)
    experts = [line for line in lines if "experts" in line]
    assert all(len(line["experts"]) == line["positions"][1] - line["positions"][0] for line in experts)
    layer = next(line for line in lines if line["module"] == "layers.1" and line["positions"] == [3, 4])
    assert layer["shape"] == [1, 2, 128] and layer["min"] <= layer["mean"] <= layer["max"]
    assert len(layer["sha256"]) == 64
    again = tmp_path / "again.jsonl"
    run(capfd, folder, "--tokens", "0,5,9,4", "--logits", str(tmp_path / "l"), "--trace", str(again), "--prefill", "3")
    assert again.read_text() == path.read_text()
    run(capfd, folder, "--tokens", "0,5,9,4", *FEW, "--trace", str(again))
    assert {tuple(json.loads(line)["positions"]) for line in again.read_text().splitlines()} >= {(0, 4), (4, 5), (6, 7)}


def test_compare_with_a_copy(capfd: Capture, folder: str) -> None:
    out, err = run(capfd, folder, "--tokens", "0,5,9", "--compare", folder)
    assert out == "BIT-EQUAL: every logit of every position has the same bits in both checkpoints\n"
    assert err.count("running") == 2


@pytest.mark.slow
def test_one_token_is_enough(capfd: Capture, folder: str, other: str, tmp_path: Path) -> None:
    assert run(capfd, folder, "--tokens", "5", "--compare", folder)[0].startswith("BIT-EQUAL")
    assert run_json(capfd, folder, "--tokens", "5", "--compare", other, code=1)["mtp_max_difference"] is None
    run(capfd, folder, "--tokens", "5", "--logits", str(tmp_path / "l"), "-q")
    assert set(load_file(tmp_path / "l")) == {"token_ids", "logits"}


@pytest.mark.slow
def test_compare_with_another(capfd: Capture, folder: str, other: str, tmp_path: Path) -> None:
    report = tmp_path / "report <1>.html"
    result = run_json(capfd, folder, "--tokens", "0,5,9", "--compare", other, "--report", str(report), code=1)
    assert not result["bit_equal"] and not result["same"]
    assert result["first_module"] == "embed" and result["first_position"] == 0
    ids, models = torch.tensor([[0, 5, 9]]), [load(folder), load(other)]
    a, b = (model.forward(ids, model.new_cache(1)).logits[0].double() for model in models)
    assert result["difference"] == (a - b).abs().amax(-1).tolist()
    assert result["max_difference"] == max(result["difference"])
    p, q = torch.softmax(a, -1), torch.softmax(b, -1)
    assert result["kl"] == pytest.approx((p * (p / q).log()).sum(-1).tolist(), rel=1e-9)
    assert result["top1"] == (a.argmax(-1) == b.argmax(-1)).tolist()
    out, _ = run(capfd, folder, "--tokens", "0,5,9", "--compare", other, code=1)
    assert out.startswith("DIFFERENT") and "first difference    embed, position 0" in out
    page = report.read_text()
    assert page.count("<svg") == 3 and "http" not in page and "<script" not in page
    assert "First module that differs: embed, at position 0" in page
    words = ["dsv4", "run", folder, "--tokens", "0,5,9", "--compare", other, "--report", str(report), "--json"]
    assert shlex.join(words) in html.unescape(page)


@pytest.mark.slow
def test_a_tolerance_lets_small_differences_pass(capfd: Capture, folder: str, tmp_path: Path) -> None:
    copy = flipped(folder, tmp_path / "copy", "norm.weight")
    arguments = (folder, "--tokens", "0,5,9", "--compare", str(copy))
    found = run_json(capfd, *arguments, code=1)
    assert found["first_module"] == "logits" and 0 < found["max_difference"] < 1
    assert found["mtp_max_difference"] == 0
    within = run_json(capfd, *arguments, "--tolerance", str(found["max_difference"]))
    assert within["same"] and not within["bit_equal"]
    assert "within tolerance" in run(capfd, *arguments, "--tolerance", "1")[0]
    run(capfd, *arguments, "--tolerance", str(found["max_difference"] * 0.99), code=1)


@pytest.mark.slow
@pytest.mark.parametrize("mixed", [False, True])
def test_conversions_are_bit_equal(capfd: Capture, tmp_path: Path, mixed: bool) -> None:
    source = str(make_checkpoint(tmp_path / "source", geometry=TINY))
    if mixed:
        mix_scales(tmp_path / "source")
    ids = ",".join(str(i * 37 % 512) for i in range(11))
    for target in ("fp8", "bf16"):
        converted = str(tmp_path / target)
        assert cli.run(["convert", source, converted, "--to", target, "--on-inexact", "keep", "-q"]) == 0
        for how in ((), ("--no-simulation",)):
            out, _ = run(capfd, source, "--tokens", ids, "--prefill", "8", "--compare", converted, "-q", *how)
            assert out.startswith("BIT-EQUAL")


# Less than the 776,547 bytes of the weights, more than the 143,176 without which nothing runs.
FEW_WEIGHTS = (500_000, 200_000)
EXPERTS = [f"layers.1.ffn.experts.{i}.w1.weight" for i in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("tensor", [None, *EXPERTS, "mtp.0.ffn.shared_experts.w2.weight"])
@pytest.mark.parametrize("split", [(), ("--prefill", "4")])
def test_compare_prints_the_same_with_little_memory(
    capfd: Capture,
    folder: str,
    tmp_path: Path,
    tensor: str | None,
    split: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    second = folder if tensor is None else str(flipped(folder, tmp_path / "copy", tensor))
    arguments = (folder, "--tokens", "0,5,9,100,300,17,4", "--compare", second, *split)
    printed, pages, objects = [], [], []
    for weights in (None, *FEW_WEIGHTS):
        if weights is not None:
            allow_weights(monkeypatch, weights)
        page = tmp_path / "page.html"
        out, err = run(capfd, *arguments, "--report", str(page), code=int(tensor is not None))
        printed.append(out)
        pages.append(re.sub(r"<dt>(Made by|Command)</dt><dd>.*?</dd>", "", page.read_text()))
        objects.append(run_json(capfd, *arguments, code=int(tensor is not None)))
        del objects[-1]["peak_memory_bytes"]
        assert err.count("differs at position") == (tensor is not None)
    assert printed[0] == printed[1] == printed[2] and pages[0] == pages[1] == pages[2]
    assert objects[0] == objects[1] == objects[2]
    assert (objects[0]["first_module"] is None) == (tensor is None)
    if tensor is not None and not split:  # of one prefill, the difference reported first is that of the first module
        assert f"{objects[0]['first_module']} differs at position {objects[0]['first_position']}; going on" in err


@pytest.mark.slow
def test_compare_keeps_to_quiet_and_tolerance(capfd: Capture, folder: str, tmp_path: Path) -> None:
    copy = str(flipped(folder, tmp_path / "copy", "norm.weight"))
    arguments = (folder, "--tokens", "0,5,9", "--compare", copy)
    out, err = run(capfd, *arguments, "--tolerance", "1", "-q")
    assert out.startswith("within tolerance") and not err


@pytest.mark.slow
def test_compare_holds_one_model_at_a_time(capfd: Capture, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[weakref.ref[Transformer]] = []

    def spy(source: Source, placement: Placement, out: Output, draft: bool) -> Transformer:
        assert all(model() is None for model in loaded) and placement.weights_bytes == 500_000
        model = load_model(source, placement, out, draft)
        assert 250_000 < model.store.resident_bytes <= 500_000
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr("dsv4.commands.run.compare.load_model", spy)
    allow_weights(monkeypatch, 500_000)
    run(capfd, folder, "--tokens", "0,5,9", "--compare", folder)
    assert len(loaded) == 2


def test_compare_checks_both_before_it_runs_one(capfd: Capture, folder: str, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"q_lora_rank": 2 * config["q_lora_rank"]}))
    _, err = run(capfd, folder, "--tokens", "0,5,9", "--compare", str(copy), code=3)
    assert "running" not in err and "'layers.0.attn." in err and "config.json asks for [" in err


class Terminal(io.StringIO):
    """A screen to draw bars on."""

    def isatty(self) -> bool:
        return True


@pytest.mark.slow
def test_the_difference_is_printed_beside_the_bar(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv4.output.SECONDS_UNTIL_A_PASSING_BAR", 0)
    monkeypatch.setattr("dsv4.output.SECONDS_OF_A_LONG_STEP", 3600)  # on a slow machine 0% would be drawn again
    monkeypatch.setattr("sys.stderr", Terminal())
    copy = str(flipped(folder, tmp_path / "copy", "norm.weight"))
    assert cli.run(["run", folder, "--tokens", "0,5,9", "--compare", copy]) == 1
    screen = sys.stderr.getvalue()
    assert screen.count("computing:   0%") == 2 and "0.00/3.00" in screen
    before, _, words = screen.partition("logits differs at position 0; going on")
    assert words and not before.rpartition("\r")[2].strip()


def test_interrupted_compare(capfd: Capture, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(100))

    def interrupting(self: object, name: str, position: int, output: torch.Tensor) -> None:
        if next(calls) == 5:
            raise Interrupted("interrupted", "Run the same command again.")

    monkeypatch.setattr("dsv4.model.evaluate.trace.Fingerprints.__call__", interrupting)
    out, err = run(capfd, folder, "--tokens", "0,5,9", "--compare", folder, code=130)
    assert not out and err.splitlines()[-1] == "error: interrupted" and next(calls) == 6


# --- chat ---


def chat(capfd: Capture, monkeypatch: pytest.MonkeyPatch, lines: str, *arguments: str) -> tuple[str, str]:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    return run(capfd, *arguments)


def test_chat_remembers(capfd: Capture, monkeypatch: pytest.MonkeyPatch, folder: str, tmp_path: Path) -> None:
    first = run_json(capfd, folder, "Hello", *FEW)["answers"][0]["text"]
    path = tmp_path / "history.json"
    history = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": first}]
    path.write_text(json.dumps([*history, {"role": "user", "content": "and"}]))
    second = run_json(capfd, folder, "--messages", str(path), *FEW)["answers"][0]["text"]
    out, err = chat(capfd, monkeypatch, "Hello\n\nand\n/clear\nHello\n/exit\nnever read\n", folder, *FEW)
    assert out == f"{first}\n{second}\n{first}\n"
    statistics = [line for line in err.splitlines() if line.startswith("prefill ")]  # "prefill: …" is progress
    assert "cleared" in err and len(statistics) == 3


def test_chat_commands(capfd: Capture, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    think = run_json(capfd, folder, "Hello", "--mode", "think", "--system", "S s", *FEW)["answers"][0]["text"]
    lines = "/mode think\n/system S s\nHello\n/mode loud\n/help\n"
    out, err = chat(capfd, monkeypatch, lines, folder, *FEW)
    assert out == think + "\n"
    assert "mode think" in err and err.count("/clear") == 2


def test_ctrl_c_stops_the_answer_and_not_the_program(
    capfd: Capture, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    first = run_json(capfd, folder, "Hello", *FEW)["answers"][0]["text"]
    real = run_chat.Chat._generate
    turns = []

    def interrupted_once(self: run_chat.Chat, prompt: list[int], text: Any) -> None:
        turns.append(prompt)
        if len(turns) == 1:
            monkeypatch.setattr(text, "add", lambda token: signal.raise_signal(signal.SIGINT) or "")
        real(self, prompt, text)

    monkeypatch.setattr(run_chat.Chat, "_generate", interrupted_once)
    with as_program():
        out, err = chat(capfd, monkeypatch, "Hello\n/clear\nHello\n", folder, *FEW)
    assert "(stopped)" in err
    assert out == f"\n{first}\n"


def test_a_terminated_chat_ends(capfd: Capture, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    def terminate(self: run_chat.Chat, prompt: list[int], text: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        signals.token.check()

    monkeypatch.setattr(run_chat.Chat, "_generate", terminate)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\nHello\n"))
    with as_program():
        run(capfd, folder, *FEW, code=143)


def test_ctrl_c_at_the_prompt_does_not_leave(capfd: Capture, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    lines = iter(["/mode think", signal.SIGINT, "/mode chat", None])

    def read_line(out: Any) -> str | None:
        line = next(lines)
        if line is signal.SIGINT:
            signal.raise_signal(line)
            pytest.fail("the prompt waits on")
        return line

    monkeypatch.setattr(run_chat, "_read_line", read_line)
    with as_program():
        _, err = run(capfd, folder)
    assert err.index("mode think") < err.index("(/exit or Ctrl-D leaves)") < err.index("mode chat")


def test_ctrl_c_without_a_chat_ends_the_program(capfd: Capture, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise Interrupted("interrupted")

    monkeypatch.setattr("dsv4.model.generate.generate", interrupt)
    assert "interrupted" in run(capfd, folder, "Hello", code=130)[1]


def test_a_turn_that_does_not_fit_is_undone(capfd: Capture, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    first = run_json(capfd, folder, "Hello", *FEW)["answers"][0]["text"]
    out, err = chat(capfd, monkeypatch, "x " * 150 + "\nHello\n", folder, *FEW)
    assert "the model's context 200" in err
    assert out == first + "\n"


# --- errors ---


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        (("a", "-p", "b"), 2, "given twice"),
        (("a", "--tokens", "1"), 2, "given 2 times"),
        (("--tokens", "1", "--mode", "think"), 2, "--tokens needs no encoding"),
        (("a", "--raw", "--system", "s"), 2, "--raw"),
        (("--logits", "f"), 2, "--logits needs a prompt"),
        (("--compare", "f"), 2, "--compare needs a prompt"),
        (("a", "--prefill", "2"), 2, "--prefill belongs"),
        (("a", "--report", "f"), 2, "--report belongs"),
        (("a", "--compare", "b", "--logits", "f"), 2, "cannot be used together"),
        (("--json",), 2, "--json needs a prompt"),
        (("--tokens", "0,512"), 3, "token 1 is 512, the vocabulary has ids 0 to 511"),
        (("--tokens", "0,x"), 3, "neither a list of token ids nor a file"),
        (("--tokens", ""), 3, "the prompt is empty"),
        (("--tokens", ",".join(["1"] * 201)), 3, "the prompt has 201 tokens, the model's context 200"),
        (("--file", "missing.txt"), 3, "missing.txt"),
        (("a", "--device", "nosuch"), 4, "nosuch"),
        (("a", "--max-memory", "1KB"), 4, "(--max-memory)"),
        (("a", "--max-memory", "lots"), 2, "is not a size"),
        (("a", "--top-p", "0"), 2, "top-p"),
        (("a", "--compare", "nowhere"), 3, "nowhere"),
        (("a", "--logits", "no/such/folder/l"), 2, "no/such/folder/l: the folder does not exist"),
        (("a", "--compare", "a", "--report", "no/such/folder/r"), 2, "the folder does not exist"),
        (("a", "--trace", "no/such/folder/t"), 2, "the folder does not exist"),
    ],
)
def test_errors(capfd: Capture, folder: str, arguments: tuple[str, ...], code: int, problem: str) -> None:
    out, err = run(capfd, folder, *arguments, code=code)
    assert problem in err
    if "--json" not in arguments:
        assert out == ""


def test_a_folder_that_is_missing_may_have_been_a_repository(capfd: Capture) -> None:
    err = run(capfd, "deepseek-ai/DeepSeek-V4-Flash", "a", code=3)[1]
    assert "A repository on Hugging Face is written hf:deepseek-ai/DeepSeek-V4-Flash." in err
    assert "hf:" not in run(capfd, "./nowhere", "a", code=3)[1]


def test_no_checkpoint(capfd: Capture, tmp_path: Path) -> None:
    assert "does not exist" in run(capfd, str(tmp_path / "none"), "a", code=3)[1]
    assert "model.safetensors.index.json" in run(capfd, str(tmp_path), "--tokens", "1", code=3)[1]


@pytest.mark.parametrize(("value", "problem"), [("[]", "a JSON object"), ('{"eos_token_id": "x"}', "eos_token_id")])
def test_a_strange_generation_config(capfd: Capture, folder: str, tmp_path: Path, value: str, problem: str) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    del config["eos_token_id"]
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "generation_config.json").write_text(value)
    assert problem in run(capfd, str(copy), "--tokens", "1", code=3)[1]


@pytest.mark.slow
def test_mtp_needs_an_mtp_block(capfd: Capture, tmp_path: Path) -> None:
    geometry = Geometry(**{**vars(TINY), "compress_ratios": (0, 4), "num_nextn_predict_layers": 0})
    bare = str(make_checkpoint(tmp_path / "bare", geometry=geometry))
    assert "no draft stages" in run(capfd, bare, "--tokens", "1", "--mtp", code=2)[1]
    path = tmp_path / "l.safetensors"
    run(capfd, bare, "--tokens", "1,2", "--logits", str(path), "-q")
    assert set(load_file(path)) == {"token_ids", "logits"}
    full = str(make_checkpoint(tmp_path / "full", geometry=TINY))
    assert run(capfd, bare, "--tokens", "1,2", "--compare", full)[0].startswith("BIT-EQUAL")


# --- memory ---


def test_what_came_from_the_files_is_reported(
    capfd: Capture, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_json(capfd, folder, "--tokens", "0,5,9", *FEW)["statistics"]["from_files"] is None
    assert "from the files" not in run(capfd, folder, "--tokens", "0,5,9", *FEW, "-v")[1]
    allow_weights(monkeypatch, 400_000)
    for more in (FEW, ("--logits", str(tmp_path / "l.safetensors"))):
        found = run_json(capfd, folder, "--tokens", "0,5,9", *more)["statistics"]["from_files"]
        assert 0 < found["matrices_read"] <= found["matrices_used"] and found["bytes_per_second"] > 0
        needed = found["matrices_read"] - found["matrices_unneeded"]
        assert found["hit_rate"] == 1 - needed / found["matrices_used"]
    line = rf"from the files: {found['matrices_used']} matrices used, \d+% of them in memory; [\d.]+ kB read at .*/s"
    again = run(capfd, folder, "--tokens", "0,5,9", "--logits", str(tmp_path / "l.safetensors"), "-v")[1]
    assert re.search(line, again), again
    assert "from the files" not in run(capfd, folder, "--tokens", "0,5,9", *FEW)[1]


@pytest.mark.parametrize(
    ("harm", "code", "problem"),
    [("cut", 3, r"model-\S+\.safetensors ends at byte \d+"), ("unreadable", 4, r"model-\S+: Input/output error"),
     ("deleted", 0, "")],
)  # fmt: skip
@pytest.mark.fast_cases(1)
def test_shards_that_go_bad_while_experts_are_read_from_them(
    capfd: Capture, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str, code: int, problem: str
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))

    def unreadable(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def load_and_harm(*arguments: Any, **more: Any) -> Transformer:
        model = load_model(*arguments, **more)
        for path in copy.glob("*.safetensors"):
            if harm == "cut":
                os.truncate(path, path.stat().st_size // 2)
            elif harm == "deleted":
                path.unlink()
        if harm == "unreadable":
            monkeypatch.setattr(os, "preadv", unreadable)
        return model

    allow_weights(monkeypatch, 400_000)
    arguments = ("--tokens", "0,5,9", "--seed", "1", *FEW)
    expected = run(capfd, str(copy), *arguments)[0]
    monkeypatch.setattr("dsv4.commands.run.command.load_model", load_and_harm)
    out, err = run(capfd, str(copy), *arguments, code=code)
    assert re.search(problem, err), err
    assert out == (expected if harm == "deleted" else "")


# 180 MB of weights, nine tenths of them experts: more than what is left of the bound beside the interpreter and torch.
LARGE = Geometry(
    vocab_size=2048, hidden_size=1024, compress_ratios=(0, 4, 128, 0), n_routed_experts=24, num_experts_per_tok=4,
    moe_intermediate_size=1024, num_attention_heads=16, head_dim=256, q_lora_rank=512, o_lora_rank=512, index_topk=64,
)  # fmt: skip


@pytest.mark.slow
def test_max_memory_bounds_the_whole_process(tmp_path: Path) -> None:
    folder = str(make_checkpoint(tmp_path / "large", geometry=LARGE, tokenizer=False))
    ids = ",".join(str(i * 37 % 2000) for i in range(64))

    def found(*more: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "dsv4", "run", folder, "--tokens", ids, "--json", *more]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        return dict(json.loads(done.stdout))

    bound = 400_000_000
    free = found("--logits", "free")["statistics"]["peak_memory_bytes"]
    bounded = found("--logits", "bounded", "--max-memory", "400MB")["statistics"]["peak_memory_bytes"]
    assert 0.7 * bound < bounded <= bound < free
    assert (tmp_path / "free").read_bytes() == (tmp_path / "bounded").read_bytes()
    assert found("--compare", folder, "--max-memory", "400MB")["peak_memory_bytes"] <= bound
