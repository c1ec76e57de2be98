"""A small DeepSeek-V4 checkpoint: preview, with DSpark's draft stages (0731), and with vision."""

from collections.abc import Iterator
from dataclasses import replace

from . import encoder
from .geometry import DSpark, Geometry, config, inference_config
from .release import Release, Tensors
from .tensors import TensorSource

IMAGE_TOKEN = "<｜deepseek_image｜>"  # of the edition with vision


def shards(geometry: Geometry, seed: int, base: bool) -> Iterator[Tensors]:
    """Embedding, one shard per layer, head, one shard per draft stage."""
    source = TensorSource(geometry, seed, base=base)
    yield dict(source.embedding())
    for index in range(geometry.num_hidden_layers):
        yield dict(source.layer(index))
    yield dict(source.head())
    for index in range(geometry.draft_stages):
        yield dict(source.draft_stage(index))


_DRAFTS = Geometry(compress_ratios=(0, 4, 128, 4, 0, 0, 0), dspark=DSpark())
RELEASE = Release(
    Geometry,
    lambda g: g.num_hidden_layers + 2 + g.draft_stages,
    shards,
    config,
    inference_config,
    lambda g: (encoder.FILE, encoder.PREVIEW if g.dspark is None else encoder.RELEASE_0731),
    lambda g: (IMAGE_TOKEN,) if g.vision else (),
    {"v4": Geometry(), "0731": _DRAFTS, "vision-exp": replace(_DRAFTS, vision=True, rms_norm_eps=1e-20)},
)
