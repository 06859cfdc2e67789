"""seer_gate learns the block-pooled attention map; nsa's branches equal their definition and start
dense-like.
"""

import numpy as np
import pytest
import torch
from support.lockstep import places, run_lockstep

from ltrain.attention import patterns
from ltrain.attention.patterns.kinds.seer_gate import distillation
from ltrain.parallel.layout import SequenceLayout
from ltrain_kernels.block_sparse import block_sparse_attention

BLOCK, T = 16, 200
DOCS = torch.tensor([5] * 70 + [1] * 130)


def inputs(dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(1, T, heads, 8, dtype=dtype) for heads in (4, 2, 2)]


@pytest.mark.parametrize("docs", [None, DOCS])
def test_target_is_the_pooled_attention_of_the_rows(docs):
    q, k, _ = inputs()
    pattern = patterns.seer_gate(target_rows=4)
    constants = distillation(pattern, q, k, block=BLOCK, step=1, doc_ids=docs)
    rows = pattern.target_blocks(13, 1)
    assert rows.tolist() == [1, 4, 7, 10]
    logits = torch.einsum("thd,shd->hts", q[0].double(), k[0].repeat_interleave(2, 1).double()) * 8**-0.5
    visible = torch.ones(T, T, dtype=torch.bool).tril()
    visible = visible if docs is None else visible & (docs[:, None] == docs[None])
    attention = torch.nn.functional.pad(logits.masked_fill(~visible, -torch.inf).softmax(-1), (0, 8, 0, 8))
    for r, row in enumerate(rows):
        lo, hi = row * BLOCK, (row + 1) * BLOCK
        if docs is not None:
            hi = lo + int((docs[lo:hi] == docs[lo]).sum())
        pooled = attention[:, lo:hi].unflatten(-1, (13, BLOCK)).sum((1, -1)).unflatten(0, (2, 2)).sum(1)
        want = pooled / pooled.sum(-1, keepdim=True)
        torch.testing.assert_close(constants.target[0, :, r].double(), want, rtol=1e-5, atol=1e-6)


def test_constants_of_the_loss_are_the_same_on_any_number_of_ranks():
    q, k, _ = inputs()
    pattern = patterns.seer_gate(target_rows=4)
    alone = distillation(pattern, q, k, block=BLOCK, step=2, doc_ids=DOCS)
    shape = pattern.shape_of(
        num_tokens=T,
        num_kv_heads=2,
        num_heads=4,
        block=BLOCK,
        doc_ids=DOCS,
        layer=0,
        num_layers=None,
        q=q,
        kv_head_offset=0,
        total_kv_heads=None,
        device=None,
    )
    layout, rows = SequenceLayout("striped", T, 3, BLOCK), pattern.target_blocks(13, 2)
    searches = [
        pattern.distillation_steps(layout.shard(q, p.rank, 1), layout.shard(k, p.rank, 1), shape, p, rows)
        for p in places(layout)
    ]
    for constants in run_lockstep(searches):
        assert torch.equal(constants.queries, alone.queries)
        assert torch.equal(constants.keys, alone.keys)
        torch.testing.assert_close(constants.target, alone.target, rtol=1e-5, atol=1e-7)


def test_gate_learns_where_attention_goes_and_touches_nothing_else():
    torch.manual_seed(0)
    length, dim = 512, 16
    # Every query block asks for the key block that shares its direction.
    topic = torch.randn(8, dim) * 2
    which = torch.randint(8, (length // BLOCK,)).repeat_interleave(BLOCK)
    q = (topic[which] + 0.3 * torch.randn(length, dim))[None, :, None].requires_grad_()
    k = (topic[which] + 0.3 * torch.randn(length, dim))[None, :, None].requires_grad_()
    pattern = patterns.seer_gate(top_k=6, gate_dim=16, target_rows=16)
    gate = pattern.make_module(num_heads=1, num_kv_heads=1, head_dim=dim)
    arguments = {
        "num_tokens": length,
        "num_kv_heads": 1,
        "num_heads": 1,
        "block": BLOCK,
        "q": q,
        "k": k,
        "module": gate,
    }
    before = float(patterns.attention_mass(q, k, pattern.index(**arguments)).mean())
    optimizer = torch.optim.Adam(gate.parameters(), lr=1e-2)
    losses = []
    for step in range(60):
        loss = pattern.loss(gate, distillation(pattern, q, k, block=BLOCK, step=step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    after = float(patterns.attention_mass(q, k, pattern.index(**arguments)).mean())
    assert q.grad is None
    assert k.grad is None
    assert losses[-1] < 0.5 * losses[0]
    assert losses[-1] >= -1e-6
    assert after > before + 0.05


def test_nsa_starts_as_its_selected_branch_and_that_can_be_dense():
    q, k, v = inputs()
    pattern = patterns.nsa(compress=8, top_k=13, window=32)
    module = pattern.make_module(num_heads=4, num_kv_heads=2, head_dim=8)
    index = pattern.index(num_tokens=T, num_kv_heads=2, num_heads=4, block=BLOCK, q=q, k=k, module=module)
    out = module(q, k, v, index)
    wide = [x.repeat_interleave(2, 2).transpose(1, 2) for x in (k, v)]
    dense = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), *wide, is_causal=True)
    torch.testing.assert_close(out, dense.transpose(1, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("docs", [None, DOCS])
def test_nsa_branches_follow_their_definition(docs):
    q, k, v = inputs(torch.float64)
    pattern = patterns.nsa(compress=8, top_k=6, window=32, initial_gates=(0.5, 0.75, 0.25))
    module = pattern.make_module(num_heads=4, num_kv_heads=2, head_dim=8).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    index = pattern.index(
        num_tokens=T, num_kv_heads=2, num_heads=4, block=BLOCK, q=q, k=k, module=module, doc_ids=docs
    )
    out = module(q, k, v, index, doc_ids=docs)
    out.square().sum().backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in module.parameters())

    ids = torch.zeros(T, dtype=torch.long) if docs is None else docs
    token = torch.arange(T)
    same = (ids[:, None] == ids[None]) & (token[None] <= token[:, None])
    window = pattern.window
    parts = []
    block = index.to_mask()[0].repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)[:, :T, :T]
    near = (token[:, None] // BLOCK - token[None] // BLOCK) <= -(-(window - 1) // BLOCK)
    # Compressed keys: runs of 8 tokens, over the tokens of the last document of their block.
    last = ids[torch.clamp((token // BLOCK + 1) * BLOCK, max=T) - 1]
    counted = (ids == last).double()
    pad = -T % 8
    means = []
    for x, weight in ((k, module.key_weight), (v, module.value_weight)):
        w = weight.softmax(-1).T[None] * torch.nn.functional.pad(counted, (0, pad)).view(-1, 8, 1)
        w = w / w.sum(1, keepdim=True).clamp(min=1e-20)
        means.append(
            (torch.nn.functional.pad(x[0], (0, 0, 0, 0, 0, pad)).view(-1, 8, 2, 8) * w[..., None]).sum(1)
        )
    end = torch.arange(len(means[0])) * 8 + 7
    run_doc = last[torch.clamp(end, max=T - 1)]
    exists = torch.nn.functional.pad(counted, (0, pad)).view(-1, 8).any(1)
    far = (end[None] <= token[:, None]) & (run_doc[None] == ids[:, None]) & exists[None]
    for keys, values, mask in (
        (means[0], means[1], far.expand(2, -1, -1)),
        (k[0], v[0], same & block),
        (k[0], v[0], (same & near).expand(2, -1, -1)),
    ):
        logits = torch.einsum("thd,shd->hts", q[0], keys.repeat_interleave(2, 1)) * 8**-0.5
        share = logits.masked_fill(~mask.repeat_interleave(2, 0), -torch.inf).softmax(-1).nan_to_num(0.0)
        parts.append(torch.einsum("hts,shd->thd", share, values.repeat_interleave(2, 1)))
    gates = torch.tensor([0.5, 0.75, 0.25]) + torch.einsum("thd,hdg->thg", q[0], module.gate_weight).tanh()
    want = sum(gates[..., i, None] * part for i, part in enumerate(parts))
    torch.testing.assert_close(out[0], want, rtol=1e-6, atol=1e-6)


def test_nsa_on_shards_gives_the_rows_of_the_whole():
    q, k, v = inputs()
    pattern = patterns.nsa(compress=8, top_k=6, window=32, initial_gates=(0.5, 0.75, 0.25))
    module = pattern.make_module(num_heads=4, num_kv_heads=2, head_dim=8)
    index = pattern.index(
        num_tokens=T, num_kv_heads=2, num_heads=4, block=BLOCK, q=q, k=k, module=module, doc_ids=DOCS
    )
    whole = module(q, k, v, index, doc_ids=DOCS)
    layout = SequenceLayout("striped", T, 3, BLOCK)
    documents = patterns.base.documents_of(DOCS, T, BLOCK)
    for place in places(layout):
        position = layout.positions(place.rank)

        def gather(*own, place=place):
            # What an all-gather of the blocks would return; the own part must be what this rank sent.
            whole = []
            for x, weight, sent in zip((k, v), (module.key_weight, module.value_weight), own, strict=True):
                full = module.compressed(x, weight, patterns.base.alone(T, BLOCK), documents)
                assert torch.equal(full[:, torch.from_numpy(np.asarray(place.blocks))], sent)
                whole.append(full)
            return tuple(whole)

        def attend(own_q, own_k, own_v, index, position=position, place=place):
            rows = index.select(torch.from_numpy(place.blocks), torch.arange(index.num_cols))
            every = torch.arange(T, dtype=torch.int32)
            return block_sparse_attention(
                own_q, k, v, rows, q_pos=position, k_pos=every, q_doc=DOCS[position.long()], k_doc=DOCS
            )[0]

        shards = [layout.shard(x, place.rank, 1) for x in (q, k, v)]
        call = patterns.base.LayerCall(T, DOCS, place, attend, gather, lambda key, make: make())
        out = module(*shards, index, call=call)
        torch.testing.assert_close(out, layout.shard(whole, place.rank, 1), rtol=1e-5, atol=1e-6)
