"""The engines: what `dsv4 convert` writes for each, what each accepts, and how each is started. One row per engine.

The names that `--target` and `dsv4 doctor --for` take, and the sizes that `dsv4 inspect` lists, come from ENGINES, so
a new engine is a new row. docs/engines.md says how we know what a row states.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

Layout = Literal["hf", "mp"]
ScaleDtype = Literal["e8m0", "f32"]
WoA = Literal["fp8", "bf16"]

ABSENT = None  # of a key of config.json
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Target:
    """What `convert` writes for an engine.

    scale_dtype: dtype of the block scales of FP8 weights. wo_a: dtype of `attn.wo_a`. expert_dtype: what config.json
    says of FP8 experts, ABSENT if the key must not be there. caveats: what to know about an engine that loads it.
    """

    scale_dtype: ScaleDtype
    wo_a: WoA
    expert_dtype: str | None
    caveats: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Caveat:
    """Something to know before starting an engine on a checkpoint of a certain kind.

    rule: the rule of `doctor` that reports it. experts, scales: it concerns checkpoints whose experts are stored in
    this format, with block scales of this dtype; "" for any. mtp: it concerns checkpoints with draft blocks only.
    variable: an assignment in the environment of the engine, "" if none is needed.
    """

    rule: str = "start"
    text: str
    experts: str = ""
    scales: str = ""
    mtp: bool = False
    variable: str = ""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What one engine accepts.

    target: what `convert --target` writes for it. layout: of the folders that it reads.
    model_types, compress_ratios: values that it knows, () if it takes any.
    expert_scales: format of the experts -> dtypes of their block scales that it reads right; a format that is not a
    key is not known to work. declared: format of the experts -> values of expert_dtype that make it read that format;
    a format that is not a key: it looks at the tensors. undeclared: what it takes experts for if the key is absent.
    wo_a: dtypes of attn.wo_a that it reads right. other_wo_a: status and text of `doctor` for another dtype, {found}.
    scale_fmts: values of scale_fmt that it accepts, the one it assumes first; () if it does not look.
    partial_blocks: whether it reads FP8 weights right whose sides are no multiples of the block.
    needs: side files without which it stops. wants: side files that a user would miss.
    divided: config keys that the number of ranks must divide. split_blocks: products of config keys whose share of a
    rank must consist of whole FP8 blocks. serve: the command that starts it on a folder, "" if there is none;
    ranks_option: the option of that command for the number of ranks.
    """

    target: Target
    layout: Layout
    model_types: tuple[str, ...] = ()
    compress_ratios: tuple[int, ...] = ()
    expert_scales: dict[str, tuple[str, ...]]
    declared: dict[str, tuple[str | None, ...]]
    undeclared: str
    wo_a: tuple[str, ...]
    other_wo_a: tuple[Literal["wrong", "unknown"], str] = ("unknown", "")
    scale_fmts: tuple[str, ...] = ()
    partial_blocks: bool = True
    needs: tuple[str, ...]
    wants: tuple[str, ...]
    divided: tuple[str, ...]
    split_blocks: tuple[tuple[str, ...], ...]
    caveats: tuple[Caveat, ...]
    serve: str = ""
    ranks_option: str = ""


_SERVED = ("encoding/encoding_dsv4.py", "generation_config.json")
_SPLIT = (("moe_intermediate_size",), ("num_attention_heads", "head_dim"), ("o_groups", "o_lora_rank"))
_DECODED = "needs the package accelerate; without a GPU it decodes to BF16 while loading"

ENGINES: dict[str, Engine] = {
    "vllm": Engine(
        target=Target(
            "f32",
            "fp8",
            "fp8",
            (
                "vLLM reads expert scales as float32; it sets VLLM_USE_DEEP_GEMM_E8M0=0 by itself for such a "
                "checkpoint.",
            ),
        ),
        layout="hf",
        expert_scales={"fp4": ("F8_E8M0",), "fp8": ("F32",)},  # it copies E8M0 bytes into float32 as they are
        declared={"fp4": ("fp4", ABSENT), "fp8": ("fp8",)},
        undeclared="fp4",
        wo_a=("fp8",),
        other_wo_a=("unknown", "{found}: only fp8 is known to load in vllm"),
        needs=TOKENIZER,
        wants=_SERVED,
        divided=("num_attention_heads", "o_groups"),
        split_blocks=_SPLIT,
        caveats=(
            Caveat(
                text="vLLM sets VLLM_USE_DEEP_GEMM_E8M0=0 for float32 scales by itself: leave it",
                experts="fp8",
            ),
        ),
        serve="vllm serve",
        ranks_option="--tensor-parallel-size",
    ),
    "sglang": Engine(
        target=Target(
            "e8m0",
            "bf16",
            ABSENT,
            ("SGLang assumes FP4 experts when it cannot probe the shards: start it with SGLANG_DSV4_FP4_EXPERTS=0.",),
        ),
        layout="hf",
        expert_scales={"fp4": ("F8_E8M0",), "fp8": ("F8_E8M0", "F32")},
        declared={},  # it looks into the header of one routed expert
        undeclared="",
        wo_a=("fp8", "bf16"),
        needs=TOKENIZER,
        wants=_SERVED,
        divided=("num_attention_heads", "o_groups"),
        split_blocks=_SPLIT,
        caveats=(
            Caveat(
                text="start it with SGLANG_DSV4_FP4_EXPERTS=0: it takes the experts for FP4 when it cannot probe",
                experts="fp8",
                variable="SGLANG_DSV4_FP4_EXPERTS=0",
            ),
            Caveat(
                text="float32 scales, the layout of Base: SGLANG_FIX_DSV4_BASE_MODEL_LOAD=1",
                experts="fp8",
                scales="F32",
                variable="SGLANG_FIX_DSV4_BASE_MODEL_LOAD=1",
            ),
        ),
        serve="python -m sglang.launch_server --model-path",
        ranks_option="--tp-size",
    ),
    "transformers": Engine(
        target=Target(
            "e8m0",
            "fp8",
            "fp8",
            ("transformers ignores mtp.*: no speculative decoding from these files there.",),
        ),
        layout="hf",
        model_types=("deepseek_v4",),
        compress_ratios=(0, 4, 128),
        expert_scales={"fp4": ("F8_E8M0",), "fp8": ("F8_E8M0", "F32"), "bf16": ()},
        declared={"fp4": ("fp4",), "fp8": ("fp8", ABSENT)},
        undeclared="fp8",
        wo_a=("fp8", "bf16"),
        scale_fmts=("float", "ue8m0"),
        partial_blocks=False,
        needs=(),
        wants=(*TOKENIZER, "generation_config.json"),
        divided=(),
        split_blocks=(("moe_intermediate_size",),),
        caveats=(
            Caveat(text=_DECODED, experts="fp4"),
            Caveat(
                text="DeepGEMM has FP4 kernels for Blackwell only: on a Hopper GPU its advice is an FP8 checkpoint",
                experts="fp4",
            ),
            Caveat(text=_DECODED, experts="fp8"),
            Caveat(
                rule="mtp",
                text="transformers leaves out the draft blocks mtp.*: no speculative decoding",
                mtp=True,
            ),
        ),
    ),
    "reference": Engine(
        target=Target(
            "e8m0",
            "fp8",
            ABSENT,
            ("The reference engine loads its own layout: convert with --layout mp --model-parallel N to run it.",),
        ),
        layout="mp",
        expert_scales={"fp4": ("F8_E8M0",), "fp8": ("F8_E8M0", "F32")},  # F32: its converter passes Base through
        declared={"fp4": ("fp4",), "fp8": (ABSENT,)},
        undeclared="fp8",
        wo_a=("bf16",),
        other_wo_a=("wrong", "{found}; the reference engine holds it in bf16"),
        needs=("config.json", *TOKENIZER),
        wants=(),
        divided=("vocab_size", "num_attention_heads", "o_groups", "n_routed_experts", "index_n_heads"),
        split_blocks=_SPLIT[1:],
        caveats=(),
    ),
}

# `base`: the layout of the official FP8 Base releases, which is no engine's.
TARGETS: dict[str, Target] = {
    "base": Target("f32", "fp8", "fp8"),
    **{name: engine.target for name, engine in ENGINES.items()},
}

# Type checkers take no computed Literal; at run time the command line lists these names and refuses any other.
if TYPE_CHECKING:
    EngineName = str
    TargetName = str
else:
    EngineName = Literal[tuple(ENGINES)]
    TargetName = Literal[tuple(TARGETS)]
