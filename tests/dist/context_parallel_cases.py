"""Cases for the tests of context-parallel attention, and the function that a rank runs them with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from support.attention import Reference, attention, relative_error, visible_pairs

from ltrain.attention.context_parallel import context_parallel_attention, plan_attention
from ltrain.parallel.collectives import Traffic
from ltrain.parallel.layout import SequenceLayout
from ltrain_kernels.block_sparse import BlockIndex


@dataclass(frozen=True)
class Tiles:
    ids: torch.Tensor
    index: BlockIndex
    tile: int


@dataclass(frozen=True)
class Case:
    """One call. `heads_of_mask`: "one", "kv" or "query"; `docs`: document lengths, the last one takes the
    rest."""

    schedule: str
    layout: str = "striped"
    tokens: int = 210
    block: int = 16
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    value_dim: int = 8
    batch: int = 1
    heads_of_mask: str = "kv"
    pattern: str = "random"
    docs: tuple[int, ...] = ()
    node_size: int | None = None
    dtype: torch.dtype = torch.float64
    seed: int = 0
    saved: bool = False
    grad_wire: torch.dtype | None = None
    verticals: str = ""

    def make_layout(self, world: int) -> SequenceLayout:
        if self.layout == "dealt":
            blocks = -(-self.tokens // self.block)
            # An uneven deal that leaves the last rank with nothing where there is more than one.
            owners = [(i * i + i // 3) % max(world - 1, 1) for i in range(blocks)]
            return SequenceLayout.dealt(owners, self.tokens, world, self.block)
        return SequenceLayout(self.layout, self.tokens, world, self.block)

    def block_mask(self) -> torch.Tensor:
        blocks = -(-self.tokens // self.block)
        heads = {"one": 1, "kv": self.kv_heads, "query": self.q_heads}[self.heads_of_mask]
        row, col = torch.arange(blocks)[:, None], torch.arange(blocks)[None, :]
        if self.pattern == "dense":
            mask = (col <= row).expand(1, heads, -1, -1)
        elif self.pattern == "window":
            mask = ((col <= row) & (col > row - 3)).expand(1, heads, -1, -1)
        elif self.pattern == "strided":
            per_head = [(col > row - 2) | (col % 4 == h % 4) for h in range(heads)]
            mask = (torch.stack(per_head) & (col <= row))[None]
        elif self.pattern == "nothing":
            mask = torch.zeros(1, heads, blocks, blocks, dtype=torch.bool)
        else:
            generator = torch.Generator().manual_seed(self.seed + 1)
            # Rows without any key, and entries in the future, are allowed.
            mask = torch.rand(1, heads, blocks, blocks, generator=generator) < 0.35
        return mask

    def vertical_keys(self) -> torch.Tensor | None:
        """Bool [B, Hs, T]: single keys of every kv ("kv") or query ("query") head."""
        if not self.verticals:
            return None
        heads = self.kv_heads if self.verticals == "kv" else self.q_heads
        generator = torch.Generator().manual_seed(self.seed + 2)
        return torch.rand(self.batch, heads, self.tokens, generator=generator) < 0.06

    def tiles(self) -> Tiles | None:
        """One key a tile; a row takes those before it whose block it hasn't selected."""
        keys = self.vertical_keys()
        if keys is None:
            return None
        batch, heads, _ = keys.shape
        mask = self.block_mask()
        blocks = mask.shape[-1]
        found = [[keys[b, h].nonzero()[:, 0] for h in range(heads)] for b in range(batch)]
        slots = max(len(ids) for row in found for ids in row)
        ids = torch.full((batch, heads, slots), -1)
        taken = torch.zeros(batch * heads, 1, blocks, slots, dtype=torch.bool)
        for b in range(batch):
            for h in range(heads):
                own = found[b][h]
                ids[b, h, : len(own)] = own
                selected = mask[0, h * mask.shape[1] // heads]
                taken[b * heads + h, 0, :, : len(own)] = ~selected[:, own // self.block]
        return Tiles(ids, BlockIndex.from_mask(taken, self.block, 1), 1)

    def doc_ids(self) -> torch.Tensor | None:
        if not self.docs:
            return None
        lengths = [*self.docs, self.tokens - sum(self.docs)]
        return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(torch.int32)

    def tensors(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        b, t, n, k, d, e = self.batch, self.tokens, self.q_heads, self.kv_heads, self.head_dim, self.value_dim
        shapes = {
            "q": (b, t, n, d),
            "k": (b, t, k, d),
            "v": (b, t, k, e),
            "dout": (b, t, n, e),
            "dlse": (b, n, t),
        }
        made = {name: torch.randn(s, generator=generator, dtype=torch.float64) for name, s in shapes.items()}
        return {name: x.to(self.dtype) for name, x in made.items()}

    def reference(self) -> Reference:
        x = self.tensors()
        pairs = visible_pairs(
            self.block_mask(),
            self.block,
            self.tokens,
            self.doc_ids(),
            self.batch,
            self.q_heads,
            self.vertical_keys(),
        )
        return attention(x["q"], x["k"], x["v"], pairs, x["dout"], x["dlse"])


def run_case(case: Case, group: Any, rank: int, world: int) -> dict[str, Any]:
    """This rank's shards of out, lse, dq, dk, dv, and what it sent."""
    layout = case.make_layout(world)
    x = {
        name: layout.shard(t, rank, 2 if name == "dlse" else 1).contiguous()
        for name, t in case.tensors().items()
    }
    q, k, v = (x[name].requires_grad_() for name in "qkv")
    index = BlockIndex.from_mask(case.block_mask(), case.block, case.block)
    traffic, backward = Traffic(), Traffic()
    options = {
        "layout": layout,
        "group": group,
        "index": index,
        "doc_ids": case.doc_ids(),
        "schedule": case.schedule,
        "node_size": case.node_size,
        "grad_wire": case.grad_wire,
        "verticals": case.tiles(),
    }
    out, lse = context_parallel_attention(q, k, v, traffic=traffic, **options)
    forward_bytes = traffic.bytes_sent
    if case.saved:
        again = Traffic()
        planned = {name: x for name, x in options.items() if name != "grad_wire"}
        options["plan"] = plan_attention(q, k, v, **planned)
        out, lse = context_parallel_attention(
            q, k, v, traffic=again, saved=(out.detach(), lse.detach()), **options
        )
        assert again.num_messages == 0 and not again.step_tiles
        traffic = again
    before = traffic.bytes_sent
    seen = torch.isfinite(lse)
    torch.autograd.backward([out, lse], [x["dout"], torch.where(seen, x["dlse"].to(lse.dtype), 0.0)])
    backward.bytes_in_node = traffic.bytes_sent - before
    return {
        "out": out.detach().double().numpy(),
        "lse": lse.detach().double().numpy(),
        "dq": q.grad.double().numpy(),
        "dk": k.grad.double().numpy(),
        "dv": v.grad.double().numpy(),
        "forward_bytes": forward_bytes,
        "backward_bytes": backward.bytes_in_node,
        "between_nodes": traffic.bytes_between_nodes,
        "out_dtype": str(out.dtype),
        "lse_dtype": str(lse.dtype),
        "messages": traffic.num_messages,
    }


def run_sizes(rank: int, world: int, cases: dict[int, list[Case]]) -> dict[int, list[dict[str, Any]]]:
    """The cases of every group size, on the last `size` processes: only the largest group contains rank 0."""
    results = {}
    for size, todo in cases.items():
        members = list(range(world - size, world))
        group = dist.new_group(members)
        if rank not in members:
            continue
        results[size] = []
        for case in todo:
            try:
                results[size].append(run_case(case, group, dist.get_rank(group), size))
            except Exception as error:
                raise AssertionError(f"{size} ranks, {case}") from error
    return results


def errors(case: Case, shards: list[dict[str, Any]]) -> dict[str, float]:
    """Relative error of every result, gathered to document order, against the textbook."""
    layout = case.make_layout(len(shards))
    reference = case.reference()
    found = {}
    for name in ("out", "lse", "dq", "dk", "dv"):
        whole = layout.unshard([torch.from_numpy(s[name]) for s in shards], 2 if name == "lse" else 1)
        found[name] = relative_error(getattr(reference, name), whole)
    return found


def assert_close(cases: list[Case], by_rank: list[list[dict[str, Any]]], tolerance: float) -> None:
    failures = []
    for number, case in enumerate(cases):
        found = errors(case, [results[number] for results in by_rank])
        if max(found.values()) > tolerance:
            failures.append(f"{len(by_rank)} ranks, {case}: {found}")
    assert not failures, "\n".join(failures)


BASE = Case("ring")
VARIANTS = [
    BASE,
    replace(BASE, layout="zigzag", heads_of_mask="query", batch=2, docs=(37, 90)),
    replace(BASE, layout="contiguous", pattern="dense", heads_of_mask="one"),
    replace(BASE, layout="dealt", pattern="strided", value_dim=5, docs=(100,)),
    replace(BASE, pattern="window", q_heads=6, kv_heads=2, heads_of_mask="query", tokens=193),
    replace(BASE, tokens=40, q_heads=3, kv_heads=1, heads_of_mask="one"),
    replace(BASE, tokens=7, q_heads=2, kv_heads=2, pattern="dense"),
    replace(BASE, q_heads=5, kv_heads=5, tokens=160, docs=(1, 1, 60), layout="zigzag"),
    replace(BASE, pattern="nothing", tokens=64),
    replace(BASE, batch=2, saved=True, q_heads=4, kv_heads=4, heads_of_mask="query", value_dim=12),
    replace(BASE, verticals="kv", docs=(70,), batch=2),
    replace(BASE, verticals="query", heads_of_mask="query", q_heads=6, layout="zigzag", value_dim=5),
]


def grid(schedules: list[str], node_size: int | None = None, variants: list[int] | None = None) -> list[Case]:
    """The fixed grid: every schedule against layouts, masks, documents, heads and shapes."""
    chosen = range(len(VARIANTS)) if variants is None else variants
    return [replace(VARIANTS[i], schedule=s, seed=i, node_size=node_size) for s in schedules for i in chosen]
