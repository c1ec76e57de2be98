"""The next edition takes a row and three files, docs/editions.md says: one is added so, and every command knows it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dsv4

ROW = """    Edition(
        "V4.2",
        ("deepseek_v42",),
        blocks=ENGRAM_BLOCKS,
        quantization=v41.QUANTIZATION,
        tensors=v41.v41_tensors,
        optional=OPTIONAL,
        missing_keys=v41.missing_keys,
        signs=V41_SIGNS,
        kv_cache=v41.v41_cache,
        architecture="v42",
        encoder="encoding/encoding_v42.py",
        protocol="v42",
    ),
"""
FILES = {
    "model/architectures/v42.py": """
from .stack import Architecture
from .v41 import V41
from .v41_config import V41Config

class V42Config(V41Config):
    FIXED = {**V41Config.FIXED, "model_type": "deepseek_v42"}

ARCHITECTURE = Architecture(V42Config.from_json, V41)
""",
    "model/chat/editions/v42.py": """
from dataclasses import replace
from .v41 import PROTOCOL as V41

SIGNS = replace(
    V41.signs,
    encoder="encoding/encoding_v42.py",
    literals={},
    is_config=lambda config: config.get("model_type") == "deepseek_v42",
)
PROTOCOL = replace(V41, edition="v42", signs=SIGNS, system="<｜System2｜>")
""",
    "convert/synthetic/v42.py": """
from . import v41

class V42Geometry(v41.V41Geometry):
    pass

def config(g, experts):
    return v41.config(g, experts) | {"model_type": "deepseek_v42", "architectures": ["DeepseekV42ForCausalLM"]}

RELEASE = v41.RELEASE._replace(
    geometry=V42Geometry,
    config=config,
    encoder=lambda g: ("encoding/encoding_v42.py", "# none"),
    editions={"v4.2": V42Geometry()},
)
""",
}
PROGRAM = """
import contextlib, io, json, sys
from pathlib import Path
from dsv4 import cli
from dsv4.convert.synthetic.checkpoint import EDITIONS, make_checkpoint

folder = Path(sys.argv[1])
make_checkpoint(folder / "source", geometry=EDITIONS["v4.2"])
(folder / "messages.json").write_text('[{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]')
found = {}
for command in json.loads(sys.argv[2]):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.chdir(folder):
        code = cli.run(command)
    found[" ".join(command)] = code, out.getvalue()
print(json.dumps(found))
"""
TOKENS = ("run", "source", "--tokens", "4,5,6,7", "--max-new-tokens", "4", "--temperature", "0")
COMMANDS = {
    "inspect": ("inspect", "source", "--json"),
    "convert": ("convert", "source", "fp8"),
    "verify": ("verify", "source", "fp8"),
    "doctor": ("doctor", "source", "--for", "vllm", "--json"),
    "encode": ("encode", "messages.json", "--tokenizer", "source", "--json"),
    "run": TOKENS,
    "draft": (*TOKENS, "--draft"),
}


@pytest.mark.slow
def test_a_row_and_three_files_are_an_edition(tmp_path: Path) -> None:
    package = Path(dsv4.__file__).parent
    copy = Path(shutil.copytree(package, tmp_path / "src" / "dsv4"))  # with what is compiled
    for name, text in FILES.items():
        assert not (copy / name).exists()
        (copy / name).write_text(text, encoding="utf-8")
    table = copy / "convert" / "checkpoint" / "editions" / "table.py"
    before, start, after = table.read_text(encoding="utf-8").partition("EDITIONS = (\n")
    table.write_text(before + start + ROW + after, encoding="utf-8")

    command = [sys.executable, "-c", PROGRAM, str(tmp_path), json.dumps(list(COMMANDS.values()))]
    ended = subprocess.run(command, env={"PYTHONPATH": str(tmp_path / "src")}, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    results = json.loads(ended.stdout)
    found = {name: results[" ".join(command)] for name, command in COMMANDS.items()}

    assert {name: code for name, (code, _) in found.items()} == dict.fromkeys(COMMANDS, 0) | {"doctor": 1}, ended.stderr
    facts = json.loads(found["inspect"][1])
    assert facts["kv_cache_bytes"] is not None
    assert not [finding for finding in facts["findings"] if finding["level"] == "problem"]
    assert "IDENTICAL" in found["verify"][1] and "no DeepSeek-V4" not in found["verify"][1]
    prompt = json.loads(found["encode"][1])
    assert prompt["edition"] == "v42" and "<｜System2｜>" in prompt["prompt"]
    assert found["draft"][1] == found["run"][1]
    checks = json.loads(found["doctor"][1])["checks"]
    assert "unknown" in {check["status"] for check in checks if check["rule"] == "architecture"}
