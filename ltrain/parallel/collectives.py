"""Asynchronous exchanges on explicit process groups, with every byte counted.

All ranks here are relative to the group that is passed. Each exchange returns at once with a `Pending`; the
buffers that it holds stay alive until `Pending.wait`, so that a backend with its own stream never reads freed
memory.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None


def size_of(group: Group) -> int:
    """Number of ranks in `group`; 1 where torch.distributed was never initialised and `group` is None."""
    return dist.get_world_size(group) if group is not None or dist.is_initialized() else 1


def rank_in(group: Group) -> int:
    """This process's rank in `group`; 0 where torch.distributed was never initialised and `group` is None."""
    return dist.get_rank(group) if group is not None or dist.is_initialized() else 0


@dataclass
class Traffic:
    """What this rank sent, waited for and worked on: a counter that the caller owns and passes in.

    `node_size` ranks of the group share a node (None: all of them). Bytes are payload bytes handed to the
    transport. `step_tiles` holds the selected blocks that each attention call of a forward pass worked on,
    every query head counted. Seconds are the host's clock, on a GPU the time between events of its stream.
    """

    node_size: int | None = None
    bytes_in_node: int = 0
    bytes_between_nodes: int = 0
    num_messages: int = 0
    step_tiles: list[float] = field(default_factory=list)
    _seconds: dict[str, float] = field(default_factory=dict)
    _device_spans: list[tuple[str, Any, Any]] = field(default_factory=list)

    @property
    def bytes_sent(self) -> int:
        return self.bytes_in_node + self.bytes_between_nodes

    @property
    def wait_s(self) -> float:
        """Seconds during which computation stood still for an exchange."""
        return self.seconds("wait")

    @contextmanager
    def span(self, name: str, on_device: bool) -> Iterator[None]:
        """Add the time of a block of code to `name`."""
        if on_device:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
        began = time.perf_counter()
        try:
            yield
        finally:
            if on_device:
                end.record()
                self._device_spans.append((name, start, end))
            else:
                self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - began

    def seconds(self, name: str) -> float:
        """Seconds of all spans of that name so far; on a GPU, waits for the device to finish them."""
        for span, start, end in self._device_spans:
            end.synchronize()
            self._seconds[span] = self._seconds.get(span, 0.0) + start.elapsed_time(end) / 1e3
        self._device_spans.clear()
        return self._seconds.get(name, 0.0)

    def add(self, sender: int, receiver: int, num_bytes: int) -> None:
        """Count a message between two ranks numbered in the whole context-parallel group."""
        if sender == receiver or num_bytes == 0:
            return
        if self.node_size is not None and sender // self.node_size != receiver // self.node_size:
            self.bytes_between_nodes += num_bytes
        else:
            self.bytes_in_node += num_bytes
        self.num_messages += 1


@dataclass
class Pending:
    """Exchanges in flight. `wait` returns the received tensors when the current stream may use them."""

    works: list[Any]
    received: tuple[Tensor, ...]
    keep: tuple[Tensor, ...] = ()
    traffic: Traffic | None = None

    def wait(self) -> tuple[Tensor, ...]:
        if self.works:
            with timed(self.traffic, "wait", self.received):
                for work in self.works:
                    work.wait()
        self.works, self.keep = [], ()
        return self.received


def timed(traffic: Traffic | None, name: str, tensors: Sequence[Tensor]) -> AbstractContextManager[None]:
    """A span of `traffic` on the device of `tensors`; nothing without a counter."""
    if traffic is None:
        return nullcontext()
    return traffic.span(name, bool(tensors) and tensors[0].is_cuda)


@dataclass(frozen=True)
class Channel:
    """A communicator and the numbers that its members have in the whole context-parallel group.

    `ranks[i]` is the number of member i; it only serves to tell traffic in a node from traffic between nodes.
    `group` is None where there is but one member.
    """

    group: Group
    ranks: tuple[int, ...]
    me: int

    @property
    def size(self) -> int:
        return len(self.ranks)

    def exchange(
        self,
        sends: Sequence[tuple[int, Tensor]],
        receives: Sequence[tuple[int, Tensor]],
        traffic: Traffic | None = None,
    ) -> Pending:
        """Start point-to-point messages: (member, contiguous tensor) pairs. Empty tensors aren't sent.

        Between two members, messages arrive in the order in which both sides list them.
        """
        ops = []
        for peer, tensor in sends:
            if tensor.numel():
                ops.append(dist.P2POp(dist.isend, tensor, group=self.group, group_peer=peer))
                self._count(traffic, peer, tensor.numel() * tensor.element_size())
        for peer, tensor in receives:
            if tensor.numel():
                ops.append(dist.P2POp(dist.irecv, tensor, group=self.group, group_peer=peer))
        works = dist.batch_isend_irecv(ops) if ops else []
        return Pending(works, tuple(t for _, t in receives), tuple(t for _, t in sends), traffic)

    def all_to_all(
        self,
        send: Tensor,
        send_sizes: Sequence[int],
        receive_sizes: Sequence[int],
        traffic: Traffic | None = None,
    ) -> Pending:
        """Start an uneven all-to-all of a flat tensor: `send_sizes[i]` elements go to member i, in member
        order."""
        received = send.new_empty(sum(receive_sizes))
        if self.size == 1:
            received.copy_(send)
            return Pending([], (received,))
        for peer, count in enumerate(send_sizes):
            self._count(traffic, peer, count * send.element_size())
        work = dist.all_to_all_single(
            received, send, list(receive_sizes), list(send_sizes), group=self.group, async_op=True
        )
        return Pending([work], (received,), (send,), traffic)

    def all_gather(
        self,
        sends: Sequence[Tensor],
        lengths: Sequence[int],
        order: Sequence[int],
        traffic: Traffic | None = None,
    ) -> Pending:
        """Start gathering shards along dimension 0, laid out in the member order `order`.

        `lengths[i]` is the shard length of member i. Equal lengths in natural order use the collective;
        others are sent pairwise, so that nothing is padded.
        """
        received = tuple(t.new_empty((sum(lengths), *t.shape[1:])) for t in sends)
        if self.size == 1:
            for whole, t in zip(received, sends, strict=True):
                whole.copy_(t)
            return Pending([], received)
        if len(set(lengths)) == 1 and list(order) == list(range(self.size)):
            works = []
            for whole, t in zip(received, sends, strict=True):
                if t.numel():
                    for peer in range(self.size):
                        self._count(traffic, peer, t.numel() * t.element_size())
                    works.append(
                        dist.all_gather_into_tensor(whole, t.contiguous(), group=self.group, async_op=True)
                    )
            return Pending(works, received, tuple(sends), traffic)
        starts, at = {}, 0
        for member in order:
            starts[member] = at
            at += lengths[member]
        out, into = [], []
        for whole, t in zip(received, sends, strict=True):
            whole[starts[self.me] : starts[self.me] + lengths[self.me]].copy_(t)
            for peer in range(self.size):
                if peer != self.me:
                    out.append((peer, t.contiguous()))
                    into.append((peer, whole[starts[peer] : starts[peer] + lengths[peer]]))
        pending = self.exchange(out, into, traffic)
        return Pending(pending.works, received, pending.keep, traffic)

    def _count(self, traffic: Traffic | None, peer: int, num_bytes: int) -> None:
        if traffic is not None:
            traffic.add(self.ranks[self.me], self.ranks[peer], num_bytes)


_communicators: weakref.WeakKeyDictionary[Any, dict[tuple[Any, ...], Any]] = weakref.WeakKeyDictionary()


def _new_named_group(ranks: list[int], name: str, backend: str) -> Any:
    """A process group that only its members create, under a name that they agree on.

    torch names such a group by the number of groups that the calling rank has joined so far. Members that
    joined different numbers of groups, pipeline stages for one, would wait for each other under different
    names for ever.
    """
    from torch.distributed import distributed_c10d

    # torch before 2.12 knows ascending ranks only, and no such option.
    order: dict[str, Any] = {} if ranks == sorted(ranks) else {"sort_ranks": False}
    naming = distributed_c10d._process_group_name
    distributed_c10d._process_group_name = lambda ranks, use_hashed_name: name  # type: ignore
    try:
        return dist.new_group(ranks, backend=backend, use_local_synchronization=True, **order)
    finally:
        distributed_c10d._process_group_name = naming


def channel(group: Group, purpose: str, members: Sequence[int] | None = None) -> Channel:
    """A communicator of its own for `purpose` over `members` of `group` (all of them by default), made once.

    Messages of different purposes never queue behind each other. Every member must ask for its channels in
    the same order; ranks outside `members` don't take part. Raises ValueError where this rank is no member.
    """
    everyone = tuple(range(size_of(group)))
    ranks = everyone if members is None else tuple(members)
    me = rank_in(group)
    if me not in ranks:
        raise ValueError(f"rank {me} is no member of {ranks}")
    if len(ranks) == 1:
        return Channel(None, ranks, 0)
    return Channel(subgroup(group, purpose, ranks), ranks, ranks.index(me))


def subgroup(group: Group, purpose: str, ranks: tuple[int, ...]) -> dist.ProcessGroup:
    """A process group of its own for `purpose` over `ranks` of `group`, this one among them, made once; one
    rank alone gets one too. As for `channel`, members ask in the same order, and others take no part.
    """
    parent = group if group is not None else dist.group.WORLD
    assert parent is not None
    known = _communicators.setdefault(parent, {})
    if (purpose, ranks) not in known:
        name = f"{parent.group_name}/{purpose}/{'-'.join(map(str, ranks))}"
        made = _new_named_group(
            [dist.get_global_rank(parent, rank) for rank in ranks], name, dist.get_backend_config(parent)
        )
        if "nccl" in dist.get_backend_config(parent):
            # Its first operation connects all members; point-to-point messages of some would wait for the
            # rest.
            dist.all_reduce(torch.zeros(1, device="cuda"), group=made)
        known[purpose, ranks] = made
    return known[purpose, ranks]  # type: ignore[no-any-return]
