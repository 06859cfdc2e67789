"""What a pattern is: from a sequence (and, for some, its queries and keys) to a `BlockIndex` of the whole
of it.

B batch, T tokens, Hq query heads, Hkv key/value heads, D head size. A pattern is a frozen value. *Static*
patterns know their index from the shape; *dynamic* ones find it from q and k, by a generator of three kinds
of step that also runs on the ranks of a context-parallel group (`steps`): statistics of the own shard, a
reduction described as data (exchange.py), and the finishing of the rows or heads dealt to this rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Required, TypedDict, Unpack, cast

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ltrain.attention.patterns.documents import Documents, density, documents_of
from ltrain.attention.patterns.exchange import Place, Steps, alone, run_alone
from ltrain.attention.patterns.rows import ranges, restrict
from ltrain.attention.patterns.verticals import Verticals
from ltrain.config.base import ConfigError
from ltrain.config.patterns import PatternFields
from ltrain_kernels.block_sparse import BlockIndex, block_sparse_attention
from ltrain_kernels.block_sparse import dense as dense_index


@dataclass(frozen=True)
class Capabilities:
    """What a pattern serves; the support table in the documentation is made from it.

    `head_axis`: heads of the index, "1", "Hkv" or "Hkv, Hq". `collectives`: exchanges of a search on
    several ranks.
    """

    documents: bool
    context_parallel: bool
    gqa: bool
    head_axis: str
    collectives: int = 0
    learned: bool = False


@dataclass(frozen=True)
class Shape:
    """What an index is built for. Heads are this process's; `total_kv_heads` counts those of the whole
    model.
    """

    num_tokens: int
    num_heads: int
    num_kv_heads: int
    block: int
    documents: list[Documents]
    layer: int
    num_layers: int | None
    kv_head_offset: int
    total_kv_heads: int
    device: torch.device


@dataclass(frozen=True)
class Selection:
    """What to attend: selected blocks, and single keys beside them where a pattern chose any.

    `as_index` rounds such keys up to whole blocks, so that it alone is always a complete answer.
    """

    index: BlockIndex
    verticals: Verticals | None = None

    def as_index(self) -> BlockIndex:
        return self.index if self.verticals is None else self.verticals.as_blocks(self.index)


@dataclass(frozen=True)
class Widths:
    """What the bytes of a layer depend on: the heads of an unsharded model, bytes of an element, tokens of a
    block, and the ranks that share a sequence.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    element: int
    block: int
    context: int


def _attend_here(*args: Any, **where: Any) -> Tensor:
    return block_sparse_attention(*args, **where)[0]


@dataclass(frozen=True)
class LayerCall:
    """One layer's attention on this rank, as a pattern with branches of its own needs it.

    `place` says which tokens of the sequence are here; `attend(q, k, v, index) -> out` is exact attention
    over the whole sequence; `gather(x, y)` is the differentiable gather of two tensors [B, own blocks, ...]
    to all blocks in document order; `attend_here(q, keys, values, index, **where) -> out` is attention to
    keys that are all on this rank; `cached(key, make)` keeps what the layers of a micro-batch share; `window`
    is the model's own. In the backward pass of a layer that recomputes its inputs a pattern makes the same
    calls in the same order, and those three return what they returned in the forward pass.
    """

    num_tokens: int
    doc_ids: Tensor | None
    place: Place
    attend: Callable[[Tensor, Tensor, Tensor, BlockIndex], Tensor]
    gather: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    cached: Callable[[Any, Callable[[], Any]], Any]
    window: int | None = None
    scale: float | None = None
    attend_here: Callable[..., Tensor] = _attend_here


class LayerArguments(TypedDict, total=False):
    """Where a selection is made: `doc_ids` int [T] or [B, T] (one document), `layer` (0) of `num_layers`
    (unknown); `kv_head_offset` (0) is the global id of this process's first key/value head and
    `total_kv_heads` counts the whole model's, needed with an offset.
    """

    doc_ids: Tensor | None
    layer: int
    num_layers: int | None
    kv_head_offset: int
    total_kv_heads: int | None


class ShapeArguments(LayerArguments, total=False):
    """What an index is asked for: `num_heads` (num_kv_heads) and `num_kv_heads` are heads of this process,
    `block` (128) is in tokens, `device` that of q, else the CPU.
    """

    num_tokens: Required[int]
    num_kv_heads: Required[int]
    num_heads: int | None
    block: int
    device: torch.device | str | None


class Pattern(PatternFields, ABC):
    """A pattern of attention; subclasses also inherit their configuration section.

    Its index covers the whole sequence in document order, in blocks of `block` tokens, and always holds the
    diagonal. Everything is per document: blocks without a common document are dropped where documents are
    given.
    """

    static: ClassVar[bool] = True
    # Found online from distances between tokens: an excerpt of a sequence can't be searched by itself.
    by_distance: ClassVar[bool] = False
    capabilities: ClassVar[Capabilities]

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise _explain(error, getattr(type(self), "model_fields", {})) from None

    def is_dense_layer(self, layer: int, num_layers: int | None = None) -> bool:
        """Whether `layer` attends to everything whatever the pattern."""
        return layer in self.dense_layers

    def make_module(self, *, num_heads: int, num_kv_heads: int, head_dim: int) -> nn.Module | None:
        """The learned part for one layer (this process's heads), or None for patterns without parameters.

        Every parameter's first dimension is heads, by which it is sharded. `init_std` is the deviation of its
        normal initial values.
        """
        return None

    def branches(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, index: BlockIndex, call: LayerCall
    ) -> tuple[Tensor, ...]:
        """What attention of a pattern with a learned part is made of: the selected blocks, [B, T_local, Hq,
        Dv], unless the pattern has branches of its own. A memory level saves them, so they should be few.
        """
        return (call.attend(q, k, v, index),)

    def combine(self, *branches: Tensor) -> Tensor:
        """Attention's output [B, T_local, Hq, Dv] from its branches, by cheap operations: it runs again in
        the backward pass.
        """
        (out,) = branches
        return out

    def saved_bytes(self, widths: Widths, *, lean: bool) -> tuple[float, float]:
        """Bytes a token, and bytes whatever the tokens, that a learned pattern's layer saves for its backward
        pass beside what attention over one index saves; `lean` at memory levels other than `none`.
        """
        return 0.0, 0.0

    def lesson(self, q: Tensor, k: Tensor, shape: Shape, place: Place, step: int) -> Steps | None:
        """The search for the constants of `loss` at a training step; None for patterns without a loss."""
        return None

    def loss(self, module: Any, constants: Any) -> Tensor:
        """The pattern's own loss, which trains its module and nothing else."""
        raise NotImplementedError(f"{type(self).__name__} has no loss of its own")

    @torch.no_grad()
    def index(
        self,
        *,
        q: Tensor | None = None,
        k: Tensor | None = None,
        module: nn.Module | None = None,
        **shape: Unpack[ShapeArguments],
    ) -> BlockIndex:
        """The blocks to attend, over the whole sequence in document order; a constant, to be saved and used
        again.

        q [B, T, Hq, D] and k [B, T, Hkv, D], after rotary embedding, are for dynamic patterns; `module` is
        the learned part of those that have one. Raises ConfigError on arguments that do not fit.
        """
        return self.select(q=q, k=k, module=module, **shape).as_index()

    @torch.no_grad()
    def select(
        self,
        *,
        q: Tensor | None = None,
        k: Tensor | None = None,
        module: nn.Module | None = None,
        **shape: Unpack[ShapeArguments],
    ) -> Selection:
        """As `index`, with single keys apart where the pattern chooses them (`vertical_slash`)."""
        if shape.get("device") is None and q is not None:
            shape["device"] = q.device
        found = self.shape_of(**shape)
        if self.static or self.is_dense_layer(found.layer, found.num_layers):
            return Selection(self.static_index(found))
        check_queries(self.kind, q, k, found, found.num_tokens)
        q, k = cast(Tensor, q), cast(Tensor, k)
        return run_alone(self.steps(q, k, found, alone(found.num_tokens, found.block), module))

    @staticmethod
    def shape_of(**given: Unpack[ShapeArguments]) -> Shape:
        """The arguments checked and completed. Raises ConfigError where they do not fit."""
        num_tokens, num_kv_heads = given["num_tokens"], given["num_kv_heads"]
        num_heads = given.get("num_heads") or num_kv_heads
        block, layer, num_layers = given.get("block", 128), given.get("layer", 0), given.get("num_layers")
        kv_head_offset, total_kv_heads = given.get("kv_head_offset", 0), given.get("total_kv_heads")
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ConfigError("num_heads", num_heads, f"must be a multiple of num_kv_heads={num_kv_heads}")
        if total_kv_heads is None:
            if kv_head_offset:
                raise ConfigError(
                    "total_kv_heads", None, "must be given with kv_head_offset", "pass the model's count"
                )
            total_kv_heads = num_kv_heads
        if kv_head_offset < 0 or kv_head_offset + num_kv_heads > total_kv_heads:
            raise ConfigError(
                "kv_head_offset",
                kv_head_offset,
                f"must leave {num_kv_heads} heads below total_kv_heads={total_kv_heads}",
            )
        if layer < 0 or (num_layers is not None and layer >= num_layers):
            raise ConfigError(
                "layer", layer, f"must lie in 0..{'' if num_layers is None else num_layers - 1}"
            )
        documents = documents_of(given.get("doc_ids"), num_tokens, block)
        return Shape(
            num_tokens, num_heads, num_kv_heads, block, documents, layer,
            num_layers, kv_head_offset, total_kv_heads, torch.device(given.get("device") or "cpu"),
        )  # fmt: skip

    def static_index(self, shape: Shape) -> BlockIndex:
        """The index where q and k aren't needed: static patterns, and dense layers of any."""
        if self.static and not self.is_dense_layer(shape.layer, shape.num_layers):
            return self.build(shape)
        return dense_within_documents(shape)

    def build(self, shape: Shape) -> BlockIndex:
        """The index of a static pattern in a layer that isn't dense."""
        raise NotImplementedError(f"{type(self).__name__} is found from q and k")

    def row_work(self, shape: Shape) -> np.ndarray:
        """Blocks that every row of blocks is predicted to attend, float64 [N]: the mean over heads and batch
        of a static index; of a search whose outcome isn't known, everything that the row can see.
        """
        if not self.static or self.is_dense_layer(shape.layer, shape.num_layers):
            return np.mean([np.arange(d.num_blocks) - d.low + 1.0 for d in shape.documents], axis=0)
        return self.build(shape).drop_future().counts().double().mean((0, 1)).cpu().numpy()

    def steps(self, q: Tensor, k: Tensor, shape: Shape, place: Place, module: nn.Module | None) -> Steps:
        """The search of a dynamic pattern: q [B, T_local, Hq, D], k [B, T_local, Hkv, D] are the tokens of
        `place`.

        Returns (by StopIteration) the same Selection on every rank.
        """
        raise NotImplementedError(f"{type(self).__name__} is static")

    def density(self, index: BlockIndex, *, num_tokens: int, doc_ids: Tensor | None = None) -> float:
        """Share of the (query, key) pairs of dense causal attention that `index` keeps."""
        return density(index, documents_of(doc_ids, num_tokens, index.block_q))


class DynamicPattern(Pattern):
    """A pattern that is found from q and k."""

    static: ClassVar[bool] = False

    def row_work(self, shape: Shape) -> np.ndarray:
        seen = super().row_work(shape)
        limit = getattr(self, "top_k", None)
        dense = limit is None or self.is_dense_layer(shape.layer, shape.num_layers)
        return seen if dense else np.minimum(seen, limit)

    @abstractmethod
    def steps(self, q: Tensor, k: Tensor, shape: Shape, place: Place, module: nn.Module | None) -> Steps: ...


def within_documents(index: BlockIndex, shape: Shape) -> BlockIndex:
    """`index` (batch 1) without the blocks that share no document; itself where there is but one document."""
    if not any(docs.packed for docs in shape.documents):
        return index.to(shape.device)
    return restrict(index, shape.documents).to(shape.device)


def dense_within_documents(shape: Shape) -> BlockIndex:
    """Every block up to the diagonal that shares a document with its row; a closed form for one document."""
    if not any(docs.packed for docs in shape.documents):
        return dense_index(shape.num_tokens, shape.block).to(shape.device)
    runs = [(docs.low[None], np.arange(docs.num_blocks)[None] + 1) for docs in shape.documents]
    return ranges(shape.documents, runs).to(shape.device)


def check_queries(kind: str, q: Tensor | None, k: Tensor | None, shape: Shape, length: int) -> None:
    """Raise ConfigError unless q [B, length, Hq, D] and k [B, length, Hkv, D] are there and fit."""
    if q is None or k is None:
        raise ConfigError("q, k", None, f"must be given: {kind} is found from queries and keys")
    for name, x, heads in (("q", q, shape.num_heads), ("k", k, shape.num_kv_heads)):
        if x.dim() != 4 or x.shape[1] != length or x.shape[2] != heads:
            raise ConfigError(f"{name}.shape", tuple(x.shape), f"must be [B, {length}, {heads}, D]")
        if not x.is_floating_point():
            raise ConfigError(f"{name}.dtype", x.dtype, "must be a floating point type")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.device != k.device:
        raise ConfigError("k.shape", tuple(k.shape), f"must agree with q {tuple(q.shape)} in B, D and device")
    if len(shape.documents) not in (1, q.shape[0]):
        raise ConfigError("doc_ids.shape", len(shape.documents), f"must have 1 or {q.shape[0]} rows")


def _explain(error: ValidationError, known: Any) -> ConfigError:
    item = error.errors()[0]
    inner = (item.get("ctx") or {}).get("error")
    if isinstance(inner, ConfigError):
        return inner
    field = ".".join(str(part) for part in item["loc"])
    fix = f"known here: {', '.join(sorted(known))}" if item["type"] == "extra_forbidden" else ""
    return ConfigError(field, item.get("input"), item["msg"][0].lower() + item["msg"][1:], fix)
