"""What each engine accepts, as data.

Most of it comes from what an engine's loader does with published checkpoints; what `transformers` does was tried (its
row is checked by a test that loads checkpoints with it). docs/engines.md says how we know each.
"""

from dataclasses import dataclass
from typing import Literal

from .facts import Facts

EngineName = Literal["sglang", "vllm", "transformers", "reference"]

ABSENT = None  # of a key of config.json
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Trap:
    """Something to know about an engine when the experts are stored as `experts` with scales of `scales`.

    variable: what has to be set in its environment.
    """

    experts: str
    text: str
    scales: str = ""
    variable: str = ""

    def concerns(self, facts: Facts) -> bool:
        """Whether a folder's experts are stored so."""
        return facts.experts == {self.experts} and (not self.scales or self.scales in facts.expert_scales)


@dataclass(frozen=True)
class Engine:
    """What one engine accepts.

    expert_scales: format of the experts -> dtypes of their block scales that it reads right. A format that is not a
    key is not known to work. declared: format -> values of expert_dtype that make it read that format (ABSENT: no
    key); a missing key means that the engine looks at the tensors. needs: side files without which it stops;
    wants: files that somebody will miss. divided: config keys that the number of ranks must divide.
    split_blocks: products of keys whose share of a rank must consist of whole FP8 blocks. serve: the command that
    starts it on a folder, and its option for the number of ranks.
    """

    layout: Literal["hf", "mp"]
    expert_scales: dict[str, tuple[str, ...]]
    declared: dict[str, tuple[str | None, ...]]
    undeclared: str  # what it takes the experts for when the key is absent
    wo_a: tuple[str, ...]
    needs: tuple[str, ...]
    wants: tuple[str, ...]
    divided: tuple[str, ...]
    split_blocks: tuple[tuple[str, ...], ...]
    traps: tuple[Trap, ...]
    serve: tuple[str, str] | None = None


_SERVED = ("encoding/encoding_dsv4.py", "generation_config.json")
_SPLIT = (("moe_intermediate_size",), ("num_attention_heads", "head_dim"), ("o_groups", "o_lora_rank"))

ENGINES: dict[EngineName, Engine] = {
    "sglang": Engine(
        layout="hf",
        expert_scales={"fp4": ("F8_E8M0",), "fp8": ("F8_E8M0", "F32")},
        declared={},  # it looks into the header of one routed expert
        undeclared="",
        wo_a=("fp8", "bf16"),
        needs=TOKENIZER,
        wants=_SERVED,
        divided=("num_attention_heads", "o_groups"),
        split_blocks=_SPLIT,
        traps=(
            Trap(
                "fp8",
                "start it with SGLANG_DSV4_FP4_EXPERTS=0: it takes the experts for FP4 when it cannot probe",
                variable="SGLANG_DSV4_FP4_EXPERTS=0",
            ),
            Trap(
                "fp8",
                "float32 scales, the layout of Base: SGLANG_FIX_DSV4_BASE_MODEL_LOAD=1",
                "F32",
                "SGLANG_FIX_DSV4_BASE_MODEL_LOAD=1",
            ),
        ),
        serve=("python -m sglang.launch_server --model-path", "--tp-size"),
    ),
    "vllm": Engine(
        layout="hf",
        expert_scales={"fp4": ("F8_E8M0",), "fp8": ("F32",)},  # E8M0 bytes would be copied into float32 as they are
        declared={"fp4": ("fp4", ABSENT), "fp8": ("fp8",)},
        undeclared="fp4",
        wo_a=("fp8",),
        needs=TOKENIZER,
        wants=_SERVED,
        divided=("num_attention_heads", "o_groups"),
        split_blocks=_SPLIT,
        traps=(Trap("fp8", "vLLM sets VLLM_USE_DEEP_GEMM_E8M0=0 for float32 scales by itself: leave it"),),
        serve=("vllm serve", "--tensor-parallel-size"),
    ),
    "transformers": Engine(
        layout="hf",
        expert_scales={"fp4": ("F8_E8M0",), "fp8": ("F8_E8M0", "F32"), "bf16": ()},
        declared={"fp4": ("fp4",), "fp8": ("fp8", ABSENT)},
        undeclared="fp8",
        wo_a=("fp8", "bf16"),
        needs=(),
        wants=(*TOKENIZER, "generation_config.json"),
        divided=(),
        split_blocks=(("moe_intermediate_size",),),
        traps=(
            Trap("fp4", "needs the package accelerate; without a GPU it decodes to BF16 while loading"),
            Trap("fp4", "DeepGEMM has FP4 kernels for Blackwell only: on a Hopper GPU its advice is an FP8 checkpoint"),
            Trap("fp8", "needs the package accelerate; without a GPU it decodes to BF16 while loading"),
        ),
    ),
    "reference": Engine(
        layout="mp",
        expert_scales={"fp4": ("F8_E8M0",), "fp8": ("F8_E8M0", "F32")},  # F32: its converter passes Base through
        declared={"fp4": ("fp4",), "fp8": (ABSENT,)},
        undeclared="fp8",
        wo_a=("bf16",),
        needs=("config.json", *TOKENIZER),
        wants=(),
        divided=("vocab_size", "num_attention_heads", "o_groups", "n_routed_experts", "index_n_heads"),
        split_blocks=_SPLIT[1:],
        traps=(),
    ),
}
