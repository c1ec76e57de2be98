"""The settings of a conversion: the options of one run, completed by what the target engine needs.

`Settings` is made once from the command line and passed in; the rest of the converter does not know the engine.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from dsv4.errors import UsageError

from .engines import ENGINES, TARGETS, Layout, ScaleDtype, TargetName, To, WoA
from .input_scale import InputScale

OnInexact = Literal["error", "keep", "round"]
Dense = Literal["bf16", "q8_0"]

DEFAULT_MAX_SHARD_BYTES = 5 * 10**9
DEFAULT_TARGET: TargetName = "base"


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A value of `--to`.

    help: what it does, for `--help`. recipe: its module in the folder recipes/. keeps_codes: codes stay as they are,
    and so do scales and wo_a unless a target or an option names them. quantized: the output has FP8 weights and block
    scales. scale_dtype: of the block scales where no target is named, None for that of the usual target.
    rank_files: whether the reference engine can run the result. way_back: it reverses another conversion, and is only
    offered for checkpoints with experts that it casts. bf16_experts: the format that BF16 experts get, with all other
    BF16 weights that a release has in FP8; "" if BF16 stays.
    instead: options that have room for values that it has none for, for a message. has_own_form: the output is in the
    form of another tool, which fixes dtypes and has no place for a weight in another format. joins: weights are joined
    to tensors, or the files are no safetensors: the recipe says itself what the shards are. input_scale: the form has
    numbers from a calibration, which the user gives.
    """

    help: str
    recipe: str
    keeps_codes: bool = False
    quantized: bool = True
    scale_dtype: ScaleDtype | None = None
    rank_files: bool = False
    way_back: bool = False
    bf16_experts: Literal["fp4", "fp8", ""] = ""
    instead: str = "--on-inexact round"
    has_own_form: bool = False
    joins: bool = False
    input_scale: bool = False

    @property
    def has_targets(self) -> bool:
        """Whether the size of its output depends on the engine that it is for."""
        return self.quantized and not (self.keeps_codes or self.way_back or self.has_own_form)


CONVERSIONS: dict[To, Conversion] = {
    "fp8": Conversion(
        help="routed experts to FP8",
        recipe="fp4_to_fp8",
        rank_files=True,
        bf16_experts="fp8",
        instead="--to bf16 or --on-inexact round",
    ),
    "bf16": Conversion(help="all to BF16", recipe="bf16", quantized=False),
    "fp4": Conversion(
        help="experts to FP4, the release's form",
        recipe="fp8_to_fp4",
        scale_dtype="e8m0",
        way_back=True,
        bf16_experts="fp4",
    ),
    "same": Conversion(help="no numbers change", recipe="scales", keeps_codes=True, rank_files=True),
    "mxfp8": Conversion(help="MXFP8 of compressed-tensors", recipe="mx.mxfp8", has_own_form=True),
    "mxfp4": Conversion(help="MXFP4 of compressed-tensors", recipe="mx.mxfp4", has_own_form=True),
    "mlx": Conversion(help="for MLX, on Apple's machines", recipe="mx.mlx", has_own_form=True, joins=True),
    "nvfp4": Conversion(
        help="experts as NVIDIA's ModelOpt stores NVFP4",
        recipe="nvfp4",
        has_own_form=True,
        joins=True,
        input_scale=True,
    ),
    "gguf": Conversion(help="for llama.cpp", recipe="gguf.recipe", has_own_form=True, joins=True),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options that decide the bytes of the output. Two runs with equal settings and source write equal files.

    model_parallel: number of rank files, 1 for a Hugging Face folder. scale_dtype, wo_a: None leaves them as the source
    has them. dense: type of the dense FP8 weights in a GGUF file. input_scale: of NVFP4, for activations.
    max_shard_bytes: largest output shard; 0 for rank files, which have no limit.
    """

    to: To
    layout: Layout
    model_parallel: int
    target: TargetName
    scale_dtype: ScaleDtype | None
    wo_a: WoA | None
    on_inexact: OnInexact
    max_shard_bytes: int
    dense: Dense = "bf16"
    input_scale: InputScale | None = None

    def to_json(self) -> dict[str, Any]:
        """The settings for manifest and journal, under the names of the command line's options."""
        return {
            "to": self.to,
            "layout": self.layout,
            "model_parallel": self.model_parallel,
            "target": self.target,
            "scale_dtype": self.scale_dtype,
            "wo_a": self.wo_a,
            "on_inexact": self.on_inexact,
            "max_shard_size": self.max_shard_bytes,
            **({"dense": self.dense} if self.dense != "bf16" else {}),
            **({"input_scale": self.input_scale.described} if self.input_scale else {}),
        }


def check_choice(option: str, value: object, choices: Iterable[str]) -> None:
    """Raises UsageError, in the words of the command line, for a value that an option does not have."""
    if value not in (names := tuple(choices)):
        raise UsageError(f"Invalid value for '{option}': {value!r} is not one of {', '.join(map(repr, names))}.")


def check_count(option: str, value: object) -> None:
    """Raises UsageError, in the words of the command line, for anything but a whole number from 1 on."""
    if type(value) is not int:
        raise UsageError(f"Invalid value for '{option}': {value!r} is not a valid integer.")
    if value < 1:
        raise UsageError(f"Invalid value for '{option}': {value} should be greater than or equal to 1")


def _check_layout(to: To, layout: Layout, model_parallel: int | None, target: TargetName | None) -> None:
    """Raises UsageError for options that do not go with the layout."""
    if layout == "hf":
        if model_parallel is not None:
            raise UsageError("--model-parallel goes with --layout mp", "Add that, or leave out --model-parallel.")
        return
    if model_parallel is None:
        raise UsageError("--layout mp needs --model-parallel N", "N is the number of ranks the engine will run on.")
    check_count("--model-parallel", model_parallel)
    if target is not None and (target not in ENGINES or ENGINES[target].layout != "mp"):
        text = f"--layout mp is the reference engine's; it does not go with --target {target}"
        raise UsageError(text, "Leave out one of them.")
    if not CONVERSIONS[to].rank_files:
        fits = " or ".join(name for name, conversion in CONVERSIONS.items() if conversion.rank_files)
        raise UsageError(f"--layout mp does not go with --to {to}", f"The reference engine runs --to {fits}.")


def _check_own_form(
    to: To, target: TargetName | None, scale_dtype: ScaleDtype | None, wo_a: WoA | None, on_inexact: OnInexact
) -> None:
    """Raises UsageError for options that the form of another tool leaves no room for."""
    if not CONVERSIONS[to].has_own_form:
        return
    if target or scale_dtype or wo_a:
        raise UsageError(f"--to {to} fixes every dtype", "Leave out --target, --scale-dtype and --wo-a.")
    if on_inexact == "keep":
        raise UsageError(
            f"--to {to} has no place for a weight in another format", "Use --on-inexact error (the default) or round."
        )


def _check_input_scale(to: To, given: InputScale | None) -> None:
    """Raises UsageError, saying what an engine does with it, if it is missing or goes with nothing."""
    if given is not None and not CONVERSIONS[to].input_scale:
        raise UsageError(f"--input-scale does not go with --to {to}", "It is for --to nvfp4.")
    if given is None and CONVERSIONS[to].input_scale:
        raise UsageError(
            f"--to {to} needs --input-scale: engines divide activations by it before they round them to FP4",
            "It is the largest activation of a calibration / 2688, and no checkpoint has it: give a JSON file, tensor "
            "name -> number, or 1.0, which leaves the range to the scales of 16 elements. Engines that keep BF16 "
            "activations do not read it.",
        )


def _formats(
    to: To, target: TargetName | None, scale_dtype: ScaleDtype | None, wo_a: WoA | None
) -> tuple[ScaleDtype | None, WoA | None]:
    """Dtypes of the block scales and of wo_a; None leaves them as the source has them."""
    conversion, wanted = CONVERSIONS[to], TARGETS[target or DEFAULT_TARGET]
    if not conversion.quantized:
        if scale_dtype or wo_a == "fp8":
            raise UsageError(f"--to {to} leaves no scales and no FP8", "Leave out --scale-dtype and --wo-a.")
        return None, "bf16"
    if conversion.has_own_form or (conversion.keeps_codes and target is None):
        return scale_dtype, wo_a
    usual = wanted.scale_dtype if target is not None else conversion.scale_dtype or wanted.scale_dtype
    return scale_dtype or usual, wo_a or wanted.wo_a


def resolve(
    to: To = "fp8",
    *,
    layout: Layout = "hf",
    model_parallel: int | None = None,
    target: TargetName | None = None,
    scale_dtype: ScaleDtype | None = None,
    wo_a: WoA | None = None,
    on_inexact: OnInexact = "error",
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    dense: Dense = "bf16",
    input_scale: InputScale | None = None,
) -> Settings:
    """The options of one run, completed by the target's.

    Raises UsageError for a value that an option does not have, and for options that exclude each other.
    """
    check_choice("--to", to, CONVERSIONS)
    check_choice("--layout", layout, get_args(Layout))
    check_choice("--on-inexact", on_inexact, get_args(OnInexact))
    check_choice("--dense", dense, get_args(Dense))
    if dense != "bf16" and to != "gguf":
        raise UsageError(f"--dense {dense} goes with --to gguf")
    _check_input_scale(to, input_scale)
    for option, value, choices in (
        ("--target", target, TARGETS),
        ("--scale-dtype", scale_dtype, get_args(ScaleDtype)),
        ("--wo-a", wo_a, get_args(WoA)),
    ):
        if value is not None:
            check_choice(option, value, choices)
    _check_layout(to, layout, model_parallel, target)
    _check_own_form(to, target, scale_dtype, wo_a, on_inexact)
    if layout == "mp":
        if scale_dtype or wo_a:
            raise UsageError("--layout mp fixes the scale dtype and wo_a", "Leave out --scale-dtype and --wo-a.")
        target, wo_a, max_shard_bytes = "reference", "bf16", 0
    else:
        scale_dtype, wo_a = _formats(to, target, scale_dtype, wo_a)
    return Settings(
        to=to,
        layout=layout,
        model_parallel=model_parallel or 1,
        target=target or DEFAULT_TARGET,
        scale_dtype=scale_dtype,
        wo_a=wo_a,
        on_inexact=on_inexact,
        max_shard_bytes=max_shard_bytes,
        dense=dense,
        input_scale=input_scale,
    )
