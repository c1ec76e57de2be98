"""Which keys a query sees, by plain loops over positions."""

import pytest

from dsv4.model.layers.attention import finished_blocks, window_rows


@pytest.mark.parametrize("ratio", [4, 128])
@pytest.mark.parametrize("count", [1, 3, 140])
def test_a_block_is_seen_from_its_last_token_on(ratio: int, count: int) -> None:
    for position in (0, 1, ratio - 2, ratio - 1, ratio, 2 * ratio - 1):
        blocks = (position + count) // ratio
        expected = [
            [block if (block + 1) * ratio - 1 <= query else -1 for block in range(blocks)]
            for query in range(position, position + count)
        ]
        assert finished_blocks(position, count, blocks, ratio).tolist() == expected


@pytest.mark.parametrize("window", [1, 5])
def test_the_window_ends_with_the_query(window: int) -> None:
    for position, first in ((0, 0), (3, 0), (9, 4)):
        expected = []
        for query in range(position, position + 7):
            seen = [key - first for key in range(max(0, query - window + 1), query + 1)]
            expected.append(seen + [-1] * (window - len(seen)))
        assert window_rows(position, 7, first, window).tolist() == expected
