"""Quantizations that other tools write and dsv4 does not read, by their field names: AWQ, GPTQ and others.

A checkpoint shows its quantization in two places: in config.json (`quantization_config`, or MLX's `quantization`), and
in the names of its tensors. Either is enough. A new quantization is a new row of FOREIGN. For a
`quant_method` without a row, messages give its value in the config.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from dsv4.errors import InputError

from .config import Config, config_value

HINT = "dsv4 reads FP4, FP8 and BF16 as DeepSeek releases them: take the release."
RELEASED_METHOD = "fp8"  # quantization_config.quant_method of the releases


@dataclass(frozen=True)
class ForeignQuantization:
    """A quantization that dsv4 does not read, and where the checkpoint shows it."""

    name: str
    evidence: str

    def __str__(self) -> str:
        """For a message: `quantized as AWQ (quantization_config.quant_method is awq), which dsv4 does not read`."""
        return f"quantized as {self.name} ({self.evidence}), which dsv4 does not read"


@dataclass(frozen=True)
class _Row:
    """How one quantization is recognised.

    config: path of a key of config.json -> values that say it, in lower case; () for any value. tensors: last parts of
    tensor names that occur together in no other quantization. scheme: path of the key that says which of its schemes.
    """

    name: str
    config: dict[str, tuple[str, ...]]
    tensors: tuple[str, ...] = ()
    scheme: str = ""


_METHOD = "quantization_config.quant_method"

FOREIGN = (
    _Row(
        "compressed-tensors",
        {_METHOD: ("compressed-tensors",)},
        ("weight_packed",),
        scheme="quantization_config.format",
    ),
    _Row(
        "NVFP4 of NVIDIA ModelOpt",
        {"quantization_config.quant_algo": ("nvfp4",), "quantization_config.moe_quant_algo": ("nvfp4",)},
        ("weight_scale_2",),
    ),
    _Row(
        "NVIDIA ModelOpt",
        {_METHOD: ("modelopt", "modelopt_fp4", "modelopt_mixed")},
        scheme="quantization_config.quant_algo",
    ),
    _Row("GPTQ", {_METHOD: ("gptq",)}, ("qweight", "g_idx")),
    _Row("AWQ", {_METHOD: ("awq",)}, ("qweight", "qzeros")),
    _Row("INT8 of Ascend ModelSlim", {_METHOD: ("ascend", "modelslim")}, ("weight_offset",)),
    _Row("MLX", {"quantization.bits": ()}, ("weight", "scales"), scheme="quantization.mode"),
)


def _in_config(row: _Row, config: Config) -> str | None:
    for path, values in row.config.items():
        found = config_value(config, path)
        if isinstance(found, (str, int)) and (not values or str(found).lower() in values):
            return f"{path} is {found}"
    return None


def _in_tensors(row: _Row, first_with: dict[str, str]) -> str | None:
    if not row.tensors or not set(row.tensors) <= set(first_with):
        return None
    return f"there is {first_with[row.tensors[-1]]}"


def foreign_quantization(config: Config, names: Iterable[str]) -> ForeignQuantization | None:
    """The quantization that config.json or the names of the tensors show; None for those that dsv4 reads."""
    first_with: dict[str, str] = {}
    for name in names:
        first_with.setdefault(name.rpartition(".")[2], name)
    for row in FOREIGN:
        evidence = _in_config(row, config) or _in_tensors(row, first_with)
        if evidence:
            scheme = config_value(config, row.scheme)
            return ForeignQuantization(f"{row.name} ({scheme})" if isinstance(scheme, str) else row.name, evidence)
    method = config_value(config, _METHOD)
    if isinstance(method, str) and method.lower() != RELEASED_METHOD:
        return ForeignQuantization(method, f"{_METHOD} is {method}")
    return None


def refuse_foreign(config: Config, names: Iterable[str]) -> None:
    """Raises InputError, naming the quantization, for a checkpoint that `foreign_quantization` recognises."""
    foreign = foreign_quantization(config, names)
    if foreign is not None:
        raise InputError(f"the checkpoint is {foreign}", HINT)
