"""The contributions of the open round: what was announced, who holds it, what of it makes up the record."""

from __future__ import annotations

import statistics
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class RankId(NamedTuple):
    """A process: the name of its replica and its rank there."""

    replica: str
    rank: int


@dataclass
class Rank:
    """A connected process: address, digests of its shards' layout, and the state that it came with."""

    host: str
    port: int
    shards: dict[str, str]
    round: int
    digests: dict[str, str]


@dataclass
class Member:
    """A replica: its connected ranks, and the round that it is in (None until it holds the run's state)."""

    num_ranks: int
    ranks: dict[int, Rank] = field(default_factory=dict)
    at: int | None = None
    waiting: set[int] = field(default_factory=set)

    @property
    def complete(self) -> bool:
        return len(self.ranks) == self.num_ranks


@dataclass(frozen=True)
class WaitPolicy:
    """How long a round stays open after the first replica is ready: median + factor x MAD of the lateness."""

    min_s: float
    max_s: float
    factor: float

    def wait_s(self, lateness: deque[float]) -> float:
        """Seconds to wait; the longest wait until four values are known."""
        if len(lateness) < 4:
            return self.max_s
        median = statistics.median(lateness)
        deviation = statistics.median(abs(value - median) for value in lateness)
        return min(self.max_s, max(self.min_s, median + self.factor * deviation))


@dataclass
class Arrival:
    """What a replica's ranks announced: frames and state by shard, and their notes."""

    frames: dict[str, str] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    notes: dict[int, dict[str, Any]] = field(default_factory=dict)
    complete_at: float | None = None
    rejected: str = ""


@dataclass(frozen=True)
class Settlement:
    """Who is part of the round, who is left out and why, who can go on at once, and who differs."""

    included: list[str]
    excluded: dict[str, str]
    on_time: list[str]
    diverged: list[str]


class OpenRound:
    """Collects the announcements of one round. Knows the members only as far as it is told of them."""

    def __init__(self) -> None:
        self.first_arrival: float | None = None
        self.arrivals: dict[str, Arrival] = {}
        # (sender, shard) -> digest held, by receiving process.
        self._held: dict[tuple[str, str], dict[RankId, str]] = {}

    def arrived(self, who: RankId, message: dict[str, Any], now: float) -> None:
        """A process has sent its frames: {shard: digest}."""
        arrival = self.arrivals.setdefault(who.replica, Arrival())
        arrival.frames |= message["frames"]
        arrival.digests |= message["digests"]
        arrival.notes[who.rank] = message["notes"]
        if self.first_arrival is None:
            self.first_arrival = now

    def have(self, who: RankId, message: dict[str, Any]) -> None:
        """A process holds the frame of a shard from another replica."""
        self._held.setdefault((message["replica"], message["shard"]), {})[who] = message["sha"]

    def bad(self, who: RankId, message: dict[str, Any]) -> None:
        """A process refused a frame: its sender is left out of this round, with the reason."""
        arrival = self.arrivals.setdefault(message["replica"], Arrival())
        arrival.rejected = f"{message['reason']} (seen by {who.replica})"

    def rejected(self, name: str) -> bool:
        return name in self.arrivals and bool(self.arrivals[name].rejected)

    def present(self, shards: dict[str, str]) -> list[str]:
        """Replicas whose frames of all shards are announced and not refused."""
        return sorted(
            name
            for name, arrival in self.arrivals.items()
            if arrival.frames.keys() == shards.keys() and not arrival.rejected
        )

    def missing(self, present: list[str], members: dict[str, Member]) -> set[tuple[str, str]]:
        """(sender, receiver) pairs whose frames have not all come through."""
        return {
            (sender, receiver)
            for receiver in present
            if (member := members.get(receiver)) is not None and member.complete
            for sender in present
            if self._lacks(receiver, member, sender)
        }

    def note_complete(self, present: list[str], missing: set[tuple[str, str]], now: float) -> None:
        """Remember when everyone first held the frames of a replica."""
        for name in present:
            if not any(name == sender for sender, _ in missing):
                self.arrivals[name].complete_at = self.arrivals[name].complete_at or now

    def settle(
        self,
        present: list[str],
        missing: set[tuple[str, str]],
        expected: list[str],
        members: dict[str, Member],
    ) -> Settlement:
        """Close the round with what is here; expected: replicas that were in it from the start."""
        excluded = {name: a.rejected for name, a in self.arrivals.items() if a.rejected}
        diverged = self._diverged(present)
        excluded |= dict.fromkeys(diverged, "parameters differ from those of the other replicas")
        missing = {pair for pair in missing if not excluded.keys() & set(pair)}
        while missing:
            # Leave out whoever is part of most transfers that did not come through, senders first.
            counts = Counter(name for pair in missing for name in pair)
            senders = {sender for sender, _ in missing}
            worst = max(sorted(counts), key=lambda name: (counts[name], name in senders))
            excluded[worst] = "its frames, or those for it, were not through by the deadline"
            missing = {pair for pair in missing if worst not in pair}
        included = [name for name in present if name not in excluded]
        # Whoever received everything can follow at once, even when its own frames were left out.
        candidates = [name for name in present if name not in diverged]
        candidates += [name for name in expected if self.rejected(name)]
        on_time = [
            name
            for name in candidates
            if name in members and not any(self._lacks(name, members[name], sender) for sender in included)
        ]
        return Settlement(included, dict(sorted(excluded.items())), sorted(on_time), diverged)

    def _lacks(self, receiver: str, member: Member, sender: str) -> bool:
        """A rank of the receiver does not hold the frame that the sender announced."""
        return sender != receiver and any(
            self._held.get((sender, shard), {}).get(RankId(receiver, rank))
            != self.arrivals[sender].frames[shard]
            for rank, info in member.ranks.items()
            for shard in info.shards
        )

    def _diverged(self, present: list[str]) -> list[str]:
        states = {
            n: tuple(sorted(self.arrivals[n].digests.items())) for n in present if self.arrivals[n].digests
        }
        if len(set(states.values())) < 2:
            return []
        reference = states[majority(states)]
        return sorted(name for name, state in states.items() if state != reference)

    def notes(self, names: list[str]) -> dict[str, list[dict[str, Any]]]:
        """What the ranks of these replicas told with their frames, in order of rank."""
        return {
            name: [note for _, note in sorted(self.arrivals[name].notes.items())]
            for name in names
            if name in self.arrivals
        }

    def lateness(self, expected: list[str], now: float) -> list[float]:
        """Seconds after the first arrival at which each replica's frames were with everyone."""
        assert self.first_arrival is not None
        late = []
        for name in expected:
            complete_at = self.arrivals[name].complete_at if name in self.arrivals else None
            # Who did not make it would have needed longer: let the next rounds wait somewhat more.
            missed_s = 1.5 * (now - self.first_arrival)
            late.append(missed_s if complete_at is None else complete_at - self.first_arrival)
        return late


def majority(states: dict[str, Any]) -> str:
    """The first name, in order, that holds the most common state."""
    counts = Counter(states.values())
    return min(states, key=lambda name: (-counts[states[name]], name))
