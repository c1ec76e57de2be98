"""SGLang: its config, its choice of quantization and its weight loader, on the CPU and without a forward pass.

Packages with GPU kernels that are not installed are replaced by stand-ins. SGLang sets variables such as
SGLANG_OPT_FP8_WO_A_GEMM by the GPU: its own function for that runs with a GPU claimed (`CAPABILITY`) and DeepGEMM
importable. What the environment sets explicitly stays.
"""

import importlib
import os
import tempfile
from typing import Any
from unittest import mock

import torch

from .modules import Spelling, describe, held
from .record import Record, fill
from .stand_ins import stand_in

KERNELS = (
    "torchvision", "torchaudio", "sgl_kernel", "flashinfer", "tilelang", "deep_gemm", "cuda", "cutlass", "decord",
    "flash_attn", "quack", "deep_ep", "flash_mla", "humming",
)  # fmt: skip
CAPABILITY = os.environ.get("DSV4_CUDA_CAPABILITY", "10.0")  # of the GPU that is claimed
CLAIMABLE = ("9.0", "10.0")  # for others SGLang decides in more places than the one which is run here
ONE_PROCESS = {"tp": 1, "attn_tp": 1, "moe_tp": 1, "pp": 1, "attn_dp": 1, "attn_cp": 1, "moe_ep": 1, "moe_dp": 1}
SPELLING = Spelling(
    names=(
        ("embed_tokens.", "embed."), ("lm_head.", "head."), (".e_score_correction_bias", ".bias"),
        (".topk.tid2eid", ".gate.tid2eid"), (".self_attn.", ".attn."), (".mlp.", ".ffn."),
        (".input_layernorm.", ".attn_norm."), (".post_attention_layernorm.", ".ffn_norm."),
        (".shared_experts.down_proj.", ".shared_experts.w2."),
    ),
    vision=((".attn.qkv_proj.", ".attn.wqkv."), (".attn.proj.", ".attn.wo.")),
    fused={"wqkv_a": ("wq_a", "wkv"), "wkv_gate": ("wkv", "wgate"), "gate_up_proj": ("w1", "w3")},
)  # fmt: skip


def prepare() -> None:
    """What must hold before SGLang is imported: a CPU engine, and stand-ins that transformers does not use."""
    os.environ.update(SGLANG_USE_CPU_ENGINE="1", GLOO_SOCKET_IFNAME="lo")
    import transformers.utils.import_utils as optional

    for question in ("is_torchvision_available", "is_torchaudio_available", "is_flash_attn_2_available"):
        getattr(optional, question, lambda: None)()  # transformers remembers the answer
    stand_in(*KERNELS)


def decide_by_gpu(folder: str) -> None:
    """Let SGLang set its variables as on a GPU of CAPABILITY. After its layers, before its models are imported."""
    if CAPABILITY not in CLAIMABLE:
        raise ValueError(f"DSV4_CUDA_CAPABILITY is {CAPABILITY}, for SGLang it can be {' or '.join(CLAIMABLE)}")
    from sglang.srt import utils
    from sglang.srt.arg_groups.serving_hook import handle_environment_variables
    from sglang.srt.layers import deep_gemm_wrapper
    from sglang.srt.layers.deep_gemm_wrapper import configurer
    from sglang.srt.runtime_context import override_platform
    from sglang.srt.server_args import ServerArgs

    number = int(CAPABILITY.replace(".", ""))
    facts = {"is_cuda": True, "device_sm": number, "is_sm120": False}
    facts |= {f"is_sm{one}": one == number for one in (90, 100)}
    claimed: dict[str, Any] = {"is_cuda": lambda: True, "get_device_sm": lambda: number}
    with override_platform(**facts), mock.patch.multiple(utils, **claimed):
        found = vars(importlib.reload(configurer))
        constants: dict[str, Any] = {name: found[name] for name in vars(deep_gemm_wrapper) if name.isupper()}
        with mock.patch.multiple(deep_gemm_wrapper, **constants):
            handle_environment_variables(ServerArgs(model_path=folder, skip_tokenizer_init=True))
    importlib.reload(configurer)


def settings(folder: str) -> tuple[Any, Any]:
    """(server arguments, SGLang's configuration of the model): here it chooses classes and quantization."""
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

    arguments = ServerArgs(model_path=folder, device="cpu", skip_tokenizer_init=True)
    set_global_server_args_for_scheduler(arguments)
    return arguments, ModelConfig.from_server_args(arguments)


def alone(arguments: Any, meeting: str) -> None:
    """A group of one process, which SGLang's layers ask for their share."""
    from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
    from sglang.srt.layers.dp_attention import initialize_dp_attention_flags
    from sglang.srt.layers.moe import initialize_moe_config
    from sglang.srt.runtime_context import get_parallel

    init_distributed_environment(1, 0, f"file://{meeting}", 0, "gloo")
    sizes = {f"{name}_size": size for name, size in ONE_PROCESS.items()}
    get_parallel().override_permanently(**sizes, **{f"{name}_rank": 0 for name in ONE_PROCESS}, attn_dcp_size=1)
    initialize_model_parallel()
    initialize_dp_attention_flags(arguments)
    initialize_moe_config()


def load(model_config: Any, record: Record) -> Any:
    """The model as its loader leaves it, before weights are rearranged for kernels."""
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.layers.rotary_embedding import factory
    from sglang.srt.model_loader.loader import DefaultModelLoader

    # Rotary tables are no weights. The form for CPUs knows YaRN only, and layers without compression have none.
    factory.get_rope_cpu = lambda *args: factory.get_rope(*args[:-1])

    class Loader(DefaultModelLoader):  # type: ignore[misc]
        """Fills the parameters, loads, and stops there."""

        @staticmethod
        def load_weights_and_postprocess(model: Any, weights: Any, target_device: Any) -> None:
            fill(model.parameters())
            model.post_load_weights = lambda **kwargs: None
            model._prewarm_mhc_kernels = lambda: None
            record.stage = "loading"
            DefaultModelLoader.load_weights_only(model, weights, target_device)

    return Loader(LoadConfig()).load_model(model_config=model_config, device_config=DeviceConfig("cpu", 0))


def in_order(ape: torch.Tensor) -> torch.Tensor:
    """The table of an overlapping compressor (ratio 4) as it is in the file: SGLang keeps its halves one below the
    other, [2 * ratio, width], in a parameter [ratio, 2 * width].
    """
    if len(ape) != 4:
        return ape
    first, second = ape.reshape(2, 4, -1)
    return torch.cat((first, second), dim=-1)


def probe(folder: str, record: Record) -> None:
    """Load the folder and record every weight."""
    record.stage = "import"
    import sglang.version

    record.version = sglang.version.__version__
    prepare()
    import sglang.srt.model_loader.loader

    record.stage = "configuration"
    decide_by_gpu(folder)
    record.choices["platform"] = f"CUDA, capability {CAPABILITY} claimed"
    arguments, model_config = settings(folder)
    with tempfile.TemporaryDirectory() as meeting:
        alone(arguments, f"{meeting}/group")
        record.stage = "construction"
        model = load(model_config, record)
    describe(model, model_config.hf_config, model_config.quantization, record)
    record.stage = "reading back"
    for name, values in held(model, SPELLING, record):
        record.weight(name, in_order(values) if name.endswith(".ape") else values)
    record.stage = "done"
