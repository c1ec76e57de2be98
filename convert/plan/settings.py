"""What to convert to: the options of one run, completed by what the target engine needs.

`Settings` is decided once from the command line and passed in; the rest of the converter never asks which engine it
works for.
"""

from dataclasses import dataclass
from typing import Any, Literal

from dsv4.errors import UsageError

from .engines import ENGINES, TARGETS, Layout, ScaleDtype, TargetName, WoA

To = Literal["fp8", "bf16", "fp4", "same"]
OnInexact = Literal["error", "keep", "round"]

DEFAULT_MAX_SHARD_BYTES = 5 * 10**9
DEFAULT_TARGET: TargetName = "base"


@dataclass(frozen=True)
class Conversion:
    """A value of `--to`. recipe: the module of the folder recipes/ that does it."""

    recipe: str


CONVERSIONS: dict[To, Conversion] = {
    "fp8": Conversion("fp4_to_fp8"),
    "bf16": Conversion("bf16"),
    "fp4": Conversion("fp8_to_fp4"),
    "same": Conversion("scales"),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides the bytes of the output. Two runs with equal settings and source write equal files.

    model_parallel: number of rank files, 1 for a Hugging Face folder. scale_dtype, wo_a: None leaves them as the source
    has them. max_shard_bytes: largest output shard; 0 for rank files, which have no limit.
    """

    to: To
    layout: Layout
    model_parallel: int
    target: TargetName
    scale_dtype: ScaleDtype | None
    wo_a: WoA | None
    on_inexact: OnInexact
    max_shard_bytes: int

    def to_json(self) -> dict[str, Any]:
        """For manifest and journal, by the names of the command line's options."""
        return {
            "to": self.to,
            "layout": self.layout,
            "model_parallel": self.model_parallel,
            "target": self.target,
            "scale_dtype": self.scale_dtype,
            "wo_a": self.wo_a,
            "on_inexact": self.on_inexact,
            "max_shard_size": self.max_shard_bytes,
        }


def _check(to: To, layout: Layout, model_parallel: int | None, target: TargetName | None) -> None:
    if target not in (None, *TARGETS):
        raise UsageError(f"there is no target {target!r}", f"Targets are {', '.join(TARGETS)}.")
    if layout == "mp" and model_parallel is None:
        raise UsageError("--layout mp needs --model-parallel N", "N is the number of ranks the engine will run on.")
    if layout == "hf" and model_parallel is not None:
        raise UsageError("--model-parallel goes with --layout mp")
    if layout == "mp" and target is not None and (target not in ENGINES or ENGINES[target].layout != "mp"):
        raise UsageError(f"--layout mp is the reference engine's; it does not go with --target {target}")
    if layout == "mp" and to in ("bf16", "fp4"):
        raise UsageError(
            f"--layout mp does not go with --to {to}", "The reference engine runs fp8 or the source (same)."
        )


def _formats(
    to: To, target: TargetName | None, scale_dtype: ScaleDtype | None, wo_a: WoA | None
) -> tuple[ScaleDtype | None, WoA | None]:
    """Dtypes of the block scales and of wo_a; None leaves them as the source has them."""
    if to == "bf16":
        if scale_dtype or wo_a == "fp8":
            raise UsageError("--to bf16 leaves no scales and no FP8", "Leave out --scale-dtype and --wo-a.")
        return None, "bf16"
    if to == "same" and target is None:
        return scale_dtype, wo_a
    wanted = TARGETS[target or DEFAULT_TARGET]
    usual: ScaleDtype = "e8m0" if to == "fp4" and target is None else wanted.scale_dtype
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
) -> Settings:
    """The options of one run, completed by the target's. Raises UsageError for options that exclude each other.

    `same` leaves scales and wo_a alone unless a target or an option names them; `fp4` is the layout of the instruct
    releases, whose scales are E8M0; the reference engine fixes the mp layout.
    """
    _check(to, layout, model_parallel, target)
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
    )
