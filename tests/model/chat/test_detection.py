"""The edition of a checkpoint, told from its encoder's literals, its config and its name; nothing of it is run."""

import json
from pathlib import Path
from typing import Any

import pytest

from dsv4.convert.synthetic import encoder
from dsv4.convert.synthetic.checkpoint import DSpark, Geometry, make_checkpoint
from dsv4.errors import InputError
from dsv4.model.chat.detection import module_literals, prompt_edition_of
from dsv4.model.chat.editions.preview import ABSOLUTE_MAXIMUM
from dsv4.model.chat.editions.release_0731 import BEYOND_MAXIMUM
from dsv4.model.chat.editions.v41 import LEVELS

V4, V41 = "encoding_dsv4.py", "encoding.py"
TEXTS = {"low": "", "high": ABSOLUTE_MAXIMUM, "max": BEYOND_MAXIMUM}
PREVIEW_FILE = f"REASONING_EFFORT_MAX = {ABSOLUTE_MAXIMUM!r}\n"
FILE_0731 = f'DEFAULT_REASONING_EFFORT: str = "low"\nREASONING_EFFORT_PROMPTS: dict = {TEXTS!r}\n'
FILE_V41 = f'DEFAULT_REASONING_EFFORT = "high"\nREASONING_EFFORT_MAPPINGS = {LEVELS!r}\n'
DSPARK = {"model_type": "deepseek_v4", "dspark_block_size": 5}


def folder(
    path: Path, encoders: dict[str, str] | None = None, config: dict[str, Any] | None = None, name: str = "checkpoint"
) -> Path:
    path = path / name
    path.mkdir(parents=True)
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    for file, text in (encoders or {}).items():
        (path / "encoding").mkdir(exist_ok=True)
        (path / "encoding" / file).write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("encoders", "config", "edition"),
    [
        ({V4: PREVIEW_FILE}, None, "preview"),
        ({V4: PREVIEW_FILE}, {"model_type": "deepseek_v4"}, "preview"),
        ({V4: PREVIEW_FILE}, DSPARK, "preview"),
        ({V4: FILE_0731}, {"model_type": "deepseek_v4"}, "0731"),
        ({V4: FILE_0731 + PREVIEW_FILE}, DSPARK, "0731"),
        ({V41: FILE_V41}, {"model_type": "deepseek_v41"}, "v41"),
        ({V41: FILE_V41}, None, "v41"),
        (None, {"model_type": "deepseek_v41"}, "v41"),
        (None, {"engram_layer_ids": [1, 14]}, "v41"),
    ],
)
def test_what_is_certain_is_told_without_a_warning(
    tmp_path: Path, encoders: dict[str, str] | None, config: dict[str, Any] | None, edition: str
) -> None:
    found = prompt_edition_of(folder(tmp_path, encoders, config))
    assert (found.name, found.warnings) == (edition, ())
    assert "told from" in found.reason


@pytest.mark.parametrize(
    ("name", "config", "edition"),
    [
        ("x", None, "preview"),
        ("DeepSeek-V4-Flash", {"model_type": "deepseek_v4"}, "preview"),
        ("DeepSeek-V4-Flash-0731", DSPARK, "0731"),
        ("DeepSeek-V4-Pro-0813-FP8", DSPARK, "0731"),
        ("DeepSeek-V4-Flash-0731-FP8-DSpark", DSPARK, "0731"),
        ("DeepSeek-V4-Flash-DSpark", DSPARK, "preview"),
        ("models--deepseek-ai--DeepSeek-V4-Flash-DSpark/snapshots/60d8d7", DSPARK, "preview"),
        ("my-dspark-vision", {**DSPARK, "vision_n_layers": 32}, "0731"),
        ("anything", DSPARK, "0731"),
        ("ranks-dspark", {"dspark_block_size": 5}, "preview"),
    ],
)
def test_what_is_assumed_is_said(tmp_path: Path, name: str, config: dict[str, Any] | None, edition: str) -> None:
    found = prompt_edition_of(folder(tmp_path, None, config, name))
    assert found.name == edition
    assert found.reason.startswith("assumed: ")
    assert len(found.warnings) == 1 and "--edition" in found.warnings[0]


@pytest.mark.parametrize(
    "source",
    [
        "",
        '"""Nothing."""\n',
        "def f(:\n",
        "\0",
        'DEFAULT_REASONING_EFFORT = "high"\n' + FILE_0731.split("\n")[1],
        'DEFAULT_REASONING_EFFORT = "low"\nREASONING_EFFORT_PROMPTS = {"low": "", "high": ""}\n',
        'DEFAULT_REASONING_EFFORT = "low"\nREASONING_EFFORT_PROMPTS = prompts()\n',
        "if True:\n    REASONING_EFFORT_MAX = ''\n",
        "(" * 10_000,
        "x = " + "-" * 100_000 + "1",
        "# " + "x" * 1_000_000 + "\n" + PREVIEW_FILE,
    ],
    ids=range(11),
)
def test_an_encoder_that_nobody_knows_asks_for_the_edition(tmp_path: Path, source: str) -> None:
    path = folder(tmp_path, {V4: source}, {"model_type": "deepseek_v4"})
    with pytest.raises(InputError, match=r"encoding_dsv4\.py") as caught:
        prompt_edition_of(path)
    assert "--edition" in caught.value.hint


def test_an_encoder_that_is_no_utf8_asks_for_the_edition(tmp_path: Path) -> None:
    path = folder(tmp_path, {V4: ""})
    (path / "encoding" / V4).write_bytes(b"# \xe9\n" + PREVIEW_FILE.encode())
    with pytest.raises(InputError, match="does not tell the edition"):
        prompt_edition_of(path)


def test_an_encoder_is_never_run(tmp_path: Path) -> None:
    trap = tmp_path / "run"
    source = f"open({str(trap)!r}, 'w').close()\nREASONING_EFFORT_MAX = [open({str(trap)!r}, 'w')]\n"
    assert prompt_edition_of(folder(tmp_path, {V4: source})).name == "preview"
    assert not trap.exists()


@pytest.mark.parametrize(
    ("file", "source", "name"),
    [
        (V4, PREVIEW_FILE.replace("shortcuts", "detours"), "REASONING_EFFORT_MAX"),
        (V4, FILE_0731.replace("relentless", "friendly"), "REASONING_EFFORT_PROMPTS"),
        (V4, FILE_0731.replace("'low': ''", "'low': 'Be quick.'"), "REASONING_EFFORT_PROMPTS"),
        (V4, FILE_0731.replace("'low': ''", "'low': '', 'medium': ''"), "REASONING_EFFORT_PROMPTS"),
        (V41, FILE_V41.replace("75", "80"), "REASONING_EFFORT_MAPPINGS"),
        (V41, FILE_V41.split("\n")[0], "REASONING_EFFORT_MAPPINGS"),
    ],
)
def test_a_changed_encoder_is_said(tmp_path: Path, file: str, source: str, name: str) -> None:
    (warning,) = prompt_edition_of(folder(tmp_path, {file: source})).warnings
    assert file in warning and name in warning


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("REASONING_EFFORT_MAX = 'Think ' + 'hard'", "REASONING_EFFORT_MAX"),
        ("REASONING_EFFORT_MAX: str = open('/etc/passwd').read()", "REASONING_EFFORT_MAX"),
        (FILE_V41.split("\n")[0] + "\nREASONING_EFFORT_MAPPINGS = dict(low=50, high=75, max=100)", "MAPPINGS"),
    ],
)
def test_a_value_that_is_no_literal_is_said_and_not_executed(tmp_path: Path, source: str, name: str) -> None:
    file = V41 if "MAPPINGS" in source else V4
    (warning,) = prompt_edition_of(folder(tmp_path, {file: source})).warnings
    assert file in warning and name in warning and "not executed" in warning


def test_texts_are_compared_without_the_white_space_around(tmp_path: Path) -> None:
    assert prompt_edition_of(folder(tmp_path, {V4: PREVIEW_FILE.replace("\\n\\n'", "'")})).warnings == ()


@pytest.mark.parametrize(
    ("encoders", "model_type"), [({V41: FILE_V41}, "deepseek_v4"), ({V4: PREVIEW_FILE}, "deepseek_v41")]
)
def test_signs_that_contradict_each_other_are_said(tmp_path: Path, encoders: dict[str, str], model_type: str) -> None:
    found = prompt_edition_of(folder(tmp_path, encoders, {"model_type": model_type}))
    assert found.name == "v41"
    assert len(found.warnings) == 1 and next(iter(encoders)) in found.warnings[0] and "config.json" in found.warnings[0]


@pytest.mark.parametrize("config", ["{", "[]", '{"a": NaN}'])
def test_a_config_that_cannot_be_read_is_an_error(tmp_path: Path, config: str) -> None:
    path = folder(tmp_path)
    (path / "config.json").write_text(config)
    with pytest.raises(InputError, match=r"config\.json"):
        prompt_edition_of(path)


def test_a_small_checkpoint_speaks_as_the_preview_does(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "small", geometry=Geometry(compress_ratios=(0, 0), n_routed_experts=2))
    found = prompt_edition_of(path)
    assert (found.name, found.warnings) == ("preview", ())
    assert module_literals(encoder.PREVIEW)["REASONING_EFFORT_MAX"] == ABSOLUTE_MAXIMUM


def test_a_small_checkpoint_with_draft_stages_speaks_as_0731_does(tmp_path: Path) -> None:
    ratios, stages = (0, 0, 0, 0), DSpark(target_layer_ids=(0,))
    path = make_checkpoint(tmp_path / "small", geometry=Geometry(compress_ratios=ratios, dspark=stages))
    found = prompt_edition_of(path)
    assert (found.name, found.warnings) == ("0731", ())
    assert module_literals(encoder.RELEASE_0731)["REASONING_EFFORT_PROMPTS"] == TEXTS
