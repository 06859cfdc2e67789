"""Answer the requests of several ranks' searches in one process, from the definition of each request."""

from __future__ import annotations

import numpy as np
import torch

from ltrain.attention.patterns.exchange import Deal, Place


def run_lockstep(searches, counter=None):
    """Drive one generator a rank to its end; returns their results. `counter` collects (kind, elements
    sent).
    """
    requests = [next(search) for search in searches]
    while True:
        if counter is not None:
            counter.append((type(requests[0]).__name__, [request.rows.numel() for request in requests]))
        results, following = [], []
        for rank, search in enumerate(searches):
            try:
                following.append(search.send(_answer(requests, rank)))
            except StopIteration as stop:
                results.append(stop.value)
        if results:
            assert len(results) == len(searches)
            return results
        requests = following


def _answer(requests, rank):
    owner = requests[0].owner
    assert all(np.array_equal(request.owner, owner) for request in requests)
    dim = 1 if isinstance(requests[0], Deal) else 0
    sent = [0] * len(requests)
    rows = []
    for who in owner:
        rows.append(requests[who].rows.select(dim, sent[who]))
        sent[who] += 1
    assert sent == [request.rows.shape[dim] for request in requests], "a rank sent rows that nobody expects"
    if dim == 0:
        return torch.stack(rows) if rows else requests[rank].rows
    mine = torch.from_numpy(np.flatnonzero(requests[0].dealt == rank))
    return torch.stack([row[mine] for row in rows], dim=1)


def places(layout):
    return [
        Place(rank, layout.world_size, layout.block_owner, layout.block) for rank in range(layout.world_size)
    ]
