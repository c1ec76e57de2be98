"""The report page: made from the JSON alone, self-contained, and safe whatever the tensors are called."""

import errno
import hashlib
import html
import json
import shutil
import time
from dataclasses import replace
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_converter
from raw_safetensors import Raw, raw, read_folder, write_folder

import dsv4
from dsv4.cli import run
from dsv4.convert.proof.files import Problem
from dsv4.convert.proof.report.page import made_by, render
from dsv4.convert.proof.run import verify
from dsv4.convert.synthetic.checkpoint import make_checkpoint

VOID = {"meta", "br"}


class Page(HTMLParser):
    """Checks that tags balance; collects classes of rectangles, texts and attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data

    def classes(self, tag: str) -> list[str | None]:
        return [attributes.get("class") for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("report")
    make_checkpoint(folder / "source")
    reference_converter.convert(folder / "source", folder / "output", 1, "fp8")
    return folder / "source", folder / "output"


@pytest.fixture(scope="module")
def found(pair: tuple[Path, Path]) -> dict[str, Any]:
    # Through text, as `--json` prints it: the page may need nothing that JSON does not carry.
    return dict(json.loads(json.dumps(verify(*pair, inverse=True).to_json() | {"made_by": made_by("dsv4 verify a b")})))


def test_numbers_agree_with_the_json(found: dict[str, Any]) -> None:
    page = Page(render(found))
    assert found["verdict"] in page.words
    for count in found["counts"].values():
        assert not count or f"{count:,}" in page.words
    blocks = found["statistics"]["fp8_blocks"]
    for span, count in blocks["spans"].items():
        assert f"span 2^{span}: {count} blocks" in page.words
    codes = found["statistics"]["code_use"]
    assert len(codes["source E2M1"]) == 16 and len(codes["output E4M3"]) == 256
    assert f"code 0x08 = -0: {codes['source E2M1'][8]}" in page.words
    for module, uses in found["statistics"]["scale_exponents"]["source"].items():
        for exponent, count in uses.items():
            assert f"{module}: 2^{exponent}: {count} scales" in page.words


def test_codes_are_counted_right(pair: tuple[Path, Path], found: dict[str, Any]) -> None:
    """Small tensors are one band each, so every code is counted."""
    for folder, side, dtype in ((pair[0], "source E2M1", "I8"), (pair[1], "output E4M3", "F8_E4M3")):
        tensors = [t for shard in read_folder(folder).values() for t in shard.values() if t.dtype == dtype]
        codes = [reference_converter.unpacked(t) if dtype == "I8" else t.array() for t in tensors]
        counted = np.bincount(np.concatenate([c.reshape(-1) for c in codes]), minlength=16 if dtype == "I8" else 256)
        assert found["statistics"]["code_use"][side] == counted.tolist()


def test_self_contained(found: dict[str, Any]) -> None:
    text = render(found)
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not {"src", "href", "onload", "onclick"} & attributes.keys()
    assert "http" not in text and "url(" not in text and "@import" not in text
    for rule in ("prefers-color-scheme: dark", "@media print", "max-width: 600px", 'name="viewport"'):
        assert rule in text


def test_every_class_is_styled(found: dict[str, Any]) -> None:
    text = render(found)
    used = {name for kind in Page(text).classes("rect") for name in (kind or "").split()}
    assert used and all(f".{name} " in text for name in used)


def test_the_grid_shows_what_differs_and_what_was_not_checked(pair: tuple[Path, Path], tmp_path: Path) -> None:
    shards = read_folder(pair[1])
    ((shard, tensors),) = shards.items()
    name = "layers.1.ffn.experts.2.w3.weight"
    tensors[name] = tensors[name].like(tensors[name].array() ^ 0x40)
    write_folder(tmp_path, {shard: tensors}, index=False)
    page = Page(verify(pair[0], tmp_path, tensor="layers.1.*").to_html())
    assert "layers.1, expert 2: differs" in page.words
    assert "layers.0, experts 0 to " in page.words and "not checked" in page.words
    assert page.classes("rect").count("differs") == 1
    assert name in page.words and "blocks (0,0)" in page.words
    assert "only tensors named" in page.words


def test_one_checkpoint_alone_has_a_page(pair: tuple[Path, Path]) -> None:
    page = Page(verify(pair[0]).to_html())
    assert "SOUND" in page.words and f"dsv4 verify SOURCE {pair[0]}" in page.words


def test_hostile_names(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>\x1b[2J\u202e"
    for place, value in (("a", 0), ("b", 1)):
        tensors = {name: raw("F32", np.full(1, value, np.float32)), "x": raw("F32", np.zeros(1, np.float32))}
        write_folder(tmp_path / place, {"model.safetensors": tensors}, index=False)
    text = verify(tmp_path / "a", tmp_path / "b").to_html()
    assert "<script" not in text and "\x1b" not in text and "\u202e" not in text
    assert "&lt;script&gt;" in text
    Page(text)


def test_from_the_command_line(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "proof.html"
    assert run(["verify", str(pair[0]), str(pair[1]), "--report", str(file), "--json"]) == 0
    wanted = json.loads(capsys.readouterr().out)
    assert file.read_text() == render(wanted)
    assert run(["verify", str(pair[0]), "--report", str(tmp_path / "no" / "folder.html")]) == 2


def test_where_it_comes_from(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Version, date, command line and what both sides are."""
    file = tmp_path / "proof.html"
    assert run(["verify", str(pair[0]), str(pair[1]), "--report", str(file), "--strict", "--json"]) == 1
    found, page = json.loads(capsys.readouterr().out), Page(file.read_text())
    made = found["made_by"]
    assert made["command"] == f"dsv4 verify {pair[0]} {pair[1]} --strict --report {file} --json"
    assert (
        made["version"] == dsv4.__version__
        and abs(time.time() - datetime.fromisoformat(made["date"]).timestamp()) < 1700
    )
    assert all(text in page.words for text in (made["command"], f"dsv4 {made['version']}, {made['date']}"))
    config = hashlib.sha256((pair[0] / "config.json").read_bytes()).hexdigest()
    assert found["identity"]["source"]["config.json"] == config
    assert found["identity"]["source"].keys() == {"headers", "config.json", "model.safetensors.index.json"}
    for hashes in found["identity"].values():
        assert all(len(text) == 64 and text in page.words for text in hashes.values())


@pytest.mark.slow
def test_headers_have_an_identity(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """A tensor with other bytes has the same header; one with another name, dtype or place does not."""

    def of(folder: Path) -> str:
        return verify(folder).identity["output"]["headers"]

    shards = read_folder(pair[0])
    name, tensors = next((n, some) for n, some in shards.items() if any(t.dtype == "F8_E4M3" for t in some.values()))
    bytes_changed = {n: Raw(t.dtype, t.shape, bytes(len(t.data))) for n, t in tensors.items()}
    renamed = {f"{n}.x": t for n, t in tensors.items()}
    moved = dict(reversed(tensors.items()))
    retyped = {n: Raw("I8" if t.dtype == "F8_E4M3" else t.dtype, t.shape, t.data) for n, t in tensors.items()}
    hashes = []
    for changed in (tensors, bytes_changed, renamed, moved, retyped):
        write_folder(tmp_path, shards | {name: changed})
        hashes.append(of(tmp_path))
    assert hashes[0] == hashes[1] and len(set(hashes)) == 4


def test_every_problem_is_in_the_banner(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Also where values differ, and with what to do about it."""
    output = Path(shutil.copytree(pair[0], tmp_path / "output"))
    for shard, tensors in read_folder(output).items():
        if "norm.weight" in tensors:
            tensors["norm.weight"] = tensors["norm.weight"].like(tensors["norm.weight"].array() ^ 1)
            write_folder(output, {shard: tensors}, index=False)
    config = json.loads((output / "config.json").read_text())
    (output / "config.json").write_text(json.dumps(config | {"hidden_size": 7, "num_attention_heads": 3}))
    result = verify(pair[0], output)
    text = result.to_html()
    banner = text[text.index('<div class="verdict bad">') : text.index("<dl>")]
    problems = [p.text for p in result.problems if p.severity != "note"]
    assert len(problems) == 2 and all(problem in html.unescape(banner) for problem in problems)
    assert "it is another model" in text and "Mend the files" in text
    many = [Problem("config", "output", f"complaint {i}") for i in range(40)]
    text = replace(result, problems=many).to_html()
    banner = text[text.index('<div class="verdict bad">') : text.index("<dl>")]
    assert "complaint 9<" in banner and "complaint 10<" not in banner and "and 30 more" in banner
    assert "complaint 39<" in text


@pytest.mark.parametrize("json_mode", [False, True])
@pytest.mark.fast_cases(1)
def test_a_full_disk_costs_no_verdict(
    pair: tuple[Path, Path], json_mode: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(["verify", str(pair[0]), str(pair[1]), "--report", "/dev/full", *(["--json"] if json_mode else [])])
    out, err = capsys.readouterr()
    assert code == 4 and "/dev/full: No space left on device" in err
    verdict = json.loads(out)["verdict"] if json_mode else out.splitlines()[-1]
    assert verdict.startswith("IDENTICAL: ")


def test_an_older_page_survives_a_full_disk(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "proof.html"
    page.write_text("the older page")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    assert run(["verify", str(pair[0]), str(pair[1]), "--report", str(page)]) == 4
    out, err = capsys.readouterr()
    assert "IDENTICAL" in out and f"{page}: No space left on device" in err
    assert page.read_text() == "the older page" and list(tmp_path.iterdir()) == [page]
