"""docs/editions.md against the program: each cell of its table is what the commands do with such a checkpoint."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from exact_values import dsv4
from images import IMAGE

from dsv4.convert.checkpoint.editions import table
from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.synthetic.checkpoint import EDITIONS, Geometry, make_checkpoint
from dsv4.errors import InputError
from dsv4.model.chat.detection import prompt_edition_of
from dsv4.model.weights import draft_stages

PAGE = (Path(__file__).parents[2] / "docs" / "editions.md").read_text(encoding="utf-8")
TABLE = [[cell.strip() for cell in row.strip("|").split("|")] for row in re.findall(r"^\|.*\|$", PAGE, re.MULTILINE)]
COLUMNS, ROWS = TABLE[0][2:], {row[0]: row[1:] for row in TABLE[2:]}


def base(folder: Path) -> Path:
    return make_checkpoint(folder, geometry=Geometry(compress_ratios=(0, 4, 0)), experts="fp8")


def unknown(folder: Path) -> Path:
    make_checkpoint(folder, geometry=Geometry(compress_ratios=(0, 4, 0)))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"model_type": "deepseek_v42", "architectures": ["DeepseekV42ForCausalLM"]})
    )
    return folder


MAKERS: dict[str, Callable[[Path], Path]] = {
    "V4-Flash-Base, V4-Pro-Base": base,
    "an edition without a row, `deepseek_v4…`": unknown,
}


def converts(folder: Path) -> str:
    targets = ["fp8", "bf16"]
    for to in targets:
        out = folder.parent / to
        assert dsv4("convert", folder, out, "--to", to)[0] == 0
        assert dsv4("verify", folder, out)[0] == 0
    assert dsv4("convert", folder.parent / "fp8", folder.parent / "fp4", "--to", "fp4", "--on-inexact", "round")[0] == 0
    return "equal"


def ranked(folder: Path) -> str:
    out = folder.parent / "mp"
    assert dsv4("convert", folder, out, "--to", "same", "--layout", "mp", "--model-parallel", 2)[0] == 0
    assert dsv4("verify", folder, out)[0] == 0
    return "equal"


def inspected(folder: Path) -> str:
    code, out, _ = dsv4("inspect", folder, "--json")
    facts = json.loads(out)
    assert code == 0 and not [f for f in facts["findings"] if f["level"] == "problem"]
    checked = not any("are not checked" in finding["text"] for finding in facts["findings"])
    assert checked == (facts["kv_cache_bytes"] is not None)
    return "checked" if checked else "facts"


def judged(folder: Path) -> str:
    """By the rules of two engines: what they say of the architecture."""
    found = {}
    for engine in ("vllm", "sglang"):
        code, out, _ = dsv4("doctor", folder, "--for", engine, "--json")
        (status, *_) = [check["status"] for check in json.loads(out)["checks"] if check["rule"] == "architecture"]
        assert (code == 1) >= (status == "unknown")
        found[engine] = "checked" if status == "ok" else str(status)
    return found["vllm"] if len(set(found.values())) == 1 else f"{found['vllm']}; sglang {found['sglang']}"


def runs(folder: Path) -> str:
    code, out, err = dsv4("run", folder, "--tokens", "4,5,6,7", "--max-new-tokens", "1", "--temperature", "0")
    if code == 3:
        assert "model_type is 'deepseek_v42', this engine runs" in err
        return "refused"
    assert code == 0 and re.fullmatch(r"\d+\n", out), err
    return "text" if '"vision.' in (folder / "model.safetensors.index.json").read_text() else "yes"


def prompts(folder: Path) -> str:
    told = prompt_edition_of(folder)
    assert told.warnings == ()
    return told.name


def drafts(folder: Path) -> str:
    """By which stages `--draft` drafts; the tokens are those without."""
    options = ("--tokens", "4,5,6,7", "--max-new-tokens", "6", "--temperature", "0")
    (code, plain, _), (drafting, out, err) = (dsv4("run", folder, *options, *more) for more in ((), ("--draft",)))
    if code == drafting == 3:
        return "refused"
    assert code == drafting == 0 and out == plain, err
    return {"mtp": "MTP", "dspark": "DSpark"}[draft_stages(Checkpoint.open(folder).tensors).kind]


def images(folder: Path) -> str:
    messages = folder.parent / "messages.json"
    messages.write_text(json.dumps(IMAGE))
    code, _, err = dsv4("run", folder, "--messages", messages, "--max-new-tokens", "1")
    return "refused" if code == 3 and "images cannot be encoded" in err else "–"


MEASURES: dict[str, Callable[[Path], str]] = {
    "convert, verify": converts,
    "rank files": ranked,
    "inspect": inspected,
    "doctor": judged,
    "prompts": prompts,
    "drafts": drafts,
    "run": runs,
    "images": images,
}


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ROWS)
def test_every_cell(checkpoint: str, tmp_path: Path) -> None:
    name, *cells = ROWS[checkpoint]
    make = MAKERS.get(checkpoint)
    folder = tmp_path / "source"
    if make is None:
        make_checkpoint(folder, geometry=EDITIONS[name.strip("`")])
    else:
        make(folder)
    found = {column: MEASURES[column](folder) for column in COLUMNS}
    assert found == dict(zip(COLUMNS, cells, strict=True))


def test_every_edition_that_the_demo_makes_is_in_the_table() -> None:
    assert {cells[0].strip("`") for cells in ROWS.values() if cells[0]} == set(EDITIONS)


def test_the_demo_names_its_editions(tmp_path: Path) -> None:
    code, _, err = dsv4("demo", tmp_path / "demo", "--edition", "v9")
    assert code == 2 and f"It has {', '.join(EDITIONS)}." in err and not (tmp_path / "demo").exists()


@pytest.mark.parametrize("later", [False, True])
def test_a_later_edition_may_have_the_tensors_of_an_earlier_one(monkeypatch: pytest.MonkeyPatch, later: bool) -> None:
    """Its row lists them among its own signs; a tensor of the later one alone is refused under the earlier config."""
    signs = re.compile(f"{table.V4_SIGNS.pattern}|.*\\.sponge")
    row = table.Edition("V4.2", ("deepseek_v42",), signs=signs, architecture="v42")
    monkeypatch.setattr(table, "EDITIONS", (row, *table.EDITIONS))
    config = {"model_type": "deepseek_v42" if later else "deepseek_v4"}
    table.check_signs(config, ["hc_head_fn", "layers.0.attn.compressor.ape"])
    if later:
        table.check_signs(config, ["layers.0.sponge"])
    else:
        with pytest.raises(InputError, match=r"config.json describes V4 .*'layers.0.sponge' is a tensor of V4.2"):
            table.check_signs(config, ["layers.0.sponge"])
    with pytest.raises(InputError, match=r"is a tensor of V4\.1"):
        table.check_signs(config, ["layers.1.engram.q_weight"])


@pytest.mark.slow
@pytest.mark.parametrize("edition", EDITIONS)
def test_the_demo_of_each_edition(edition: str, tmp_path: Path) -> None:
    """Inspected without a finding, converted, proved, and run with equal bits."""
    code, out, err = dsv4("demo", tmp_path / "demo", "--edition", edition)
    assert code == 0, err
    assert "Nothing looks wrong." in out and "IDENTICAL" in out and "BIT-EQUAL" in out
