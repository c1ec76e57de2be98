"""Commands that read headers only do without torch, which takes a second or two to import."""

import json
import subprocess
import sys
from pathlib import Path

from dsv4.convert.plan.settings import CONVERSIONS
from dsv4.convert.synthetic.checkpoint import make_checkpoint

PROGRAM = """
import json, sys
from dsv4 import cli

for arguments in json.loads(sys.argv[1]):
    code = cli.run(arguments)
    assert code == 0, (arguments, code)
    loaded = sorted({name.split(".")[0] for name in sys.modules} & {"torch", "safetensors", "transformers"})
    print(arguments, loaded, file=sys.stderr)
    assert not loaded, arguments
"""
MORE = {"nvfp4": ("--input-scale", "1.0")}  # options that a conversion needs


def test_headers_need_no_torch(tmp_path: Path) -> None:
    source = str(make_checkpoint(tmp_path / "source"))
    shard = str(next(Path(source).glob("*.safetensors")))
    (tmp_path / "messages.json").write_text('[{"role": "user", "content": "Hello"}]')
    commands = [
        ["--help"],
        ["encode", str(tmp_path / "messages.json")],
        ["inspect", source],
        ["inspect", source, "--tensors", "layers.0.*", "--json"],
        ["inspect", shard],
        ["doctor", source, "--for", "vllm", "--tensor-parallel", "1"],
        ["doctor", source, "--for", "transformers", "--json"],
        *(
            ["convert", source, str(tmp_path / "out"), "--to", to, "--dry-run", *MORE.get(to, ())]
            for to in CONVERSIONS
            if to != "fp4"
        ),
        ["convert", source, str(tmp_path / "out"), "--layout", "mp", "--model-parallel", "2", "--dry-run", "--json"],
    ]
    done = subprocess.run([sys.executable, "-c", PROGRAM, json.dumps(commands)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
