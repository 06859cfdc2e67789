import numpy as np
import pytest
import torch

from ltrain.config.base import ConfigError
from ltrain.parallel.layout import SequenceLayout

KINDS = ["striped", "zigzag", "contiguous"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens", [0, 1, 63, 128, 1000, 1024])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_unshard_inverts_shard(kind, num_tokens, world_size):
    layout = SequenceLayout(kind, num_tokens, world_size, block=16)
    x = torch.arange(num_tokens * 2).view(1, num_tokens, 2)
    shards = [layout.shard(x, rank, 1) for rank in range(world_size)]
    assert [s.shape[1] for s in shards] == list(layout.lengths)
    assert torch.equal(layout.unshard(shards, 1), x)
    for rank, shard in enumerate(shards):
        assert torch.equal(layout.positions(rank).long(), shard[0, :, 0] // 2)
        assert torch.all(layout.positions(rank).diff() > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_shards_are_even(kind):
    for num_tokens in (1000, 4096, 16 * 37):
        lengths = SequenceLayout(kind, num_tokens, 4, block=16).lengths
        assert max(lengths) - min(lengths) <= 32


def test_a_causal_mask_is_even_over_ranks_when_striped_or_zigzag():
    def spread(kind):
        layout = SequenceLayout(kind, 64 * 128, 4, block=128)
        work = [sum(int(b) + 1 for b in layout.blocks(rank)) for rank in range(4)]
        return max(work) / np.mean(work)

    assert spread("zigzag") == 1.0
    assert spread("striped") < 1.05 < spread("contiguous")


def test_dealt_blocks():
    layout = SequenceLayout.dealt([1, 0, 1, 1], num_tokens=50, world_size=3, block=16)
    assert layout.lengths == (16, 34, 0)
    assert layout.positions(0).tolist() == list(range(16, 32))
    x = torch.arange(50)
    assert torch.equal(layout.unshard([layout.shard(x, r, 0) for r in range(3)], 0), x)


@pytest.mark.parametrize(
    "arguments,field",
    [
        (("striped", -1, 2), "num_tokens"),
        (("striped", 10, 0), "world_size"),
        (("striped", 10, 2, 0), "block"),
        (("spiral", 10, 2), "kind"),
        (("dealt", 10, 2, 5), "owners"),
        (("dealt", 10, 2, 5, (0, 2)), "owners"),
        (("dealt", 10, 2, 5, (0,)), "owners"),
    ],
)
def test_bad_input_names_the_field(arguments, field):
    with pytest.raises(ConfigError, match=rf"layout\.{field}="):
        SequenceLayout(*arguments)


def test_wrong_lengths_are_refused():
    layout = SequenceLayout("striped", 10, 2, 4)
    with pytest.raises(ValueError, match="num_tokens=10"):
        layout.shard(torch.zeros(9), 0, 0)
    with pytest.raises(ValueError, match="must be 6"):
        layout.unshard([torch.zeros(5), torch.zeros(4)], 0)
