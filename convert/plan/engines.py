"""The engines: what `dsv4 convert` writes for each, what each accepts, and how each is started. One row per engine.

The names that `--target` and `dsv4 doctor --for` take, and the sizes that `dsv4 inspect` lists, come from ENGINES, so
a new engine is a new row. Each row says in `evidence` what was executed, with which version and when; docs/engines.md
gives the evidence for each rule.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Literal, cast

from dsv4.convert.checkpoint.editions.table import ENCODER

Layout = Literal["hf", "mp"]  # what `--layout` writes
FolderLayout = Literal["hf", "mp", "gguf"]  # what an engine reads
ScaleDtype = Literal["e8m0", "f32"]
WoA = Literal["fp8", "bf16"]

# The keys of CONVERSIONS, ENGINES and TARGETS once more: type checkers take no computed Literal. A test compares them.
To = Literal["fp8", "bf16", "fp4", "same", "mxfp8", "mxfp4", "mlx", "nvfp4", "gguf"]
EngineName = Literal["vllm", "sglang", "transformers", "reference", "llama.cpp", "mlx-lm"]
TargetName = Literal["base", "vllm", "sglang", "transformers", "reference"]

V4, V41 = "DeepseekV4ForCausalLM", "DeepseekV41ForCausalLM"
ABSENT = None  # of a key of config.json
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Target:
    """What `convert` writes for an engine.

    scale_dtype: dtype of the block scales of FP8 weights. wo_a: dtype of `attn.wo_a`. expert_dtype: what config.json
    says of FP8 experts, ABSENT if the key must not be there.
    """

    scale_dtype: ScaleDtype
    wo_a: WoA
    expert_dtype: str | None


@dataclass(frozen=True)
class Evidence:
    """How the rules of an engine were checked: its version, the month, and the parts of it that were executed."""

    version: str
    date: str
    executed: str

    def __str__(self) -> str:
        return f"{self.version}, checked {self.date}"


@dataclass(frozen=True, kw_only=True)
class Stored:
    """The formats in a checkpoint that caveats depend on.

    experts, wo_a: formats (fp4, fp8, bf16) of the routed experts and of attn.wo_a. quantized: whether any weight is.
    mtp: whether there are draft blocks.
    """

    layout: FolderLayout
    experts: Set[str]
    wo_a: Set[str]
    quantized: bool
    mtp: bool


@dataclass(frozen=True, kw_only=True)
class Caveat:
    """A warning about starting an engine on a checkpoint with certain formats.

    rule: the rule of `doctor` that reports it. layout, experts: it concerns checkpoints of this layout whose experts
    are all in this format; "" for any. wo_a: it concerns quantized checkpoints whose attn.wo_a is in this format.
    mtp: it concerns checkpoints with draft blocks only. variable: an assignment in the environment of the engine, ""
    if none is needed.
    """

    rule: str = "start"
    text: str
    layout: Layout | Literal[""] = ""
    experts: str = ""
    wo_a: str = ""
    mtp: bool = False
    variable: str = ""

    def concerns(self, stored: Stored) -> bool:
        """Whether it concerns a checkpoint."""
        return (
            self.layout in ("", stored.layout)
            and (not self.experts or stored.experts == {self.experts})
            and (not self.wo_a or (stored.quantized and self.wo_a in stored.wo_a))
            and (stored.mtp or not self.mtp)
        )


@dataclass(frozen=True)
class Split:
    """A dimension that tensor parallel ranks share, the product of config keys: each share must be whole FP8 blocks.

    experts: it holds for checkpoints whose experts are all in this format; "" for any.
    """

    keys: tuple[str, ...]
    experts: str = ""


@dataclass(frozen=True)
class Loader:
    """The Python package of an engine, whose weight loader `dsv4 doctor --python` runs.

    title: its name. tried: versions that dsv4's script for it ran with. decodes: it holds every weight as BF16.
    """

    title: str
    tried: tuple[str, ...]
    decodes: bool = False


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What one engine accepts.

    evidence: what was executed to know it, None if nothing was. target: what `convert --target` writes for it,
    None if that is a form of another tool. layout: of the folders that it reads. forms: those of other tools that it
    was seen to load, and for each the value of `--to` that writes it.
    fixed: config keys that must have one value. refused: config keys that must be absent or empty. model_types,
    compress_ratios, head_dims: values that it knows, () if it takes any. architectures: those whose rules are known.
    expert_scales: format of the experts -> dtypes of their block scales that it reads right; a format that is not a
    key is not known to work. declared: format of the experts -> values of expert_dtype that make it read that format;
    a format that is not a key: it looks at the tensors. undeclared: what it takes experts for if the key is absent.
    wo_a: dtypes of attn.wo_a that it reads right. plain_wo_a: whether it also reads BF16 right where config.json says
    that the layer is not quantized. other_wo_a: status and text of `doctor` for anything else, {found}.
    tables: formats of n-gram tables that it reads right, () if none was tried. not_run: architectures that it knows and
    that were not tried with it, and why.
    scale_fmts: values of scale_fmt that it accepts, the one it assumes first; () if it does not look.
    partial_blocks: whether it reads FP8 weights right whose sides are no multiples of the block.
    needs: side files without which it stops. wants: side files that a user would miss.
    divided: config keys that the number of ranks must divide. splits: what ranks share in whole FP8 blocks.
    serve: the command that starts it on a folder, or on the first of GGUF files, "" if there is none. ranks_option: its
    option for the number of ranks, "" if there is none. loader: the package for `dsv4 doctor --python`, None if there
    is no script for it.
    """

    evidence: Evidence | None
    target: Target | None
    layout: FolderLayout
    forms: Mapping[str, To] = field(default_factory=dict)
    fixed: Mapping[str, int] = field(default_factory=dict)
    refused: tuple[str, ...] = ()
    architectures: tuple[str, ...] = (V4,)
    model_types: tuple[str, ...] = ()
    compress_ratios: tuple[int, ...] = ()
    head_dims: tuple[int, ...] = ()
    expert_scales: dict[str, tuple[str, ...]]
    declared: dict[str, tuple[str | None, ...]]
    undeclared: str
    wo_a: tuple[str, ...]
    plain_wo_a: bool = False
    other_wo_a: tuple[Literal["wrong", "unknown"], str] = ("unknown", "{found}: not known to load")
    tables: tuple[str, ...] = ()
    not_run: Mapping[str, str] = field(default_factory=dict)
    scale_fmts: tuple[str, ...] = ()
    partial_blocks: bool = True
    needs: tuple[str, ...]
    wants: tuple[str, ...]
    divided: tuple[str, ...]
    splits: tuple[Split, ...]
    caveats: tuple[Caveat, ...]
    serve: str = ""
    ranks_option: str = ""
    loader: Loader | None = None


_LOADER = "its config class, choice of quantization and weight loader, on the CPU; no kernel and no forward pass"
_SERVED = (ENCODER, "generation_config.json")
_HEADS, _OUTPUT_GROUPS = Split(("num_attention_heads", "head_dim")), Split(("o_groups", "o_lora_rank"))
_DECODED = "transformers needs the package accelerate; without a GPU it decodes to BF16 while loading"

ENGINES: dict[str, Engine] = {
    "vllm": Engine(
        evidence=Evidence("vLLM 0.33.0", "2026-11", _LOADER),
        target=Target("f32", "fp8", "fp8"),
        layout="hf",
        head_dims=(128, 512),
        not_run={V41: "not run: its loader wants memory for n-gram tables that a GPU can address (UVA)"},
        # It copies the E8M0 bytes of expert scales into float32 as they are; other E8M0 scales it converts by value.
        expert_scales={"fp4": ("F8_E8M0",), "fp8": ("F32",), "bf16": ()},
        declared={"fp4": ("fp4", ABSENT), "fp8": ("fp8",)},
        undeclared="fp4",
        wo_a=("fp8",),
        plain_wo_a=True,
        other_wo_a=("wrong", "{found}: vLLM casts it into an FP8 weight whose scale it never sets, without an error"),
        needs=TOKENIZER,
        wants=_SERVED,
        divided=("num_attention_heads", "o_groups"),
        splits=(Split(("moe_intermediate_size",), experts="fp8"), _HEADS, _OUTPUT_GROUPS),
        caveats=(Caveat(text="vLLM's MoE backend MegaMoE takes FP4 experts only", experts="fp8"),),
        serve="vllm serve",
        ranks_option="--tensor-parallel-size",
        loader=Loader("vLLM", ("0.32.0", "0.33.0")),
    ),
    "sglang": Engine(
        evidence=Evidence("SGLang 0.5.23", "2026-11", _LOADER),
        target=Target("e8m0", "fp8", ABSENT),
        layout="hf",
        architectures=(V4, V41),
        tables=("fp8",),
        expert_scales={"fp4": ("F8_E8M0",), "fp8": ("F8_E8M0", "F32"), "bf16": ()},
        declared={},  # it looks into the header of one routed expert
        undeclared="",
        wo_a=("fp8", "bf16"),
        needs=TOKENIZER,
        wants=_SERVED,
        divided=("num_attention_heads", "o_groups"),
        splits=(Split(("moe_intermediate_size",)), _HEADS, _OUTPUT_GROUPS),
        caveats=(
            Caveat(
                text="SGLang stops at a BF16 wo_a on Blackwell: start it with SGLANG_OPT_FP8_WO_A_GEMM=0",
                wo_a="bf16",
                variable="SGLANG_OPT_FP8_WO_A_GEMM=0",
            ),
            Caveat(text="SGLang warns of an unexpected dtype BF16 and loads every value", experts="bf16"),
        ),
        serve="python -m sglang.launch_server --model-path",
        ranks_option="--tp-size",
        loader=Loader("SGLang", ("0.5.23",)),
    ),
    "transformers": Engine(
        evidence=Evidence("transformers 5.24.0", "2026-11", "every weight and logit, on the CPU; no GPU kernel"),
        target=Target("e8m0", "fp8", "fp8"),
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
        splits=(Split(("moe_intermediate_size",)),),
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
        loader=Loader("transformers", ("5.24.0",), decodes=True),
    ),
    "reference": Engine(
        evidence=None,
        target=Target("e8m0", "fp8", ABSENT),
        layout="mp",
        expert_scales={"fp4": ("F8_E8M0",), "fp8": ("F8_E8M0", "F32")},  # F32: its converter passes Base through
        declared={"fp4": ("fp4",), "fp8": (ABSENT,)},
        undeclared="fp8",
        wo_a=("bf16",),
        other_wo_a=("wrong", "{found}; the reference engine holds it in bf16"),
        needs=("config.json", *TOKENIZER),
        wants=(),
        divided=("vocab_size", "num_attention_heads", "o_groups", "n_routed_experts", "index_n_heads"),
        splits=(_HEADS, _OUTPUT_GROUPS),
        caveats=(
            Caveat(
                text="the reference engine loads rank files: convert with --layout mp --model-parallel N to run it",
                layout="hf",
            ),
        ),
    ),
    "llama.cpp": Engine(
        evidence=Evidence(
            "llama.cpp 0.5.0-dev", "2026-11", "all of it, on the CPU: files of dsv4 loaded, logits compared"
        ),
        target=None,
        layout="gguf",
        forms={"GGUF": "gguf"},
        fixed={"hc_mult": 4},
        model_types=("deepseek_v4",),
        compress_ratios=(0, 4, 128),
        expert_scales={},
        declared={},
        undeclared="",
        wo_a=(),
        needs=(),
        wants=(),
        divided=(),
        splits=(),
        caveats=(Caveat(text="llama.cpp reads the FP4 code of -0 as +0, and rounds activations to 8 bits for MXFP4"),),
        serve="llama-server -m",
    ),
    "mlx-lm": Engine(
        evidence=Evidence(
            "mlx-lm 0.32.2", "2026-11", "its loader, on the CPU: all of a small V4.1 model; no forward pass"
        ),
        target=None,
        layout="hf",
        forms={"MLX": "mlx"},
        refused=("engram_layer_ids",),
        architectures=(V41,),
        model_types=("deepseek_v41",),
        expert_scales={},
        declared={},
        undeclared="",
        wo_a=(),
        needs=(),
        wants=TOKENIZER,
        divided=(),
        splits=(),
        caveats=(Caveat(rule="mtp", text="mlx-lm leaves out the draft blocks: no speculative decoding", mtp=True),),
    ),
}

# `base`: the layout of the official FP8 Base releases, which is no engine's.
TARGETS: dict[TargetName, Target] = {
    "base": Target("f32", "fp8", "fp8"),
    **{cast(TargetName, name): engine.target for name, engine in ENGINES.items() if engine.target is not None},
}


def caveats_of(target: TargetName | EngineName, stored: Stored) -> tuple[Caveat, ...]:
    """What to know before starting a target's engine on a checkpoint that is stored so."""
    engine = ENGINES.get(target)
    return tuple(caveat for caveat in engine.caveats if caveat.concerns(stored)) if engine else ()
