"""`dsv4 env`: the facts for a bug report.

Secrets are left out: of tokens, and of URLs, which may contain a password, only whether they are set.
"""

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dsv4 import machine, output
from dsv4.options import Json, example
from dsv4.text import human_bytes

EPILOG = example("dsv4 env", "dsv4 env --json")
PACKAGES = (
    "dsv4", "torch", "numpy", "safetensors", "tokenizers", "huggingface_hub", "hf_xet", "modelscope", "modelscope-hub",
    "psutil", "typer", "tqdm", "transformers", "accelerate",
)  # fmt: skip
# Variables that change what dsv4 or its libraries do.
SHOWN_VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "DSV4_DEBUG", "DSV4_KERNELS", "GOMP_SPINCOUNT", "HF_HOME", "HF_HUB_CACHE",
    "HF_HUB_OFFLINE", "MODELSCOPE_CACHE", "NO_COLOR", "OMP_NUM_THREADS", "OMP_WAIT_POLICY",
    "PYTORCH_CUDA_ALLOC_CONF", "TERM", "THP_MEM_ALLOC_ENABLE", "XDG_CACHE_HOME",
)  # fmt: skip
COMPILERS = ("cc", "gcc", "clang")
HIDDEN_VARIABLES = (
    "HF_ENDPOINT", "HF_TOKEN", "HTTPS_PROXY", "HTTP_PROXY", "MODELSCOPE_API_TOKEN", "MODELSCOPE_ENDPOINT",
)  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _accelerators() -> list[dict[str, Any]]:
    """Every device that torch can compute on besides the CPU."""
    import torch

    found: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        found.append({"device": f"cuda:{index}", "name": name, "memory_bytes": total, "free_bytes": free})
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "name": platform.processor(), "memory_bytes": None, "free_bytes": None})
    for kind in ("npu", "xpu"):
        module = getattr(torch, kind, None)
        for index in range(module.device_count() if module is not None and module.is_available() else 0):
            name = module.get_device_name(index)  # type: ignore[union-attr]
            found.append({"device": f"{kind}:{index}", "name": name, "memory_bytes": None, "free_bytes": None})
    return found


def _disk(path: Path) -> dict[str, Any]:
    """A folder, which need not exist yet, and the free space on its disk."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    try:
        usage = shutil.disk_usage(there)
    except OSError:
        return {"path": str(path), "exists": path.exists(), "free_bytes": None, "total_bytes": None}
    return {"path": str(path), "exists": path.exists(), "free_bytes": usage.free, "total_bytes": usage.total}


def _folders() -> dict[str, Path]:
    from huggingface_hub import constants
    from modelscope_hub import get_default_config

    from dsv4 import compiled

    return {
        "working folder": Path.cwd(),
        "Hugging Face cache": Path(constants.HF_HUB_CACHE),
        "ModelScope cache": Path(get_default_config().cache_dir),
        "compiled loops": compiled.FILE.parent,
    }


def _variables() -> dict[str, str]:
    shown = {name: os.environ[name] for name in SHOWN_VARIABLES if name in os.environ}
    return shown | dict.fromkeys((name for name in HIDDEN_VARIABLES if os.environ.get(name)), "set")


def compiler() -> str | None:
    """Path of the machine's C compiler, which an installation from the sources would use; None if it has none."""
    return next((found for name in COMPILERS if (found := shutil.which(name))), None)


def facts() -> dict[str, Any]:
    """All facts, as the JSON object that the command prints."""
    import torch

    from dsv4 import compiled
    from dsv4.model.kernels import binding
    from dsv4.quant import fp4_to_fp8_compiled

    return {
        "versions": {"python": platform.python_version(), **{package: _version(package) for package in PACKAGES}},
        "system": platform.platform(),
        "executable": sys.executable,
        "cpu": {
            "machine": platform.machine(), "cores": machine.usable_cores(), "torch_threads": torch.get_num_threads(),
        },
        "memory": {
            "total_bytes": machine.total_memory(), "available_bytes": machine.available_memory(),
            "limit_bytes": machine.memory_limit(),
        },
        "cuda": torch.version.cuda,
        "compiler": compiler(),
        "kernels": binding.form_name(),
        "compiled_cast": fp4_to_fp8_compiled.is_compiled(),
        "compiled_forms": binding.forms(),
        "compiled_problem": compiled.problem(),
        "devices": _accelerators(),
        "folders": {what: _disk(path) for what, path in _folders().items()},
        "variables": _variables(),
    }  # fmt: skip


def _size(count: int | None) -> str:
    return "unknown" if count is None else human_bytes(count)


def _system(found: dict[str, Any]) -> list[list[str]]:
    cpu, memory = found["cpu"], found["memory"]
    limit = "" if memory["limit_bytes"] is None else f", this process may use {_size(memory['limit_bytes'])}"
    return [
        ["system", found["system"]],
        ["python", found["executable"]],
        ["cpu", f"{cpu['cores']} cores, {cpu['machine']}, {cpu['torch_threads']} torch threads"],
        ["memory", f"{_size(memory['available_bytes'])} free of {_size(memory['total_bytes'])}{limit}"],
        ["cuda", found["cuda"] or "torch was built without it"],
        ["C compiler", found["compiler"] or "none, which matters when dsv4 is installed from its sources"],
        ["compiled library", found["compiled_problem"] or f"has {', '.join(found['compiled_forms'])} for this cpu"],
        ["kernels of run", found["kernels"]],
        ["compiled cast", "yes" if found["compiled_cast"] else "no: dsv4 convert is a bit slower"],
    ]


def _show(out: output.Output, found: dict[str, Any]) -> None:
    out.section("Versions", [[name, number or "not installed"] for name, number in found["versions"].items()])
    out.section("System", [[name, text] for name, text in _system(found)])
    devices = [[d["device"], d["name"], _size(d["memory_bytes"])] for d in found["devices"]]
    out.section("Devices besides the CPU", devices)
    folders = [[w, f"{_size(f['free_bytes'])} free", f["path"]] for w, f in found["folders"].items()]
    out.section("Folders", folders)
    out.section("Environment", [[name, value] for name, value in found["variables"].items()])


def env(json: Json = False) -> None:
    """Show versions, devices, memory, disks and caches, for a bug report. Tokens are never shown."""
    out = output.configure(json)
    found = facts()
    out.result(found)
    _show(out, found)
