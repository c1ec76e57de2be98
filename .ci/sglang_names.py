"""SGLang's check of names in a GGUF file, on the files of `--to gguf`: it maps each back to the release's.

Run by .ci/run with the file `deepseek4_gguf.py` of SGLang's wheel, the only one that is taken out of it. The function
fails on a name that it does not know, and on two tensors for one name. The names that it finds have to be the
release's, with the matrices of all experts of a layer under one.
"""

import importlib.util
import re
import sys
import tempfile
from pathlib import Path

import gguf

from dsv4.convert import convert
from dsv4.convert.synthetic.checkpoint import Geometry, make_checkpoint

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "lab"))
from exact_values import tensors_of
from tiny import RAGGED

HASHED = "layers.0.ffn.gate.bias"  # of a hash layer, which has no router bias in a GGUF file
SOURCES = {"one file": Geometry(compress_ratios=(4, 128, 0, 0), num_hash_layers=1), "uneven widths": RAGGED}


def expected_names(source: Path) -> set[str]:
    """Names of the weights of the main model, without the numbers of experts; `.weight` where the release has it."""
    names = {name for name in tensors_of(source) if not name.startswith("mtp.") and not name.endswith(".scale")}
    return {re.sub(r"\.experts\.\d+\.", ".experts.", name) for name in names} - {HASHED}


def check(mapper: Path) -> None:
    """Every source: exits with the first difference."""
    spec = importlib.util.spec_from_file_location("deepseek4_gguf", mapper)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for words, geometry in SOURCES.items():
        with tempfile.TemporaryDirectory() as temporary:
            source = make_checkpoint(Path(temporary, "source"), geometry=geometry)
            convert(source, Path(temporary, "out"), to="gguf", max_shard_size="9GB")
            names = [tensor.name for tensor in gguf.GGUFReader(Path(temporary, "out", "model.gguf")).tensors]
            layers = len(geometry.compress_ratios) - 1
            found = module.build_deepseek4_checkpoint_name_map(gguf, names, layers)
            if different := set(found.values()) ^ expected_names(source):
                sys.exit(f"{words}: SGLang takes the names for others: {sorted(different)[:5]}")
            print(f"{words}: SGLang maps {len(found)} names back to the release's")


if __name__ == "__main__":
    check(Path(sys.argv[1]))
