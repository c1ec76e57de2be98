"""`dsv4 encode` from the command line."""

import json
from pathlib import Path

import pytest

from dsv4 import cli
from dsv4.convert.synthetic.checkpoint import Geometry, make_checkpoint
from dsv4.model.chat.encoding import encode_messages

HELLO = [{"role": "system", "content": "Kürze!"}, {"role": "user", "content": "Hello"}]


@pytest.fixture
def messages(tmp_path: Path) -> str:
    path = tmp_path / "messages.json"
    path.write_text(json.dumps(HELLO), encoding="utf-8")
    return str(path)


def run(capfd: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    assert cli.run(["encode", *arguments]) == code
    captured = capfd.readouterr()
    return captured.out, captured.err


@pytest.mark.parametrize(
    ("mode", "thinking_mode", "effort"),
    [("chat", "chat", None), ("think", "thinking", None), ("think-max", "thinking", "max")],
)
def test_the_prompt_byte_for_byte(
    capfd: pytest.CaptureFixture[str], messages: str, mode: str, thinking_mode: str, effort: str | None
) -> None:
    out, err = run(capfd, messages, "--mode", mode)
    assert out == encode_messages(HELLO, thinking_mode=thinking_mode, reasoning_effort=effort)
    assert err == ""


def test_chat_is_the_default_and_bos_can_be_left_out(capfd: pytest.CaptureFixture[str], messages: str) -> None:
    assert run(capfd, messages, "--no-bos")[0] == "Kürze!<｜User｜>Hello<｜Assistant｜></think>"


def test_json(capfd: pytest.CaptureFixture[str], messages: str) -> None:
    out, _ = run(capfd, messages, "--json")
    assert json.loads(out) == {
        "prompt": encode_messages(HELLO, thinking_mode="chat"),
        "edition": "preview",
        "edition_reason": "no checkpoint is named",
        "thinking_mode": "chat",
        "reasoning_effort": None,
        "remarks": [],
    }


def test_ids(capfd: pytest.CaptureFixture[str], messages: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "small", geometry=Geometry(compress_ratios=(0, 0), n_routed_experts=2))
    out, _ = run(capfd, messages, "--ids", "--tokenizer", str(folder))
    ids = [int(number) for number in out.split(",")]
    assert ids[0] == 0
    out, _ = run(capfd, messages, "--ids", "--tokenizer", str(folder), "--json")
    assert json.loads(out)["ids"] == ids


def test_a_request_with_tools(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    schema = {"type": "json_object"}
    request = {"messages": HELLO, "tools": tools, "response_format": schema}
    path = tmp_path / "request.json"
    path.write_text(json.dumps(request))
    moved = [{**HELLO[0], "tools": tools, "response_format": schema}, HELLO[1]]
    assert run(capfd, str(path))[0] == encode_messages(moved, thinking_mode="chat")
    path.write_text(json.dumps({"messages": HELLO[1:], "tools": tools}))
    in_front = [{"role": "system", "tools": tools}, HELLO[1]]
    assert run(capfd, str(path))[0] == encode_messages(in_front, thinking_mode="chat")


def test_context_and_kept_thinking(capfd: pytest.CaptureFixture[str], tmp_path: Path, messages: str) -> None:
    answered = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "r"}]
    path = tmp_path / "more.json"
    path.write_text(json.dumps([*answered, {"role": "user", "content": "c"}]))
    out, _ = run(capfd, str(path), "--mode", "think", "--keep-thinking")
    assert "<think>r</think>b" in out
    assert run(capfd, messages, "--context", str(path))[0].startswith("Kürze!")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "not valid JSON"),
        ('{"role": "user"}', "expected a JSON list of messages"),
        ("[1]", "expected a JSON list of messages"),
        ('[{"role": "critic"}]', "unknown role 'critic'"),
        ("[" * 100_000, "not valid JSON: maximum recursion"),
    ],
)
def test_bad_files_exit_3(capfd: pytest.CaptureFixture[str], tmp_path: Path, content: str, problem: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    out, err = run(capfd, str(path), code=3)
    assert out == "" and problem in err


def test_other_errors(capfd: pytest.CaptureFixture[str], tmp_path: Path, messages: str) -> None:
    assert "missing.json" in run(capfd, str(tmp_path / "missing.json"), code=3)[1]
    (tmp_path / "latin.json").write_bytes(b'[{"role": "user", "content": "\xe9"}]')
    assert "not UTF-8" in run(capfd, str(tmp_path / "latin.json"), code=3)[1]
    assert "--tokenizer" in run(capfd, messages, "--ids", code=2)[1]
    assert "tokenizer.json does not exist" in run(capfd, messages, "--ids", "--tokenizer", str(tmp_path), code=3)[1]
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "is not a tokenizer" in run(capfd, messages, "--ids", "--tokenizer", str(tmp_path), code=3)[1]
    (tmp_path / "half.json").write_text('[{"role": "user", "content": "\\ud800"}]')
    folder = make_checkpoint(tmp_path / "small", geometry=Geometry(compress_ratios=(0, 0), n_routed_experts=2))
    assert "half a character" in run(capfd, str(tmp_path / "half.json"), "--ids", "--tokenizer", str(folder), code=3)[1]
