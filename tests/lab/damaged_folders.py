"""Folders as people have them: checkpoints with one thing wrong, and what is no checkpoint of DeepSeek-V4 at all."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from mixed_scales import mix_scales
from safetensors.numpy import save_file
from tiny import TINY

from dsv4.convert.synthetic.checkpoint import make_checkpoint

SHARDS = ("model-00001-of-00005.safetensors", "model-00002-of-00005.safetensors")
INDEX = "model.safetensors.index.json"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"1" * 64 + b"\nsize 123456\n"
PAGE = b"<!DOCTYPE html><title>Log in</title>"


def _holds(name: str, data: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return write


def _lacks(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _says(**values: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


def _cut(folder: Path) -> None:
    path = folder / SHARDS[0]
    path.write_bytes(path.read_bytes()[:-100])


def _swap(folder: Path) -> None:
    first, second = ((folder / name).read_bytes() for name in SHARDS)
    (folder / SHARDS[0]).write_bytes(second)
    (folder / SHARDS[1]).write_bytes(first)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "no-config": _lacks("config.json"),
    "no-index": _lacks(INDEX),
    "no-shard": _lacks(SHARDS[0]),
    "no-tokenizer": _lacks("tokenizer.json"),
    "cut": _cut,
    "zeros": _holds(SHARDS[0], bytes(4096)),
    "nothing": _holds(SHARDS[0], b""),
    "swapped": _swap,
    "lfs-shard": _holds(SHARDS[0], POINTER),
    "lfs-config": _holds("config.json", POINTER),
    "lfs-tokenizer": _holds("tokenizer.json", POINTER),
    "web-shard": _holds(SHARDS[0], PAGE),
    "web-config": _holds("config.json", PAGE),
    "web-index": _holds(INDEX, PAGE),
    "web-tokenizer": _holds("tokenizer.json", PAGE),
    "half-config": _holds("config.json", b'{"model_type": "deepseek_v4",'),
    "list-config": _holds("config.json", b"[]"),
    "v3": _says(model_type="deepseek_v3"),
    "wide": _says(hidden_size=7168),
    "awq": _says(quantization_config={"quant_method": "awq", "bits": 4}),
}
OTHER_KINDS = {"gguf": b"GGUF", "bin": b"PK\x03\x04", "pth": b"PK\x03\x04"}


def make_folders(root: Path) -> None:
    """`good`, a copy of it for each row of DAMAGE, and what was never a checkpoint, all in `root`."""
    good = make_checkpoint(root / "good", geometry=TINY)
    for name, damage in DAMAGE.items():
        shutil.copytree(good, root / name)
        damage(root / name)
    for name, start in OTHER_KINDS.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text("{}")
        (root / name / f"model.{name}").write_bytes(start + bytes(60))
    llama = root / "llama"
    llama.mkdir()
    (llama / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    save_file({"model.embed_tokens.weight": np.zeros((4, 8), np.float32)}, llama / "model.safetensors")
    mix_scales(make_checkpoint(root / "mixed", geometry=TINY, tokenizer=False))
    (root / "empty").mkdir()
    (root / "other").mkdir()
    (root / "other" / "notes.txt").write_text("mine")
    (root / "half.json").write_text('[{"role": ')
