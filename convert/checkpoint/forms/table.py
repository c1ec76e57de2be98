"""The forms that are read, one row each: how a config is recognised, and the class that reads it."""

from collections.abc import Callable

from dsv4.convert.checkpoint.config import Config

from .compressed_tensors import COMPRESSED_TENSORS, is_mx
from .form import RELEASED, Form
from .mlx import MLX, is_mlx
from .nvfp4 import NVFP4, is_nvfp4

FORMS: tuple[tuple[Callable[[Config], bool], Form], ...] = (
    (is_mx, COMPRESSED_TENSORS),
    (is_mlx, MLX),
    (is_nvfp4, NVFP4),
)


def form_of(config: Config) -> Form:
    """The form that a config.json describes; the release's own if it describes no other."""
    return next((form for describes, form in FORMS if describes(config)), RELEASED)
