"""A package `vllm` with the entry points that dsv4's script calls, and faults on demand.

It keeps parameters as vLLM does: experts in `w13_weight` and `w2_weight`, three pairs of matrices one below the other,
and block scales beside the weights. `write(folder, version)` writes the package; the variable FAKE_VLLM of the
environment names its fault.
"""

from pathlib import Path

FILES = {
    "vllm/__init__.py": "import os\nif os.environ['FAKE_VLLM'] == 'broken':\n    import no_such_module\n",
    "vllm/platforms.py": """
class Cpu:
    def is_cpu(self):
        return True

current_platform = Cpu()
""",
    "vllm/config.py": """
import contextlib

@contextlib.contextmanager
def set_current_vllm_config(config):
    yield
""",
    "vllm/engine/__init__.py": "",
    "vllm/engine/arg_utils.py": """
import json, os
from types import SimpleNamespace
import torch

class HfConfig:
    def __init__(self, folder):
        self.__dict__.update(json.load(open(folder + "/config.json")))

class EngineArgs:
    def __init__(self, model, **others):
        self.model = model

    def create_engine_config(self):
        if os.environ["FAKE_VLLM"] == "refuses":
            raise ValueError("Unsupported head_dim " + "x" * 5000)
        if os.environ["FAKE_VLLM"] == "renamed":
            raise AttributeError("module has no attribute 'x'")
        config = HfConfig(self.model)
        found = SimpleNamespace(model=self.model, dtype=torch.bfloat16, hf_config=config, quantization="fp8")
        return SimpleNamespace(model_config=found, load_config=None)
""",
    "vllm/distributed.py": """
def init_distributed_environment(*args):
    pass

def initialize_model_parallel(*args):
    pass
""",
    "vllm/utils/__init__.py": "",
    "vllm/utils/torch_utils.py": """
import contextlib

@contextlib.contextmanager
def set_default_torch_dtype(dtype):
    yield
""",
    "vllm/model_executor/__init__.py": "",
    "vllm/model_executor/model_loader/__init__.py": """
import ctypes, os
import torch
from .utils import place, stored

class Loader:
    def load_weights(self, model, model_config):
        fault = os.environ["FAKE_VLLM"]
        print("the engine prints what it likes {", flush=True)
        if fault == "crashes":
            ctypes.string_at(0)
        if fault == "memory":
            raise MemoryError
        parameters = dict(model.named_parameters())
        for name, tensor in stored(model_config.model):
            if fault == "drops" and name.startswith("layers.0.attn_norm"):
                continue
            target = place(name, tensor, parameters)
            if target is None:
                continue
            if target.dtype == torch.float32 and tensor.dtype == torch.float8_e8m0fnu:
                misread = fault == "misreads" and ".experts." in name
                tensor = tensor.view(torch.uint8).float() if misread else tensor.float()
            target.data.copy_(tensor)

def get_model_loader(load_config):
    return Loader()
""",
    "vllm/model_executor/model_loader/utils.py": """
import json, os, re
from pathlib import Path
import torch
from safetensors import safe_open

FUSED = {"attn.wq_a": ("attn.fused_wqa_wkv", 0), "attn.wkv": ("attn.fused_wqa_wkv", 1),
         "compressor.wkv": ("compressor.fused_wkv_wgate", 0), "compressor.wgate": ("compressor.fused_wkv_wgate", 1),
         "shared_experts.w1": ("shared_experts.gate_up_proj", 0),
         "shared_experts.w3": ("shared_experts.gate_up_proj", 1),
         "shared_experts.w2": ("shared_experts.down_proj", None)}

def stored(folder):
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            for name in shard.keys():
                if not name.startswith("mtp."):
                    yield name, shard.get_tensor(name)

def spelled(name):
    name = re.sub(r"^embed\\.", "embed_tokens.", re.sub(r"^head\\.", "lm_head.", name))
    name = name.replace(".gate.bias", ".gate.e_score_correction_bias")
    return re.sub(r"\\.scale$", ".weight_scale_inv", name)

def fused(name):
    for part, (whole, half) in FUSED.items():
        if f".{part}." in name:
            return name.replace(part, whole), half
    return name, None

def expert(name):
    found = re.fullmatch(r"(.*\\.experts)\\.(\\d+)\\.w([123])\\.(weight|scale)", name)
    if found is None:
        return None
    leaf = "w2_weight" if found[3] == "2" else "w13_weight"
    leaf += "" if found[4] == "weight" else "_scale_inv"
    return f"{found[1]}.{leaf}", int(found[2]), {"1": 0, "2": None, "3": 1}[found[3]]

def half_of(tensor, half):
    return tensor if half is None else tensor.chunk(2)[half]

def place(name, tensor, parameters):
    one = expert(name)
    if one is not None:
        whole, number, half = one
        return half_of(parameters["model." + whole][number], half)
    whole, half = fused(spelled(name))
    target = parameters.get("model." + whole)
    if half is None:
        return target
    return target[: len(tensor)] if half == 0 else target[len(target) - len(tensor):]

def shapes(folder):
    found = {}
    for name, tensor in stored(folder):
        dtype = torch.float32 if tensor.dtype == torch.float8_e8m0fnu else tensor.dtype
        one = expert(name)
        if one is not None:
            whole, number, half = one
            rows = len(tensor) * (1 if half is None else 2)
            before = found.get(whole, ((0,), dtype))[0][0]
            found[whole] = (max(before, number + 1), rows, *tensor.shape[1:]), dtype
            continue
        whole, half = fused(spelled(name))
        rows = found[whole][0][0] if whole in found and half is not None else 0
        found[whole] = ((rows + len(tensor), *tensor.shape[1:]) if tensor.dim() else (), dtype)
    return found

class Method:
    pass

def initialize_model(config, model_config):
    model = torch.nn.Module()
    for name, (shape, dtype) in shapes(model_config.model).items():
        if os.environ["FAKE_VLLM"] == "lacks" and name.endswith("attn_sink"):
            continue
        module = model
        for part in ("model." + name).split(".")[:-1]:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        module.quant_method = Method()
        value = torch.empty(shape, dtype=dtype)
        module.register_parameter(name.split(".")[-1], torch.nn.Parameter(value, requires_grad=False))
    return model
""",
}


def write(folder: Path, version: str = "0.33.0") -> Path:
    """Write the package below a folder, which belongs on PYTHONPATH; returns the folder."""
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + (f"__version__ = {version!r}\n" if name == "vllm/__init__.py" else ""))
    return folder
