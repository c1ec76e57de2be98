"""The share of the blocks that `verify --sample` compares, as it is given."""

from dataclasses import dataclass

from dsv4.errors import UsageError


@dataclass(frozen=True)
class Sample:
    """A share of the blocks, in (0, 1], and the seed of the draw."""

    share: float
    seed: int = 0


def parse_sample(sample: str | float | None, seed: int = 0) -> Sample | None:
    """`5%`, `0.05` or 0.05 -> a share of 0.05. Raises UsageError unless it is in (0, 1]."""
    if sample is None:
        return None
    text = str(sample)
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UsageError(f"'{text}' is not a share", "Write a percentage, such as --sample 5%.")
    return Sample(share, seed)
