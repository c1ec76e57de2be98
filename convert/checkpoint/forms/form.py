"""Another way to store a release's numbers: with other names and dtypes, described by another config.

A form is read by renaming, and by taking stacks of matrices apart. `Checkpoint.tensors` has the release's names and
dtypes, and `Checkpoint.config` the release's keys; only the offsets are those of the files. Conversions, `run`,
`inspect` and `doctor` then work on every form. Nothing is decoded here: weights.py classifies the tensors by dtype and
name.

A new form is a new file with a class like `Form`, and a row of FORMS in table.py.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from dsv4.convert.checkpoint.config import Config

from .tensor import TensorInfo

MX_BLOCK = (1, 32)  # elements that share one scale in the MX formats


class Form(Protocol):
    """One way of storing the numbers of a release. name: for messages; "" for the release's own."""

    name: str

    def tensor_name(self, name: str) -> str:
        """The release's name of a stored tensor; of a stack, of its first matrix."""
        ...

    def tensors(self, stored: Mapping[str, TensorInfo]) -> Iterable[TensorInfo]:
        """The tensors of a release that the stored ones hold, with its dtypes: I8 for FP4, F8_E8M0 for scales.

        Raises InputError, naming the tensor, for one that cannot be read.
        """
        ...

    def stored_config(self, config: Config) -> dict[str, Any]:
        """The config in the release's keys: `weight_block_size` and `expert_dtype` say how weights are stored here."""
        ...

    def released_config(self, config: Config) -> dict[str, Any]:
        """The release's config for the same model, from which a conversion back starts."""
        ...


class Released:
    """The release's own form: nothing is renamed."""

    name = ""

    def tensor_name(self, name: str) -> str:
        """The same name."""
        return name

    def tensors(self, stored: Mapping[str, TensorInfo]) -> Iterable[TensorInfo]:
        """The same tensors."""
        return stored.values()

    def stored_config(self, config: Config) -> dict[str, Any]:
        """A copy of the config."""
        return dict(config)

    def released_config(self, config: Config) -> dict[str, Any]:
        """A copy of the config."""
        return dict(config)


RELEASED: Form = Released()
