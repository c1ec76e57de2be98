"""The command line of `dsv4 convert`: every option with its help, and which of them exclude each other."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from dsv4.convert.plan.engines import Layout, ScaleDtype, TargetName, To, WoA
from dsv4.convert.plan.input_scale import read_input_scale
from dsv4.convert.plan.settings import CONVERSIONS, Dense, OnInexact, Settings, resolve
from dsv4.errors import UsageError
from dsv4.machine import parse_size
from dsv4.options import (
    CacheDir,
    Json,
    MaxMemory,
    MaxWorkers,
    Quiet,
    Revision,
    Scratch,
    Token,
    Verbose,
    as_folder,
    named,
)

SMALLEST_BARE_SIZE = 1000  # a smaller number without a unit was meant as gigabytes


def shard_bytes(size: str) -> int:
    """Bytes of --max-shard-size. Raises UsageError for a small number without a unit."""
    count = parse_size(size)
    if size.strip().isdigit() and count < SMALLEST_BARE_SIZE:
        raise UsageError(f"--max-shard-size {size} is {size} bytes", f"Write the unit: {size.strip()}GB.")
    return count


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """The command line of one `dsv4 convert`. Raises UsageError for options that contradict each other."""

    source: Annotated[str, typer.Argument(parser=named, metavar="SOURCE", help="Folder, hf:org/name or ms:org/name.")]
    output_folder: Annotated[
        Path,
        typer.Argument(
            parser=as_folder, metavar="OUTPUT", help="Output folder: new, empty, or from an earlier dsv4 run."
        ),
    ]
    to: Annotated[
        To,
        typer.Option(help=" ".join(f"{name}: {conversion.help}." for name, conversion in CONVERSIONS.items())),
    ] = "fp8"
    layout: Annotated[
        Layout, typer.Option(help="hf: one Hugging Face folder. mp: the reference engine's rank files.")
    ] = "hf"
    model_parallel: Annotated[int | None, typer.Option(metavar="N", min=1, help="Ranks of --layout mp.")] = None
    target: Annotated[TargetName | None, typer.Option(help="Engine to write for. Default: base.")] = None
    scale_dtype: Annotated[
        ScaleDtype | None, typer.Option(help="Dtype of FP8 block scales, instead of the target's.")
    ] = None
    wo_a: Annotated[WoA | None, typer.Option(help="Dtype of attn.wo_a, instead of the target's.")] = None
    on_inexact: Annotated[
        OnInexact, typer.Option(help="What to do with a block without an exact form; keep: leave its tensor as it is.")
    ] = "error"
    dense: Annotated[
        Dense,
        typer.Option(help="With --to gguf: dense FP8 weights as bf16, exact, or as q8_0, rounded, in half the bytes."),
    ] = "bf16"
    input_scale: Annotated[
        str | None,
        typer.Option(
            metavar="1.0|FILE",
            help="With --to nvfp4: engines divide activations by it. A number, or a JSON file: tensor name -> number.",
        ),
    ] = None
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest output shard.")] = "5GB"
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False
    any_model: Annotated[
        bool, typer.Option("--any-model", help="Also convert other models, by the dtypes and names of tensors alone.")
    ] = False
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what dsv4 wrote into OUTPUT before.")] = False
    revision: Revision = None
    cache_dir: CacheDir = None
    scratch: Scratch = 2
    keep_source: Annotated[bool, typer.Option("--keep-source", help="Leave a hub's shards in its library's cache.")] = (
        False
    )
    token: Token = None
    part: Annotated[
        str | None, typer.Option(metavar="I/N", help="Write only the I-th of N shares of the shards; then --finish.")
    ] = None
    finish: Annotated[
        bool, typer.Option("--finish", help="Check what all parts wrote, and publish index, config and manifest.")
    ] = False
    max_workers: MaxWorkers = None
    max_memory: MaxMemory = None
    json: Json = False
    quiet: Quiet = False
    verbose: Verbose = False

    def settings(self) -> Settings:
        """The options that decide the bytes of the output. Raises UsageError for options that exclude each other."""
        return resolve(
            self.to,
            layout=self.layout,
            model_parallel=self.model_parallel,
            target=self.target,
            scale_dtype=self.scale_dtype,
            wo_a=self.wo_a,
            on_inexact=self.on_inexact,
            max_shard_bytes=shard_bytes(self.max_shard_size),
            dense=self.dense,
            input_scale=None if self.input_scale is None else read_input_scale(self.input_scale),
        )

    def memory(self) -> int | None:
        """Most bytes of memory that the process may use; None without --max-memory."""
        return None if self.max_memory is None else parse_size(self.max_memory)
