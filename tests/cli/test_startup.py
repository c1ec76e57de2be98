"""What needs no torch does without it, because its import takes seconds: reading headers, and refusing a mistake."""

import json
import subprocess
import sys
from pathlib import Path

from tiny import TINY

from dsv4.convert.plan.settings import CONVERSIONS
from dsv4.convert.synthetic.checkpoint import make_checkpoint

PROGRAM = """
import json, sys
from dsv4 import cli

expected = int(sys.argv[2])
for arguments in json.loads(sys.argv[1]):
    code = cli.run(arguments)
    assert (code > 1) == expected, (arguments, code)
    loaded = sorted({name.split(".")[0] for name in sys.modules} & set(sys.argv[3:]))
    print(arguments, loaded, file=sys.stderr)
    assert not loaded, arguments
"""


SLOW = ("torch", "safetensors", "transformers")


def check(commands: list[list[str]], fails: bool, modules: tuple[str, ...] = SLOW) -> None:
    """Run them in one process, of which none may import one of the modules."""
    arguments = [json.dumps(commands), str(int(fails)), *modules]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
    check(commands, fails=False)


def test_mistakes_need_no_torch(tmp_path: Path) -> None:
    source, out = str(make_checkpoint(tmp_path / "source", geometry=TINY)), str(tmp_path / "out")
    commands = [
        ["convert", source, out, "--to", "fp16"],
        ["verify", "demo/sorce", source],
        ["verify", source, source, "--report", "/nowhere/x.html"],
        ["run", source, "--tokens", "1,2", "--logits", "/nowhere/x"],
        ["encode", "/nowhere"],
        ["download", "nowhere"],
        ["demo", source],
    ]
    check(commands, fails=True)


def test_what_the_command_line_alone_shows_needs_no_numpy_either(tmp_path: Path) -> None:
    source, out = str(make_checkpoint(tmp_path / "source", geometry=TINY)), str(tmp_path / "out")
    commands = [
        ["inspect", "demo/sorce"],
        ["convert", "demo/sorce", out],
        ["convert", source, out, "--max-shard-size", "abc"],
        ["convert", source, out, "--max-memory", "lots"],
        ["convert", source, out, "--layout", "mp"],
        ["convert", source, out, "--to", "nvfp4"],
        ["convert", source, out, "--part", "5/4"],
        ["verify", "demo/sorce", out],
        ["verify", source, "nowhere"],
        ["verify", source, "--sample", "200%"],
        ["verify", source, "--max-memory", "lots"],
        ["run", "nowhere", "-p", "hi"],
        ["run", source, "-p", "hi", "--compare", "nowhere"],
        ["run", source, "-p", "hi", "--max-memory", "lots"],
        ["run", source, "-p", "hi", "--tools", "/nowhere"],
        ["run", source, "--file", "/nowhere"],
        ["run", source, "--messages", "/nowhere"],
        ["run", source, "--tokens", "1,x"],
        ["doctor", "nowhere", "--for", "vllm"],
    ]
    check(commands, fails=True, modules=(*SLOW, "numpy"))
