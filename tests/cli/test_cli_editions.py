"""Whose prompts `dsv4 encode` and `dsv4 run` write: told from the checkpoint, or by --edition, --mode and --effort."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from tiny import TINY

from dsv4 import cli
from dsv4.convert.synthetic.checkpoint import make_checkpoint
from dsv4.model import encode_messages
from dsv4.model.chat.editions.release_0731 import BEYOND_MAXIMUM, TEXTS
from dsv4.model.chat.tokenizer import load_tokenizer

Capture = pytest.CaptureFixture[str]
HELLO = [{"role": "user", "content": "Hello"}]
FEW = ("--max-new-tokens", "2", "--temperature", "0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint whose encoder is the one of 0731."""
    made = make_checkpoint(tmp_path_factory.mktemp("editions") / "small", geometry=TINY)
    source = f"REASONING_EFFORT_PROMPTS = {TEXTS!r}\nDEFAULT_REASONING_EFFORT = 'low'\n"
    (made / "encoding" / "encoding_dsv4.py").write_text(source, encoding="utf-8")
    return made


@pytest.fixture
def messages(tmp_path: Path) -> str:
    path = tmp_path / "messages.json"
    path.write_text(json.dumps(HELLO))
    return str(path)


def dsv4(capfd: Capture, *arguments: str, code: int = 0) -> tuple[str, str]:
    found = cli.run(arguments)
    captured = capfd.readouterr()
    assert found == code, captured.err
    return captured.out, captured.err


def encoded(capfd: Capture, *arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(dsv4(capfd, "encode", *arguments, "--json")[0])
    return found


def answered(capfd: Capture, *arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(dsv4(capfd, "run", *arguments, *FEW, "--json")[0])
    return found


# --- the edition ---


def test_encode_tells_the_edition_from_the_checkpoint(capfd: Capture, folder: Path, messages: str) -> None:
    found = encoded(capfd, messages, "--mode", "think-max", "--tokenizer", str(folder))
    assert BEYOND_MAXIMUM in found["prompt"]
    assert (found["edition"], found["thinking_mode"], found["reasoning_effort"]) == ("0731", "thinking", "max")
    assert found["edition_reason"] == "told from encoding/encoding_dsv4.py"


def test_verbose_says_what_was_chosen(capfd: Capture, folder: Path, messages: str) -> None:
    plain, nothing = dsv4(capfd, "encode", messages, "--tokenizer", str(folder))
    out, err = dsv4(capfd, "encode", messages, "--tokenizer", str(folder), "-v")
    assert (out, nothing) == (plain, "")
    told = "prompts of edition 0731 (told from encoding/encoding_dsv4.py)\n"
    assert err == told + "chat mode\n"
    _, err = dsv4(capfd, "encode", messages, "--tokenizer", str(folder), "-v", "--mode", "think")
    assert err == told + "thinking mode, effort low\n"
    _, err = dsv4(capfd, "run", str(folder), "Hello", "-v", *FEW)
    assert told + "chat mode\n" in err


def test_the_edition_can_be_said(capfd: Capture, folder: Path, messages: str, tmp_path: Path) -> None:
    found = encoded(capfd, messages, "--edition", "v41", "--tokenizer", str(folder), "--effort", "7")
    assert found["prompt"] == encode_messages(HELLO, "thinking", reasoning_effort=7, edition="v41")
    assert (found["edition"], found["reasoning_effort"]) == ("v41", 7)
    _, err = dsv4(capfd, "encode", messages, "--edition", "v42", code=2)
    assert "unknown edition 'v42', expected preview, 0731, v41" in err


def test_an_assumed_edition_is_said_always(capfd: Capture, messages: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"dspark_block_size": 5}')
    _, err = dsv4(capfd, "encode", messages, "--tokenizer", str(tmp_path))
    assert err.startswith("warning: edition 0731 is assumed") and "--edition" in err
    assert dsv4(capfd, "encode", messages, "--tokenizer", str(tmp_path), "--edition", "0731")[1] == ""


def test_an_unknown_encoder_asks_for_the_edition(capfd: Capture, messages: str, tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path / "small", geometry=TINY)
    (made / "encoding" / "encoding_dsv4.py").write_text("print('hello')\n")
    for command in (["encode", messages, "--tokenizer", str(made)], ["run", str(made), "Hello"]):
        out, err = dsv4(capfd, *command, code=3)
        assert out == "" and "encoding_dsv4.py" in err and "--edition preview" in err
    assert answered(capfd, str(made), "Hello", "--edition", "0731")["answers"][0]["edition"] == "0731"
    assert "edition_reason" not in answered(capfd, str(made), "Hello", "--raw")
    assert "edition_reason" not in answered(capfd, str(made), "--tokens", "0,17")


# --- mode and effort ---


@pytest.mark.parametrize(
    ("options", "mode", "effort"),
    [
        ((), "chat", None),
        (("--mode", "chat"), "chat", None),
        (("--mode", "think"), "thinking", "low"),
        (("--mode", "think-max"), "thinking", "max"),
        (("--effort", "high"), "thinking", "high"),
        (("--mode", "think", "--effort", "high"), "thinking", "high"),
        (("--mode", "chat", "--effort", "high"), "chat", None),
    ],
)
def test_mode_and_effort(
    capfd: Capture, folder: Path, messages: str, options: tuple[str, ...], mode: str, effort: str | None
) -> None:
    found = encoded(capfd, messages, "--edition", "0731", *options)
    assert (found["thinking_mode"], found["reasoning_effort"]) == (mode, effort)
    assert found["prompt"] == encode_messages(HELLO, mode, reasoning_effort=effort, edition="0731")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--effort", "low"), "unknown reasoning effort 'low', expected high, max"),
        (("--effort", "75", "--edition", "0731"), "unknown reasoning effort '75', expected low, high, max"),
        (("--effort", "0", "--edition", "v41"), "or a whole number from 1 to 100"),
        (("--effort", "¹", "--edition", "v41"), "unknown reasoning effort"),
        (("--mode", "chat", "--effort", "medium"), "unknown reasoning effort 'medium'"),
        (("--mode", "think-max", "--effort", "high"), "Leave out --effort"),
    ],
)
def test_an_effort_that_the_edition_lacks(
    capfd: Capture, messages: str, options: tuple[str, ...], problem: str
) -> None:
    out, err = dsv4(capfd, "encode", messages, *options, code=2)
    assert out == "" and problem in err


# --- requests ---


@pytest.mark.parametrize(
    ("request_fields", "options", "mode", "effort"),
    [
        ({"thinking": {"type": "enabled"}}, (), "thinking", "low"),
        ({"reasoning_effort": "xhigh"}, (), "thinking", "high"),
        ({"reasoning_effort": "none"}, (), "chat", None),
        ({"thinking": {"type": "disabled"}, "reasoning_effort": "max"}, (), "chat", None),
        ({"thinking": {"type": "disabled"}}, ("--mode", "think"), "thinking", "low"),
        ({"reasoning_effort": "max"}, ("--mode", "think"), "thinking", "max"),
        ({"reasoning_effort": "max"}, ("--effort", "low"), "thinking", "low"),
        ({"reasoning_effort": "max"}, ("--mode", "chat"), "chat", None),
    ],
)
def test_a_request_says_how_to_answer_and_the_command_line_overrides_it(
    capfd: Capture,
    folder: Path,
    tmp_path: Path,
    request_fields: dict[str, Any],
    options: tuple[str, ...],
    mode: str,
    effort: str | None,
) -> None:
    path = tmp_path / "request.json"
    path.write_text(json.dumps({"messages": HELLO, **request_fields}))
    found = encoded(capfd, str(path), "--tokenizer", str(folder), *options)
    assert (found["thinking_mode"], found["reasoning_effort"]) == (mode, effort)
    assert found["prompt"] == encode_messages(HELLO, mode, reasoning_effort=effort, edition="0731")


def test_an_effort_of_the_api_that_the_edition_lacks(capfd: Capture, tmp_path: Path) -> None:
    path = tmp_path / "request.json"
    path.write_text(json.dumps({"messages": HELLO, "reasoning_effort": 60}))
    assert encoded(capfd, str(path), "--edition", "v41")["reasoning_effort"] == 60
    assert "unknown reasoning effort '60'" in dsv4(capfd, "encode", str(path), code=2)[1]


def test_run_answers_each_request_as_it_asks(capfd: Capture, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps([HELLO, {"messages": HELLO, "thinking": {"type": "enabled"}}, "Hello"]))
    answers = answered(capfd, str(folder), "--file", str(path))["answers"]
    assert [answer["thinking_mode"] for answer in answers] == ["chat", "thinking", "chat"]
    tokenizer = load_tokenizer(folder)
    for answer in answers:
        prompt = encode_messages(HELLO, answer["thinking_mode"], edition="0731")
        assert answer["prompt_tokens"] == len(tokenizer.encode(prompt))
    assert "</think>" in answers[1]["problem"] and "problem" not in answers[0]["message"]


# --- what is said ---


def test_what_is_left_out_is_said(capfd: Capture, tmp_path: Path) -> None:
    path = tmp_path / "request.json"
    path.write_text(json.dumps({"model": "x", "messages": [{**HELLO[0], "name": "Bob"}, {"role": "system"}]}))
    out, err = dsv4(capfd, "encode", str(path))
    assert out == "<｜begin▁of▁sentence｜><｜User｜>Hello"
    lines = err.splitlines()
    assert lines[:2] == ["note: request: not in the prompt: model", "note: message 0 (user): not in the prompt: name"]
    assert all(line.startswith("warning: message 1 (system): ") for line in lines[2:]) and len(lines) == 4
    said = [line.split(": ", 1)[1] for line in lines]
    assert encoded(capfd, str(path))["remarks"] == said


# --- a chat ---


def test_chat_changes_its_effort(capfd: Capture, monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    think = answered(capfd, str(folder), "Hello", "--mode", "think")["answers"][0]["text"]
    monkeypatch.setattr("sys.stdin", io.StringIO("/effort huge\n/effort low\nHello\n/effort\n/exit\n"))
    out, err = dsv4(capfd, "run", str(folder), *FEW)
    assert out == think + "\n"
    assert "unknown reasoning effort 'huge', expected low, high, max" in err
    assert "mode think, effort low" in err and err.count("/effort LEVEL") == 1
