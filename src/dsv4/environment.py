"""What dsv4 runs on: versions, devices, memory, disks and caches, for a bug report.

Nothing secret goes in: of tokens only whether they are set, and of URLs (which may carry a password) as little.
"""

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dsv4.quant import fp4_to_fp8_compiled

PACKAGES = (
    "dsv4", "torch", "numpy", "safetensors", "tokenizers", "huggingface_hub", "hf_xet", "modelscope", "modelscope-hub",
    "typer", "tqdm", "transformers", "accelerate",
)  # fmt: skip
# Variables that change what dsv4 or its libraries do.
SHOWN_VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "DSV4_DEBUG", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "MODELSCOPE_CACHE", "NO_COLOR",
    "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF", "TERM", "XDG_CACHE_HOME",
)  # fmt: skip
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


def _meminfo(key: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    values = {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}
    return int(values[key][0]) * 1024 if key in values else None


def _memory_limit() -> int | None:
    """The control group's limit on this process, if one is set: what a container may really use."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = int(Path(path).read_text(encoding="ascii"))
        except (OSError, ValueError):  # "max" is no number
            continue
        return limit if limit < 2**60 else None  # version 1 writes a huge number for "no limit"
    return None


def _disk(path: Path) -> dict[str, Any]:
    """A folder, which need not exist yet, and the room on its disk."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    try:
        usage = shutil.disk_usage(there)
    except OSError:
        return {"path": str(path), "exists": path.exists(), "free_bytes": None, "total_bytes": None}
    return {"path": str(path), "exists": path.exists(), "free_bytes": usage.free, "total_bytes": usage.total}


def _folders(more: dict[str, Path]) -> dict[str, Path]:
    from huggingface_hub import constants
    from modelscope_hub import get_default_config

    return {
        "working folder": Path.cwd(),
        "Hugging Face cache": Path(constants.HF_HUB_CACHE),
        "ModelScope cache": Path(get_default_config().cache_dir),
        **more,
    }


def gather(compiler: str | None = None, folders: dict[str, Path] | None = None) -> dict[str, Any]:
    """Everything that `dsv4 env` shows; the engine's C compiler and further folders are the caller's to know."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "versions": {"python": platform.python_version(), **{package: _version(package) for package in PACKAGES}},
        "system": platform.platform(),
        "executable": sys.executable,
        "cpu": {"machine": platform.machine(), "cores": usable, "torch_threads": torch.get_num_threads()},
        "memory": {
            "total_bytes": _meminfo("MemTotal"), "available_bytes": _meminfo("MemAvailable"),
            "limit_bytes": _memory_limit(),
        },
        "cuda": torch.version.cuda,
        "compiler": compiler,
        "compiled_cast": fp4_to_fp8_compiled.is_compiled(),
        "devices": _accelerators(),
        "folders": {what: _disk(path) for what, path in _folders(folders or {}).items()},
        "variables": {
            **{name: os.environ[name] for name in SHOWN_VARIABLES if name in os.environ},
            **dict.fromkeys((name for name in HIDDEN_VARIABLES if os.environ.get(name)), "set"),
        },
    }  # fmt: skip
