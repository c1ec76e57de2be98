"""vLLM: its config, its choice of quantization and its weight loader, on the CPU and without a forward pass.

vLLM for CPUs runs its model for CPUs; one for CUDA runs its CUDA model, on CPU tensors (`cuda_on_cpu.py`).
"""

import os
import tempfile
from typing import Any

import torch

from .modules import Spelling, describe, held
from .record import Record, fill

SPELLING = Spelling(
    names=(
        ("embed_tokens.", "embed."), ("lm_head.", "head."), (".e_score_correction_bias", ".bias"),
        (".shared_experts.down_proj.", ".shared_experts.w2."),
    ),
    fused={"fused_wqa_wkv": ("wq_a", "wkv"), "fused_wkv_wgate": ("wkv", "wgate"), "gate_up_proj": ("w1", "w3")},
)  # fmt: skip


def settings(folder: str) -> Any:
    """vLLM's whole configuration for the folder: here it chooses classes and quantization."""
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(
        model=folder,
        max_model_len=1024,
        enforce_eager=True,
        skip_tokenizer_init=True,
        disable_custom_all_reduce=True,
    )
    return arguments.create_engine_config()


def build(chosen: Any) -> Any:
    """The model with its parameters filled. A group of one process has been made before."""
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    with set_default_torch_dtype(chosen.model_config.dtype), torch.device("cpu"):
        model = initialize_model(chosen, model_config=chosen.model_config)
    fill(model.parameters())
    return model


def alone(meeting: str) -> None:
    """A group of one process, which vLLM's layers ask for their share."""
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    init_distributed_environment(1, 0, f"file://{meeting}", 0, "gloo")
    initialize_model_parallel(1, 1)


def probe(folder: str, record: Record) -> None:
    """Load the folder and record every weight."""
    record.stage = "import"
    # The FP8 method for CPUs wants AMX, but only its kernels use it, which do not run here.
    torch.cpu._is_amx_tile_supported = lambda: True
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", GLOO_SOCKET_IFNAME="lo")
    import vllm.platforms

    from . import cuda_on_cpu

    record.version = vllm.__version__
    cuda_on_cpu.no_streams()
    for_cuda = not vllm.platforms.current_platform.is_cpu()
    if for_cuda:
        cuda_on_cpu.install()
        record.choices["platform"] = f"CUDA, capability {cuda_on_cpu.CAPABILITY} claimed"
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model_loader

    record.stage = "configuration"
    chosen = settings(folder)
    with tempfile.TemporaryDirectory() as meeting, set_current_vllm_config(chosen):
        alone(f"{meeting}/group")
        record.stage = "construction"
        if for_cuda:
            cuda_on_cpu.allow_missing_operators()
        model = build(chosen)
        describe(model, chosen.model_config.hf_config, chosen.model_config.quantization, record)
        record.stage = "loading"
        get_model_loader(chosen.load_config).load_weights(model, chosen.model_config)
    record.stage = "reading back"
    for name, values in held(model, SPELLING, record):
        record.weight(name, values)
    record.stage = "done"
