import pytest

from ltrain.planner.groups import block_owners, shard_lengths
from ltrain.train.planned import stream_tokens


@pytest.mark.parametrize("multiple", [1, 2])
@pytest.mark.parametrize("weights", [(1.0,), (0.25,) * 4, (0.5, 0.375, 0.125), (0.05, 0.95), (1 / 3,) * 3])
def test_a_padded_stream_leaves_no_member_empty(weights, multiple) -> None:
    for tokens in (0, 1, 15, 16, 17, 100, 1001):
        padded = stream_tokens(tokens, weights, 16, multiple)
        assert padded >= max(tokens, 1) and padded % multiple == 0
        lengths = shard_lengths(block_owners(padded, weights, 16), padded, len(weights), 16)
        assert sum(lengths) == padded and min(lengths) >= 1
        assert all(n % multiple == 0 for n in lengths)
        if tokens > 500:
            assert padded - tokens < multiple
