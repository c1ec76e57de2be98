"""The report page: made from the JSON alone, self-contained, and safe whatever the tensors are called."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_converter
from raw_safetensors import raw, read_folder, write_folder

from dsv4.cli import run
from dsv4.convert.proof.report.page import render
from dsv4.convert.proof.run import verify
from dsv4.convert.synthetic.checkpoint import make_checkpoint

VOID = {"meta", "br", "path", "rect"}


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
        if tag not in VOID or tag == "rect":
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
    return dict(json.loads(json.dumps(verify(*pair, inverse=True).to_json())))


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
    result = verify(pair[0], tmp_path, tensor="layers.1.*").to_json()
    page = Page(render(result))
    assert "layers.1, expert 2: differs" in page.words
    assert "layers.0, experts 0 to " in page.words and "not checked" in page.words
    assert page.classes("rect").count("differs") == 1
    assert name in page.words and "blocks (0,0)" in page.words
    assert "only tensors named" in page.words


def test_one_checkpoint_alone_has_a_page(pair: tuple[Path, Path]) -> None:
    page = Page(render(verify(pair[0]).to_json()))
    assert "SOUND" in page.words


def test_hostile_names(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>\x1b[2J\u202e"
    for place, value in (("a", 0), ("b", 1)):
        tensors = {name: raw("F32", np.full(1, value, np.float32)), "x": raw("F32", np.zeros(1, np.float32))}
        write_folder(tmp_path / place, {"model.safetensors": tensors}, index=False)
    text = render(verify(tmp_path / "a", tmp_path / "b").to_json())
    assert "<script" not in text and "\x1b" not in text and "\u202e" not in text
    assert "&lt;script&gt;" in text
    Page(text)


def test_from_the_command_line(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "proof.html"
    assert run(["verify", str(pair[0]), str(pair[1]), "--report", str(file), "--json"]) == 0
    wanted = json.loads(capsys.readouterr().out)
    assert re.sub(r"\s+", " ", file.read_text()) == re.sub(r"\s+", " ", render(wanted))
    assert run(["verify", str(pair[0]), "--report", str(tmp_path / "no" / "folder.html")]) == 3
