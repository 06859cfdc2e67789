"""The index: forms, constructors, transpose, sub-rectangles, errors."""

from __future__ import annotations

import pytest
import torch

from ltrain_kernels.block_sparse import ArgumentError, BlockIndex, dense, prepare, sliding_window, strided


def random_mask(*shape, density=0.4, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def closed_mask(index):
    """The definition of the closed family, entry by entry."""
    n = index.num_rows
    mask = torch.zeros(1, index.heads, n, n, dtype=torch.bool)
    for h, (local, sinks, stride, residue) in enumerate(index.params.tolist()):
        for i in range(n):
            for j in range(i + 1):
                mask[0, h, i, j] = i - j < local or j < sinks or (stride > 0 and j % stride == residue)
    return mask


CLOSED = {
    "dense": dense(1000, 64, num_heads=2),
    "window": sliding_window(1000, 64, local=3),
    "sink_window": sliding_window(1000, 64, local=2, sinks=3, num_heads=2),
    "s2": strided(1500, 64, local=3, stride=4, residues=[0, 3, 2, 1]),
    "s2_sinks": strided(1500, 64, local=1, stride=5, residues=[0, 4, 2], sinks=7, dense_heads=[1]),
    "wide_sinks": strided(300, 64, local=9, stride=2, residues=[1], sinks=50),
    "one_block": strided(10, 64, local=2, stride=3, residues=[2, 0]),
    "no_tokens": dense(0, 64),
}


@pytest.mark.parametrize("shape", [(1, 1, 5, 7), (2, 3, 8, 4), (1, 2, 0, 3), (1, 2, 3, 0)])
def test_mask_round_trip_and_transpose(shape):
    mask = random_mask(*shape)
    index = BlockIndex.from_mask(mask, 16, 32)
    assert torch.equal(index.to_mask(), mask) and index.nnz == int(mask.sum())
    transposed = index.transpose()
    assert torch.equal(transposed.to_mask(), mask.transpose(2, 3))
    assert (transposed.block_q, transposed.block_k) == (32, 16)
    assert torch.equal(transposed.transpose().to_mask(), mask)
    assert transposed is index.transpose()
    held = (index.row_ptr, index.col, transposed.row_ptr, transposed.col)
    assert index.nbytes == sum(x.nbytes for x in held)


@pytest.mark.parametrize("name", CLOSED)
def test_closed_form_is_its_definition(name):
    index = CLOSED[name]
    mask = closed_mask(index)
    assert torch.equal(index.to_mask(), mask) and index.nnz == int(mask.sum())
    assert torch.equal(index.to_lists().to_mask(), mask)
    transposed = index.transpose()
    assert torch.equal(transposed.to_mask(), mask.transpose(2, 3)) and transposed.nnz == index.nnz
    assert index.density() == pytest.approx(
        mask.float().sum().item()
        / max(mask.shape[1] * mask[0, 0].numel(), 1)
        * (2 * mask.shape[2] / (mask.shape[2] + 1) if mask.shape[2] else 1)
    )


def test_n_visible_and_nth():
    index = CLOSED["s2_sinks"]
    for side in (index, index.transpose()):
        mask = side.to_mask()[0]
        for h in range(side.heads):
            for i in range(side.num_rows):
                n = int(side.n_visible(torch.tensor(h), torch.tensor(i)))
                got = side.nth(torch.tensor(h), torch.tensor(i), torch.arange(n))
                assert torch.equal(got, mask[h, i].nonzero()[:, 0])


def test_million_tokens_take_no_memory():
    index = strided(1 << 20, 64, local=8, stride=32, residues=[(-h) % 32 for h in range(8)])
    assert index.num_rows == 16384 and index.nbytes + index.transpose().nbytes < 10_000_000
    counts = index.counts()
    assert counts.shape == (1, 8, 16384) and 0.030 < index.density() < 0.034


@pytest.mark.parametrize("name", ["s2_sinks", "lists", "batched"])
def test_select(name):
    index = (
        CLOSED[name]
        if name in CLOSED
        else BlockIndex.from_mask(random_mask(2 if name == "batched" else 1, 2, 24, 24), 64, 64)
    )
    mask = index.to_mask()
    for rows, cols in (([1, 5, 9], [0, 4, 8, 12]), ([7, 2], [9, 3, 5]), ([], [1]), ([3], [])):
        part = index.select(rows, cols)
        assert torch.equal(part.to_mask(), mask[:, :, rows][..., cols])
        assert torch.equal(part.transpose().to_mask(), mask[:, :, rows][..., cols].transpose(2, 3))
    heads = [1, 0]
    assert torch.equal(index.select_heads(heads).to_mask(), mask[:, heads])


def test_lists_are_made_canonical():
    ids = torch.tensor([[[[2, -1, 0], [1, 2, 3]]]])
    index = BlockIndex.from_rows(ids, 4, 16, 16)
    assert index.col.tolist() == [0, 2, 1, 2, 3] and index.row_ptr.tolist() == [[[0, 2, 5]]]
    repeated = torch.tensor([[[[2, 2, 0], [1, -1, 1]]]])
    assert BlockIndex.from_rows(repeated, 4, 16, 16, allow_repeats=True).col.tolist() == [0, 2, 1]
    assert BlockIndex.from_rows(ids, 4, 16, 16, causal=True).col.tolist() == [0, 1]
    same = BlockIndex.from_csr(torch.tensor([[[0, 2, 5]]]), torch.tensor([2, 0, 3, 1, 2]), 4, 16, 16)
    assert torch.equal(same.to_mask(), index.to_mask())


def test_future_blocks():
    mask = torch.ones(1, 1, 4, 8, dtype=torch.bool)
    kept = BlockIndex.from_mask(mask, 32, 16, causal=True).to_mask()[0, 0]
    assert torch.equal(
        kept, torch.ones(4, 8).tril(1).bool() | (torch.arange(8) // 2 <= torch.arange(4)[:, None])
    )


@pytest.mark.parametrize(
    "make,argument",
    [
        (lambda: BlockIndex.from_mask(torch.ones(1, 1, 2, 2), 16, 16), "mask.dtype"),
        (lambda: BlockIndex.from_mask(torch.ones(2, 2, dtype=torch.bool), 16, 16), "mask.shape"),
        (lambda: BlockIndex.from_mask(torch.ones(1, 1, 2, 2, dtype=torch.bool), 0, 16), "block_q"),
        (lambda: BlockIndex.from_rows(torch.tensor([[[[0, -2]]]]), 4, 16, 16), "ids"),
        (lambda: BlockIndex.from_rows(torch.tensor([[[[0, 4]]]]), 4, 16, 16), "ids"),
        (lambda: BlockIndex.from_rows(torch.tensor([[[[3, 3]]]]), 4, 16, 16), "ids"),
        (lambda: BlockIndex.from_rows(torch.tensor([[[[0.5]]]]), 4, 16, 16), "ids.dtype"),
        (lambda: BlockIndex.from_csr(torch.tensor([[[0, 3]]]), torch.tensor([0]), 4, 16, 16), "row_ptr"),
        (lambda: BlockIndex.from_csr(torch.tensor([[[0, 2, 1]]]), torch.tensor([0]), 4, 16, 16), "row_ptr"),
        (lambda: BlockIndex.from_csr(torch.tensor([[[0, 2]]]), torch.tensor([1, 1]), 4, 16, 16), "col"),
        (lambda: BlockIndex.from_csr(torch.tensor([[[0, 1]]]), torch.tensor([-1]), 4, 16, 16), "col"),
        (lambda: strided(100, 16, local=0, stride=2, residues=[0]), "local"),
        (lambda: strided(100, 16, local=1, stride=2, residues=[2]), "residues"),
        (lambda: dense(100, 16).select([7], [0]), "row_blocks"),
        (lambda: dense(100, 16).select([0], [1, 1]), "col_blocks"),
    ],
)
def test_bad_input_is_named(make, argument):
    with pytest.raises(ArgumentError) as error:
        make()
    assert error.value.argument == argument and str(error.value.rule) in str(error.value)


def classify(plan):
    """Bool [B, H, R, C] pairs (full, partial) from the plan's rows, and the same from its columns."""
    made = []
    for lists, other in ((plan.rows, plan.index.num_cols), (plan.cols, plan.index.num_rows)):
        batch, heads, n = lists.mid.shape
        pair = torch.zeros(2, batch, heads, n, other, dtype=torch.bool)
        for b in range(batch):
            for h in range(heads):
                for i in range(n):
                    low, mid, high = lists.ptr[b, h, i], lists.mid[b, h, i], lists.ptr[b, h, i + 1]
                    for part, (x, y) in enumerate(((low, mid), (mid, high))):
                        ids = lists.ids[x:y].long()
                        assert torch.equal(ids, ids.sort().values)
                        pair[part, b, h, i, ids] = True
        made.append(pair)
    return made[0], made[1].transpose(3, 4)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("docs", [False, True])
@pytest.mark.parametrize("window", [None, 30])
def test_plan_classifies_by_token_masks(batch, docs, window):
    block, tq, tk = 8, 60, 64
    mask = random_mask(1, 2, 8, 8, density=0.8)
    index = BlockIndex.from_mask(mask, block, block)
    rng = torch.Generator().manual_seed(3)
    q_pos = torch.stack(
        [torch.randperm(8, generator=rng)[:, None] * block + torch.arange(block) for _ in range(batch)]
    )
    q_pos = q_pos.reshape(batch, -1)[:, :tq].to(torch.int32)
    k_pos = torch.arange(tk, dtype=torch.int32)
    doc = torch.bucketize(torch.arange(tk), torch.tensor([20, 40]), right=True).to(torch.int32)
    q_doc, k_doc = (doc[q_pos.long()], doc) if docs else (None, None)
    plan = prepare(index, q_pos=q_pos, k_pos=k_pos, q_doc=q_doc, k_doc=k_doc, window=window)
    (full, partial), (full_t, partial_t) = classify(plan)
    assert torch.equal(full, full_t) and torch.equal(partial, partial_t)
    for b in range(batch):
        seen = k_pos <= q_pos[b][:, None]
        if docs:
            seen &= q_doc[b][:, None] == k_doc
        if window is not None:
            seen &= q_pos[b][:, None] - k_pos < window
        blocks = torch.nn.functional.pad(seen, (0, 0, 0, 4)).view(8, block, 8, block)
        any_seen, all_seen = blocks.any(3).any(1), blocks.all(3).all(1)
        assert torch.equal(full[b], mask[0] & all_seen)
        # Nothing visible may be lost; positions' ranges may keep a few blocks that hold nothing.
        assert torch.equal(full[b] | partial[b], (full[b] | partial[b]) | (mask[0] & any_seen))
        assert not (partial[b] & ~mask[0]).any()
    assert prepare(index, q_pos=q_pos, k_pos=k_pos, q_doc=q_doc, k_doc=k_doc, window=window) is plan
    k_pos += 1
    assert prepare(index, q_pos=q_pos, k_pos=k_pos, q_doc=q_doc, k_doc=k_doc, window=window) is not plan


def test_future_blocks_cost_nothing():
    index = BlockIndex.from_mask(torch.ones(1, 1, 8, 8, dtype=torch.bool), 16, 16)
    pos = torch.arange(128)
    assert prepare(index, q_pos=pos, k_pos=pos).nnz == 36
    closed = prepare(dense(128, 16), q_pos=pos, k_pos=pos)
    assert closed.nnz == 36 and int((closed.rows.mid - closed.rows.ptr[..., :-1]).sum()) == 28


@pytest.mark.parametrize(
    "options,argument",
    [
        ({"q_pos": torch.arange(99)}, "index.num_rows"),
        ({"k_pos": torch.arange(300)}, "index.num_cols"),
        ({"q_pos": torch.arange(128.0)}, "q_pos.dtype"),
        ({"q_doc": torch.zeros(128, dtype=torch.int32)}, "q_doc, k_doc"),
        ({"window": 0}, "window"),
        ({"q_pos": torch.arange(128).repeat(2, 1), "k_pos": torch.arange(128).repeat(3, 1)}, "batch"),
    ],
)
def test_bad_positions_are_named(options, argument):
    with pytest.raises(ArgumentError) as error:
        prepare(dense(128, 16), **{"q_pos": torch.arange(128), "k_pos": torch.arange(128), **options})
    assert error.value.argument == argument
