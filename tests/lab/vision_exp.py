"""A small checkpoint with the parts that Vision-Exp adds to V4, and a message with an image."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dsv4.convert.synthetic.checkpoint import Geometry, make_checkpoint

IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}]


def vision_exp(folder: Path) -> Path:
    """V4 with what Vision-Exp adds: a tower, vectors around an image, router biases for image tokens in all layers."""
    make_checkpoint(folder, geometry=Geometry(compress_ratios=(0, 4, 0)))
    last = sorted(folder.glob("*.safetensors"))[-1]
    added = {"vision.norm.weight": torch.ones(8), "aligner.w1.bias": torch.ones(8), "image_pad": torch.ones(256)}
    added |= {f"layers.{i}.ffn.gate.bias_vl": torch.full((8,), 9.0) for i in (0, 1)}
    added["layers.0.ffn.gate.bias"] = torch.full((8,), -9.0)
    save_file(load_file(last) | added, last)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(added, last.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
