"""The choice of compressed keys in V4.1, against loops over every query."""

import pytest
import torch

from dsv4.model.layers.shared_keys import candidate_blocks, groups_outside, in_ascending_order


def candidate_groups(scores: torch.Tensor, visible: torch.Tensor, blocks: int, size: int) -> torch.Tensor:
    return ~groups_outside(candidate_blocks(scores, visible, blocks, size), scores.shape[1], size)


def scores_of(queries: int, groups: int, ratio: int, seed: int, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of the last `queries` positions, with ties where there are few `levels`, and how many are visible."""
    visible = (torch.arange(groups * ratio - queries, groups * ratio) + 1) // ratio
    drawn = torch.randint(0, levels, (queries, groups), generator=torch.Generator().manual_seed(seed))
    scores = drawn.to(torch.float32) - levels / 2
    return scores.masked_fill(torch.arange(groups) >= visible[:, None], -torch.inf), visible


def expected_groups(row: torch.Tensor, visible: int, blocks: int, size: int) -> set[int]:
    """A loop over blocks: the newest first, then by score, the older of equal ones."""
    if visible == 0:
        return set()
    newest = (visible - 1) // size
    best = {b: max(row[b * size : min((b + 1) * size, visible)].tolist()) for b in range(newest + 1)}
    order = sorted(best, key=lambda b: (b != newest, -best[b], b))[:blocks]
    return {g for b in order for g in range(b * size, min((b + 1) * size, len(row)))}


@pytest.mark.parametrize(("groups", "blocks", "size"), [(1, 2, 4), (7, 2, 4), (8, 1, 4), (33, 4, 8), (40, 9, 4)])
@pytest.mark.parametrize("levels", [2, 1000])
def test_candidate_groups(groups: int, blocks: int, size: int, levels: int) -> None:
    queries = groups * 2
    scores, visible = scores_of(queries, groups, 2, groups, levels)
    mask = candidate_groups(scores, visible, blocks, size)
    assert mask.shape == scores.shape
    for row, seen, kept in zip(scores, visible.tolist(), mask, strict=True):
        assert set(kept.nonzero().flatten().tolist()) == expected_groups(row, seen, blocks, size)


def test_more_groups_behind_the_visible_ones_change_nothing() -> None:
    scores, visible = scores_of(6, 12, 1, 1, 5)
    longer = torch.nn.functional.pad(scores, (0, 9), value=-torch.inf)
    mask = candidate_groups(longer, visible, 2, 4)
    assert torch.equal(mask[:, :12], candidate_groups(scores, visible, 2, 4))


def test_ascending_order_keeps_the_gaps_last() -> None:
    chosen = torch.tensor([[5, 2, -1], [-1, -1, -1], [0, 9, 3]], dtype=torch.int32)
    assert in_ascending_order(chosen).tolist() == [[2, 5, -1], [-1, -1, -1], [0, 3, 9]]
