"""Names made to act on a terminal, through every command: paths, files, tensors, config values, what hubs answer.

Nothing of them may reach stdout or stderr raw, and a newline in a name may not begin a line of its own, which could
pass for a line of dsv4. Objects printed with `--json` still hold the name itself.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile import EMBED, GEOMETRY, config, good_checkpoint, header, index, written

from dsv4 import cli, output
from dsv4.convert.synthetic.checkpoint import make_checkpoint
from dsv4.errors import InputError

# Clears the screen, reverses what follows, starts a line of its own, a C1 control character, a wide space.
TEXT = "a\x1b[2J\u202eb\nerror: FORGED\r\tc\x9b\u2066\u3000"
NAME = f"{TEXT}\udcff"  # as Python spells a byte of a path that is not UTF-8
COMMANDS = sorted(command.callback.__name__ for command in cli.app.registered_commands if command.callback)


def check(text: str) -> None:
    raw = {c for c in text if not c.isprintable() and c != "\n"}
    assert not raw, f"raw characters were printed: {raw!r}"
    assert not any(line.startswith("error: FORGED") for line in text.splitlines()), text
    assert "Traceback" not in text and "this is a bug" not in text, text


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = cli.run(list(map(str, arguments)))
    out, err = capsys.readouterr()
    check(out)
    check(err)
    if "--json" in arguments:
        json.loads(out)
    return code, out, err


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a hostile name."""
    folder = tmp_path_factory.mktemp("place") / NAME
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def good(place: Path) -> Path:
    folder = make_checkpoint(place / "good", geometry=GEOMETRY)
    (folder / f"{NAME}.txt").write_text("a side file")
    return folder


@pytest.mark.parametrize("json_mode", [[], ["--json"]], ids=["human", "json"])
@pytest.mark.fast_cases(1)
def test_every_command_in_a_folder_with_a_hostile_name(
    json_mode: list[str], good: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out, report, messages = tmp_path / NAME, tmp_path / f"{NAME}.html", tmp_path / f"{NAME}.json"
    messages.write_text(json.dumps([{"role": "user", "content": "Hi", TEXT: 1}]))
    monkeypatch.setenv("HF_HUB_CACHE", str(place))
    lines: list[tuple[int, list[str | Path]]] = [
        (0, ["inspect", good]),
        (0, ["inspect", good, "--tensors"]),
        (0, ["inspect", good, "--tensor", "embed.weight"]),
        (3, ["inspect", good, "--tensor", NAME]),
        (0, ["convert", good, out, "--dry-run"]),
        (0, ["convert", good, out]),
        (0, ["convert", good, out]),
        (2, ["convert", good, out, "--to", "bf16"]),
        (2, ["convert", good, good]),
        (2, ["convert", good, tmp_path / "out", "--part", NAME]),
        (0, ["verify", good, out, "--report", report]),
        (2, ["verify", good, out, "--sample", NAME]),
        (1, ["doctor", good, "--for", "vllm"]),
        (1, ["doctor", out, "--for", "transformers"]),
        (0, ["run", good, "--tokens", "1,2", "--logits", tmp_path / f"{NAME}.logits"]),
        (0, ["run", good, "--tokens", "1,2", "--compare", out, "--report", report]),
        (3, ["run", good, "--tokens", NAME]),
        (3, ["run", good, "-p", "x", "--device", NAME]),
        (0, ["encode", messages]),
        (3, ["encode", tmp_path / NAME / "missing"]),
        (2, ["download", NAME, tmp_path / "download"]),
        (2, ["download", f"hf:{NAME}/{NAME}", tmp_path / "download"]),
        (0, ["env"]),
        (2, ["demo", place]),
    ]
    used = {str(arguments[0]) for _, arguments in lines}
    assert used == set(COMMANDS), "a command is missing here"
    for expected, arguments in lines:
        more = [] if arguments[0] in ("demo", "encode", "download") and expected == 2 else json_mode
        code, printed, words = run(capsys, *arguments, *more)
        assert code == expected, (arguments, printed, words)
        for page in tmp_path.glob("*.html"):
            check(page.read_text(encoding="utf-8"))
            page.unlink()
        shutil.rmtree(tmp_path / "download", ignore_errors=True)


def renamed(name: str) -> Callable[[Path], None]:
    """Call the embedding so, in its shard and in the index."""

    def damage(folder: Path) -> None:
        header(lambda parsed: {name: parsed["embed.weight"]})(folder)
        index(lambda parsed: parsed["weight_map"].update({name: parsed["weight_map"].pop("embed.weight")}))(folder)

    return damage


def called(folder: Path) -> None:
    """A shard with a hostile name, in the index too."""
    (folder / EMBED).rename(folder / f"{TEXT}.safetensors")
    index(lambda parsed: parsed["weight_map"].update({"embed.weight": f"{TEXT}.safetensors"}))(folder)


def values(folder: Path) -> None:
    """Hostile values wherever a config may hold a text, and a key."""
    names = (
        "model_type",
        "expert_dtype",
        "scale_fmt",
        "torch_dtype",
        "hidden_act",
        "scoring_func",
        "topk_method",
        TEXT,
    )
    config(lambda parsed: parsed.update(dict.fromkeys(names, TEXT)))(folder)
    config(lambda parsed: parsed.update(architectures=[TEXT], rope_scaling={"type": TEXT}, eos_token_id=TEXT))(folder)
    config(lambda parsed: parsed["quantization_config"].update(quant_method=TEXT, fmt=TEXT, scale_fmt=TEXT))(folder)


def sizes(folder: Path) -> None:
    config(lambda parsed: parsed["quantization_config"].update(weight_block_size=[TEXT, TEXT]))(folder)
    config(lambda parsed: parsed.update(hidden_size=TEXT, compress_ratios=TEXT))(folder)


DAMAGES = {
    "tensor": renamed(TEXT),
    "tensor_with_surrogate": renamed("\ud800x"),
    "tensor_in_index": index(lambda parsed: parsed["weight_map"].update({TEXT: EMBED})),
    "shard": called,
    "shard_in_index": index(lambda parsed: parsed["weight_map"].update({"embed.weight": f"{TEXT}.safetensors"})),
    "index_key": index(lambda parsed: parsed.update({TEXT: 1, "metadata": {"total_size": TEXT}})),
    "dtype": header(lambda parsed: parsed["embed.weight"].update(dtype=TEXT)),
    "config": values,
    "config_sizes": sizes,
    "stranger": lambda folder: (folder / f"{NAME}.safetensors").write_bytes((folder / EMBED).read_bytes()),
    "manifest": written("dsv4.json", json.dumps({"format": 1, "files": {TEXT: {}}, "tensors": {TEXT: {}}}).encode()),
    "lfs": lambda folder: (folder / f"{TEXT}.py").write_text("version https://git-lfs.github.com/spec/v1\noid x\n"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_what_a_checkpoint_names(
    damage: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = good_checkpoint(tmp_path / "good"), good_checkpoint(tmp_path / "bad")
    damage(bad)
    printed = ""
    for arguments in (
        ["inspect", bad], ["inspect", bad, "--json"], ["inspect", bad, "--tensors"],
        ["convert", bad, tmp_path / "out"], ["convert", bad, tmp_path / "out", "--json"],
        ["verify", good, bad, "-v", "--report", tmp_path / "page.html"], ["verify", bad, "--json"],
        ["doctor", bad, "--for", "vllm"], ["doctor", bad, "--for", "reference", "--json"],
        ["run", bad, "--tokens", "1", "--logits", tmp_path / "logits"], ["run", bad, "-p", "Hi", "--json"],
    ):  # fmt: skip
        code, out, err = run(capsys, *arguments)
        assert code in (0, 1, 3), (arguments, err)
        printed += out + err
    check((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "FORGED" in printed or "ud800x" in printed, "the name was shown nowhere: nothing was tested"


def test_json_holds_the_name_itself(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "inspect", good, "--json")
    assert json.loads(out)["checkpoint"] == str(good)


def test_an_object_stays_json_where_the_terminal_knows_ascii_only() -> None:
    value = {TEXT: ["é", "🦆", "\udcff"]}
    for encoding in ("ascii", "latin-1", "utf-8", "UTF8", None):
        text = output._json_text(value, encoding)
        check(text)
        assert json.loads(text) == value
        text.encode(encoding or "utf-8")


@pytest.mark.parametrize("call", ["text", "say", "hint", "warn", "detail", "data"])
def test_one_call_is_one_line(call: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if call == "data":  # an answer has lines; on a terminal nothing else of it acts
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    getattr(output.Output(verbose=True), call)(NAME)
    printed = "".join(capsys.readouterr())
    assert printed.count("\n") == (2 if call == "data" else 1)
    assert all(c.isprintable() or c in "\n" or (c == "\t" and call == "data") for c in printed)


def test_tables_are_aligned_by_what_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    output.Output().section(TEXT, [[TEXT, "1"], ["b", "2"]])
    _, first, second = capsys.readouterr().out.splitlines()
    assert len(first) == len(second)


def test_a_bar_is_called_by_a_hostile_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert output.Output().progress(10, TEXT).what.isprintable()


def test_python_sees_printable_errors() -> None:
    error = InputError(f"{TEXT}: wrong", f"mend {TEXT}", [TEXT, "second"])
    first, detail, second, hint = str(error).splitlines()
    assert first.isprintable() and error.hint.isprintable() and hint == f"  {error.hint}"
    assert detail.startswith(r"  a\x1b[2J") and detail.isprintable() and second == "  second"


def test_a_hint_given_later_is_printed_printable(capsys: pytest.CaptureFixture[str]) -> None:
    error = InputError("wrong")
    error.hint = TEXT
    output.Output(speaker=TEXT).error(error)
    check(capsys.readouterr().err)


def test_a_traceback_is_printable(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DSV4_DEBUG", "1")
    monkeypatch.setattr("dsv4.commands.env._system", lambda found: os.stat(NAME))
    assert cli.run(["env"]) == 3
    err = capsys.readouterr().err
    assert "Traceback" in err
    check(err.replace("Traceback", ""))
